"""How much one peer may send by class of message, and what happens to one that sends more. Pure; the time is given.

Above its rate a class's messages are dropped and the peer is told once. When that goes on, its stream is not read for
a while, each time longer, so that it is the sender's own queue that fills. When it still goes on, the peer is banned.
Bytes are not dropped: what goes beyond their rate is read later.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from clawnet import limits
from clawnet.net.ratelimit import Patience, TokenBucket
from clawnet.wire.messages import Kind


class Verdict(IntEnum):
    """What becomes of one message. All but PASS drop it; TELL says so to the peer, BAN is the end."""

    PASS = 0
    DROP = 1
    TELL = 2
    BAN = 3


SESSION: Final = "session"
ANSWERS: Final = "answers"
MARKET: Final = "market"
LEDGER: Final = "ledger"
RELAY: Final = "relay"
OUTPUT: Final = "output"

CLASS_OF: Final[dict[int, str]] = {
    **dict.fromkeys(Kind, MARKET),
    **dict.fromkeys((Kind.PING, Kind.PONG, Kind.DISCONNECT, Kind.HELLO), SESSION),
    **dict.fromkeys((Kind.ACK, Kind.ERROR), ANSWERS),
    **dict.fromkeys((Kind.LEDGER_PULL, Kind.LEDGER_PUSH, Kind.LEDGER_COUNTERSIGN), LEDGER),
    **dict.fromkeys((Kind.PEER_INFO, Kind.MEMBERSHIP, Kind.MARKET_GOSSIP), RELAY),
    Kind.TASK_OUTPUT: OUTPUT,
}
"""The class of each kind; what has no kind at all counts as SESSION, the narrowest."""


def _per_second() -> dict[str, int]:
    return {
        SESSION: limits.RATE_SESSION_PER_S,
        ANSWERS: limits.RATE_ANSWERS_PER_S,
        MARKET: limits.RATE_MARKET_PER_S,
        LEDGER: limits.RATE_LEDGER_PER_S,
        RELAY: limits.RATE_RELAY_PER_S,
        OUTPUT: limits.RATE_OUTPUT_PER_S,
    }


class Rates:
    """What one link may still bring. `pause_s` is for how long its stream should not be read now; 0 to go on."""

    __slots__ = ("_bytes", "_next_pause_s", "_output", "_patience", "_rates", "pause_s")

    def __init__(self, now_s: float) -> None:
        self.pause_s = 0.0
        burst = limits.RATE_BURST_S
        self._rates = {name: TokenBucket(rate, burst * rate, now_s) for name, rate in _per_second().items()}
        self._bytes = TokenBucket(limits.RATE_BYTES_PER_S, burst * limits.RATE_BYTES_PER_S, now_s)
        self._output = TokenBucket(limits.RATE_OUTPUT_BYTES_PER_S, burst * limits.RATE_OUTPUT_BYTES_PER_S, now_s)
        self._patience = Patience()
        self._next_pause_s = limits.RATE_PAUSE_MIN_S

    def take(self, kind: int, size: int, now_s: float) -> Verdict:
        """One message of that kind and size, in bytes."""
        name = CLASS_OF.get(kind, SESSION)
        owed_s = (self._output if name is OUTPUT else self._bytes).owe(size, now_s)
        if owed_s > 0:
            self._hold(owed_s)
        if self._rates[name].take(1, now_s):
            return Verdict.PASS
        if self._patience.over(now_s):
            self._next_pause_s = limits.RATE_PAUSE_MIN_S
            return Verdict.TELL
        lasted_s = self._patience.lasted_s(now_s)
        if lasted_s > limits.RATE_SPELL_S and self._next_pause_s > limits.RATE_PAUSE_MAX_S:
            return Verdict.BAN
        if lasted_s > limits.RATE_DROP_S and not self.pause_s:
            self._hold(self._next_pause_s)
            self._next_pause_s *= 2
        return Verdict.DROP

    def _hold(self, seconds: float) -> None:
        self.pause_s = max(self.pause_s, min(seconds, limits.RATE_PAUSE_MAX_S))
