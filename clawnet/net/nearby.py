"""Who announces itself on the local network: what the records say, how long they hold, and when to ask again.

Anybody on the network can say anything here. So the table is bounded, strangers make room for members of the same mesh
and never the other way round, and news above a rate waits for the next look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from msgspec import Struct

from clawnet import limits
from clawnet.net.dnsaddr import Announced, read_txt
from clawnet.net.ratelimit import TokenBucket
from clawnet.wire.events import NeighbourGone, NeighbourSeen, Stimulus

Told = tuple[tuple[str, ...], bytes]


class Entry(Struct):
    """One service instance. Asked again at `ask_s`, forgotten at `until_s`."""

    raw: bytes
    said: Announced
    ours: bool
    until_s: float
    ask_s: float


class Nearby:
    """The instances heard of by name, and what was told of each peer. Times are seconds of one monotonic clock."""

    def __init__(
        self,
        me: Callable[[], str],
        deliver: Callable[[Stimulus], None],
        is_ours: Callable[[str, bytes], bool],
        now_s: float,
    ) -> None:
        self._me = me
        self._deliver = deliver
        self._is_ours = is_ours
        self._entries: dict[str, Entry] = {}
        self._told: dict[str, Told] = {}
        self._late: dict[str, None] = {}
        self._bucket = TokenBucket(limits.NEIGHBOUR_NEWS_PER_S, 8 * limits.NEIGHBOUR_NEWS_PER_S, now_s)

    def __len__(self) -> int:
        return len(self._told)

    def heard(self, name: str, raw: bytes, ttl_s: float, now_s: float) -> None:
        """A TXT record of this instance arrived."""
        known = self._entries.get(name)
        until_s = now_s + min(ttl_s, limits.NEIGHBOUR_TTL_S_MAX)
        ask_s = now_s + 0.8 * (until_s - now_s)
        if known is not None and known.raw == raw:
            known.until_s, known.ask_s = until_s, ask_s
            return
        said = read_txt(raw)
        if said is None or said.peer == self._me():
            self.gone(name, None, now_s)
            return
        ours = self._is_ours(said.peer, said.tag)
        if known is None and not self._make_room(said.peer, ours, now_s):
            return
        self._entries.pop(name, None)
        self._entries[name] = Entry(raw, said, ours, until_s, ask_s)
        if known is not None and known.said.peer != said.peer:
            self._tell(known.said.peer, now_s)
        self._tell(said.peer, now_s)

    def gone(self, name: str, raw: bytes | None, now_s: float) -> None:
        """The instance said goodbye, or that record of it ran out; an older record than the present one is no news."""
        known = self._entries.get(name)
        if known is not None and (raw is None or known.raw == raw):
            del self._entries[name]
            self._tell(known.said.peer, now_s)

    def look(self, now_s: float) -> list[str]:
        """Tells what had to wait and forgets what ran out; returns the instances to ask again."""
        for name in [name for name, entry in self._entries.items() if entry.until_s <= now_s]:
            self.gone(name, None, now_s)
        late, self._late = self._late, {}
        for peer in late:
            self._tell(peer, now_s)
        due = [name for name, entry in self._entries.items() if entry.ask_s <= now_s]
        for name in due:
            self._entries[name].ask_s = now_s + limits.NEIGHBOUR_ASK_S
        return due

    def doubt(self, peer: str | None, now_s: float) -> list[str]:
        """The link to `peer` broke, or (None) this machine slept or moved: who does not answer soon is gone.

        Returns the instances to ask (RFC 6762, section 10.4).
        """
        names = [name for name, entry in self._entries.items() if peer in (None, entry.said.peer)]
        for name in names:
            entry = self._entries[name]
            entry.until_s, entry.ask_s = now_s + limits.NEIGHBOUR_DOUBT_S, now_s + limits.NEIGHBOUR_ASK_S
        return names

    def tell_again(self) -> None:
        """A node was built again and knows none of this; whose mesh they are of may be another one as well."""
        for entry in self._entries.values():
            entry.ours = self._is_ours(entry.said.peer, entry.said.tag)
        self._told.clear()
        for peer in dict.fromkeys(entry.said.peer for entry in self._entries.values()):
            self._say(peer)

    def clear(self) -> None:
        """Nobody is heard any longer."""
        self._entries.clear()
        for peer in list(self._told):
            self._say(peer)

    # --- what the node is told

    def _tell(self, peer: str, now_s: float) -> None:
        if self._bucket.take(1, now_s):
            self._say(peer)
        else:
            self._late[peer] = None

    def _say(self, peer: str) -> None:
        """Where all its instances say it is, as far as this has changed. What has our tag silences what has not."""
        said = [entry.said for entry in self._of(peer)]
        before = self._told.pop(peer, None)
        if not said:
            if before is not None:
                self._deliver(NeighbourGone(peer))
            return
        addresses = tuple(dict.fromkeys(text for one in said for text in one.addresses))
        now = (addresses[: limits.NEIGHBOUR_ADDRESSES_MAX], said[0].tag)
        self._told[peer] = now
        if now != before:
            self._deliver(NeighbourSeen(peer, *now))

    def _of(self, peer: str) -> list[Entry]:
        """Newest first."""
        found = [entry for entry in self._entries.values() if entry.said.peer == peer]
        ours = any(entry.ours for entry in found)
        return [entry for entry in reversed(found) if entry.ours == ours]

    # --- bounds

    def _make_room(self, peer: str, ours: bool, now_s: float) -> bool:
        """Whether one more instance is taken in; the oldest that matters less gives way."""
        same = [name for name, entry in self._entries.items() if entry.said.peer == peer and entry.ours == ours]
        if len(same) >= limits.NEIGHBOUR_INSTANCES_MAX:
            del self._entries[same[0]]
        elif len(self._entries) >= limits.NEIGHBOURS_MAX:
            if not ours:
                return False
            stranger = next(self._strangers(), None)
            if stranger is None:
                return False
            self.gone(stranger, None, now_s)
        return True

    def _strangers(self) -> Iterator[str]:
        return (name for name, entry in self._entries.items() if not entry.ours)
