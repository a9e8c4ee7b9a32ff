"""Who may begin a handshake here: bounds on those under way and on arrivals a minute, by address. Pure; time is given.

An address is an IPv4 address or the /64 network of an IPv6 one. What is turned away, or fails before it has proven a
key, is told to `tell(what, place, reason)`; the switch counts and logs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

from clawnet import limits
from clawnet.net.ratelimit import Arrivals, place_of

REFUSED: Final = "connections_refused"
FAILED: Final = "handshakes_failed"

TOO_MANY: Final = "too many handshakes at once"
TOO_OFTEN: Final = "too many connections from there in a minute"


class Doors:
    """The entrance of one transport. Every `enter` or `begin` that answered "" is followed by one `leave`."""

    def __init__(self) -> None:
        self.tell: Callable[[str, str, str], None] = lambda what, place, reason: None
        self._pending: Counter[str] = Counter()
        self._arrivals = Arrivals(limits.CONNECTIONS_PER_ADDRESS_PER_MINUTE)

    @property
    def pending(self) -> int:
        """Handshakes under way."""
        return self._pending.total()

    def enter(self, host: str, now_s: float) -> str:
        """A handshake from an address that is surely the sender's; why not, or ""."""
        return self._crowded(host) or self.prove(host, now_s) or self._enter(host)

    def begin(self, host: str) -> str:
        """A handshake from an address that anybody may have written there; `prove` follows when it is proven."""
        return self._crowded(host) or self._enter(host)

    def prove(self, host: str, now_s: float) -> str:
        """The address is the sender's: the arrival counts; why it is one too many, or ""."""
        place = place_of(host)
        if self._arrivals.take(place, now_s):
            return ""
        self.tell(REFUSED, place, TOO_OFTEN)
        return TOO_OFTEN

    def is_strict(self, host: str, now_s: float) -> bool:
        """Whether a newcomer has to prove its address before anything is kept of it."""
        return 4 * self.pending >= limits.PENDING_HANDSHAKES_MAX or self._arrivals.spent(place_of(host), now_s)

    def leave(self, host: str, failed: str = "") -> None:
        """A handshake is over; `failed` says what the other side did wrong, if it was that."""
        place = place_of(host)
        self._pending[place] -= 1
        if not self._pending[place]:
            del self._pending[place]
        if failed:
            self.tell(FAILED, place, failed)

    def _crowded(self, host: str) -> str:
        place = place_of(host)
        if (
            self.pending < limits.PENDING_HANDSHAKES_MAX
            and self._pending[place] < limits.PENDING_HANDSHAKES_PER_ADDRESS_MAX
        ):
            return ""
        self.tell(REFUSED, place, TOO_MANY)
        return TOO_MANY

    def _enter(self, host: str) -> str:
        self._pending[place_of(host)] += 1
        return ""
