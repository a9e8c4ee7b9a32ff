"""The AI endpoint as the configuration names it: its address, what may go over plain HTTP, and where its token lies."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Final, NamedTuple

from clawnet import paths
from clawnet.errors import ConfigError, DataError

TOKEN_VARIABLE: Final = "CLAWNET_OPENCLAW_TOKEN"  # noqa: S105 (a name, not a token)
TOKEN_BYTES_MAX: Final = 4_096
URL_CHARS_MAX: Final = 512

_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?)"
    r"(?::(?P<port>\d{1,5}))?(?P<path>/[A-Za-z0-9._~%/-]*)?\Z"
)
_TOKEN = re.compile(r"[\x21-\x7e]+\Z")
_VERSIONED = re.compile(r"/v\d+\Z")
_LOOPBACK = re.compile(r"(localhost|127\.\d{1,3}\.\d{1,3}\.\d{1,3}|\[::1\])\Z", re.IGNORECASE)
_SECRET = re.compile(r"CLAWNET_(?:JOIN|\w*TOKEN|\w*(?:PASSPHRASE|PASSWORD|SECRET))\Z")
_CALLS = ("/chat/completions", "/completions", "/models")


class Address(NamedTuple):
    """An endpoint's URL in its parts; `path` has no slash at its end."""

    scheme: str
    host: str
    port: str
    path: str

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return f"{self.scheme}://{self.host}{':' + self.port if self.port else ''}"

    @property
    def loopback(self) -> bool:
        """Whether the endpoint is on this very machine."""
        return _LOOPBACK.match(self.host) is not None

    @property
    def bases(self) -> tuple[str, ...]:
        """What /chat/completions may have to be put behind, likeliest first: people write it with and without /v1."""
        whole = self.origin + self.path
        return (whole,) if _VERSIONED.search(self.path) else (whole + "/v1", whole)


def parse_address(text: str) -> Address:
    """An endpoint's address. Raises DataError for what is none, and for one that carries a user name or a query."""
    match = _URL.match(text) if len(text) <= URL_CHARS_MAX else None
    if match is None or int(match["port"] or 1) not in range(1, 65_536):
        raise DataError(f"{text[:80]!r} is no address of an AI endpoint")
    path = (match["path"] or "").rstrip("/")
    for call in _CALLS:
        path = path.removesuffix(call)
    return Address(match["scheme"], match["host"], match["port"] or "", path)


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment for a child process: no token, invite or passphrase of this node is in it."""
    return {name: value for name, value in environ.items() if _SECRET.match(name) is None}


def take_secrets(environ: MutableMapping[str, str]) -> dict[str, str]:
    """The whole environment as it was; what is secret in it is gone from `environ`, and so from every later child."""
    whole = dict(environ)
    for name in whole.keys() - without_secrets(whole).keys():
        del environ[name]
    return whole


def read_token(environ: Mapping[str, str], token_file: Path | None, *, check_permissions: bool = True) -> str:
    """The token that the endpoint asks for: the environment's, else the file's, else "".

    The file is held to what keys are held to. Raises ConfigError; no message shows any part of a token.
    """
    given = environ.get(TOKEN_VARIABLE, "").strip()
    where = TOKEN_VARIABLE
    if not given and token_file is not None:
        where = str(token_file)
        if check_permissions:
            paths.check_private(token_file, secret=True)
        try:
            with token_file.open("rb") as file:
                data = file.read(TOKEN_BYTES_MAX + 1)
        except OSError as error:
            raise ConfigError(
                f"openclaw.token_file: cannot read {token_file}: {error.strerror}",
                hint="write the token into it with mode 0600, or unset openclaw.token_file",
            ) from error
        given = data.decode("ascii", "replace").strip()
        if not given:
            raise ConfigError(f"openclaw.token_file: {token_file} is empty", hint="write the token into it, mode 0600")
    if given and (len(given) > TOKEN_BYTES_MAX or _TOKEN.match(given) is None):
        raise ConfigError(f"{where} holds no token: it must be one word of printable ASCII characters")
    return given


def token_trouble(address: Address, token: str) -> tuple[str, str]:
    """Why this token must not go to this address, and the remedy; two empty texts when it may."""
    if not token or address.scheme == "https" or address.loopback:
        return "", ""
    return (
        f"openclaw.api_endpoint: the token would cross the network unencrypted to {address.host}",
        "use an https:// address, or tunnel it (ssh -L) and name http://127.0.0.1:PORT",
    )
