"""multistream-select 1.0: how two sides agree on what to speak next. Pure: bytes in, bytes out.

https://github.com/multiformats/multistream-select and libp2p's connections specification. A line is a varint length,
the text, and a newline that the length counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from clawnet import limits
from clawnet.errors import LinkError, WireError
from clawnet.net.protobuf import read_varint, varint

HEADER = "/multistream/1.0.0"
REFUSAL = "na"
LISTING = "ls"


def line(text: str) -> bytes:
    """One message."""
    body = text.encode() + b"\n"
    return varint(len(body)) + body


_HEADER_LINE = line(HEADER)


class _Lines:
    """Collects bytes and cuts them into lines; what follows the last line taken stays in `rest`."""

    def __init__(self) -> None:
        self.rest = bytearray()

    def greeting(self) -> bool:
        """Takes the header; False while it is not whole. WireError at the first byte that is not of it."""
        found = self.rest[: len(_HEADER_LINE)]
        if not _HEADER_LINE.startswith(found):
            raise WireError("the peer does not speak multistream-select 1.0")
        if len(found) < len(_HEADER_LINE):
            return False
        del self.rest[: len(_HEADER_LINE)]
        return True

    def next(self) -> str | None:
        """The next whole line, or None; raises WireError for one that is too long or no text."""
        size, start = read_varint(self.rest, 0)
        if size < 0:
            return None
        if not 0 < size <= limits.MULTISTREAM_LINE_BYTES_MAX:
            raise WireError(f"a multistream message has {size} bytes, at most {limits.MULTISTREAM_LINE_BYTES_MAX} fit")
        if len(self.rest) < start + size:
            return None
        body = bytes(self.rest[start : start + size])
        del self.rest[: start + size]
        if not body.endswith(b"\n"):
            raise WireError("a multistream message does not end with a newline")
        try:
            return body[:-1].decode()
        except UnicodeDecodeError as error:
            raise WireError("a multistream message is not text") from error


class Proposer:
    """The side that opens: proposes its protocols one after the other, the first together with the header."""

    def __init__(self, protocols: Sequence[str]) -> None:
        if not protocols:
            raise ValueError("nothing to propose")
        self.agreed = ""
        self._left = list(protocols)
        self._protocols = tuple(protocols)
        self._greeted = False
        self._lines = _Lines()

    def start(self) -> bytes:
        """The first flight."""
        return _HEADER_LINE + line(self._left[0])

    def receive(self, data: bytes) -> bytes:
        """Takes the answer and returns what to send next; `agreed` is set once there is an agreement.

        Raises WireError for what is not multistream, LinkError (`refused`) when every protocol was turned down.
        """
        self._lines.rest += data
        out = b""
        if not self._greeted:
            self._greeted = self._lines.greeting()
        while self._greeted and not self.agreed:
            text = self._lines.next()
            if text is None:
                break
            if text == self._left[0]:
                self.agreed = text
            elif text == REFUSAL:
                del self._left[0]
                if not self._left:
                    raise LinkError(f"the peer speaks none of {', '.join(self._protocols)}", refused=True)
                out += line(self._left[0])
            else:
                raise WireError("the peer answered a proposal with something else")
        return out

    @property
    def rest(self) -> bytes:
        """Bytes after the agreement: they belong to the protocol agreed on."""
        return bytes(self._lines.rest)


class Responder:
    """The side that was opened to: takes the first proposal it supports."""

    def __init__(self, protocols: Sequence[str]) -> None:
        self.agreed = ""
        self._protocols = protocols
        self._greeted = False
        self._asked = 0
        self._lines = _Lines()

    def receive(self, data: bytes) -> bytes:
        """Takes proposals and returns the answers; `agreed` is set once there is an agreement.

        Raises WireError for what is not multistream and for more proposals than anybody needs.
        """
        self._lines.rest += data
        out = b""
        if not self._greeted and self._lines.greeting():
            self._greeted = True
            out += _HEADER_LINE
        while self._greeted and not self.agreed:
            text = self._lines.next()
            if text is None:
                break
            self._asked += 1
            if self._asked > limits.MULTISTREAM_PROPOSALS_MAX:
                raise WireError("the peer proposes protocols without end")
            if text in self._protocols:
                self.agreed = text
                out += line(text)
            elif text == LISTING:
                out += _listing(self._protocols)
            else:
                out += line(REFUSAL)
        return out

    @property
    def rest(self) -> bytes:
        """Bytes after the agreement: they belong to the protocol agreed on."""
        return bytes(self._lines.rest)


def _listing(protocols: Sequence[str]) -> bytes:
    """The answer to `ls`: a message of messages."""
    body = b"".join(line(protocol) for protocol in protocols) + b"\n"
    return varint(len(body)) + body
