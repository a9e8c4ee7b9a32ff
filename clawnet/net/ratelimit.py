"""Who may send how much: token buckets, and bans that grow with every repetition. Pure; the time is an argument."""

from __future__ import annotations

import ipaddress

from clawnet import limits


class TokenBucket:
    """Lets `rate` units a second pass, and after a pause `depth` at once. Times are seconds of one monotonic clock."""

    __slots__ = ("_depth", "_rate", "_then_s", "_tokens")

    def __init__(self, rate: float, depth: float, now_s: float) -> None:
        self._rate = rate
        self._depth = depth
        self._tokens = depth
        self._then_s = now_s

    def take(self, units: float, now_s: float) -> bool:
        """Whether that much may pass now; what may not takes nothing."""
        if now_s > self._then_s:
            self._tokens = min(self._depth, self._tokens + (now_s - self._then_s) * self._rate)
            self._then_s = now_s
        if units > self._tokens:
            return False
        self._tokens -= units
        return True

    def left(self, now_s: float) -> float:
        """How much may pass now."""
        return min(self._depth, self._tokens + max(0.0, now_s - self._then_s) * self._rate)

    def owe(self, units: float, now_s: float) -> float:
        """Lets that much pass in any case; after how many seconds it would have been within the rate, 0 if it is."""
        if now_s > self._then_s:
            self._tokens = min(self._depth, self._tokens + (now_s - self._then_s) * self._rate)
            self._then_s = now_s
        self._tokens -= units
        return max(0.0, -self._tokens / self._rate)


class Patience:
    """How long one peer has been over its limit without a break."""

    __slots__ = ("_last_s", "_since_s")

    def __init__(self) -> None:
        self._since_s: float | None = None
        self._last_s = 0.0

    def over(self, now_s: float) -> bool:
        """One more message over the limit. True when it is the first of a spell (the peer is told once a spell)."""
        fresh = self._since_s is None or now_s - self._last_s > limits.RATE_SPELL_S
        if fresh:
            self._since_s = now_s
        self._last_s = now_s
        return fresh

    def lasted_s(self, now_s: float) -> float:
        """How long the present spell is going on; 0 when there is none."""
        return now_s - self._since_s if self._since_s is not None else 0.0


class Bans:
    """Timed refusals by peer: the first is short, each further one doubles, and good conduct makes it forgotten."""

    def __init__(self) -> None:
        self._bans: dict[str, tuple[float, float]] = {}

    def ban(self, peer: str, now_s: float) -> float:
        """Refuses `peer` from now on; returns for how many seconds."""
        until_s, length_s = self._bans.pop(peer, (0.0, 0.0))
        forgotten = now_s > until_s + limits.BAN_MAX_S
        length_s = limits.BAN_MIN_S if forgotten or not length_s else min(2 * length_s, limits.BAN_MAX_S)
        while len(self._bans) >= limits.BANS_MAX:
            del self._bans[next(iter(self._bans))]
        self._bans[peer] = (now_s + length_s, length_s)
        return length_s

    def left_s(self, peer: str, now_s: float) -> float:
        """For how many seconds `peer` is still refused; 0 when it is welcome."""
        ban = self._bans.get(peer)
        return max(0.0, ban[0] - now_s) if ban else 0.0

    def lift(self, peer: str) -> None:
        """Forgets all about `peer`."""
        self._bans.pop(peer, None)


def place_of(host: str) -> str:
    """What counts as one address in a limit: an IPv4 address, or the /64 network of an IPv6 one."""
    if ":" not in host:
        return host
    try:
        address = ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError:
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))


class Arrivals:
    """Counts arrivals by address over the last minute; nobody gets more than `per_minute`, and the table is bounded."""

    def __init__(self, per_minute: int = limits.PENDING_JOINS_PER_ADDRESS_PER_MINUTE) -> None:
        self._per_minute = per_minute
        self._buckets: dict[str, tuple[TokenBucket, float]] = {}

    def take(self, address: str, now_s: float) -> bool:
        """Whether one more from this address is let in."""
        bucket = self._buckets.pop(address, None)
        if bucket is None:
            self._forget(now_s)
            if len(self._buckets) >= limits.ARRIVAL_ADDRESSES_MAX:
                return False
            bucket = (TokenBucket(self._per_minute / 60, self._per_minute, now_s), now_s)
        self._buckets[address] = (bucket[0], now_s)
        return bucket[0].take(1, now_s)

    def spent(self, address: str, now_s: float) -> bool:
        """Whether one more from there would not be let in; takes nothing."""
        bucket = self._buckets.get(address)
        return bucket is not None and bucket[0].left(now_s) < 1

    def _forget(self, now_s: float) -> None:
        while self._buckets:
            address = next(iter(self._buckets))
            if now_s - self._buckets[address][1] <= 60:
                return
            del self._buckets[address]
