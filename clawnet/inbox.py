"""What waits for the loop: the node's own stimuli and its local callers' in one line, each peer's in a lane of its own.

Everybody gets a turn whatever the others send: half of each is for what is local, when it needs it. The lanes share the
other half, before it, so that news of links comes before what is done with them. A peer's messages stay in order, with
the news of its link; a lane has a bound of its own, so that one that floods crowds out nobody but itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from clawnet import limits
from clawnet.wire import events as e


class Inbox:
    """Stimuli in the order in which the loop takes them. `me` is this node: what it tells itself is local."""

    def __init__(self, me: str) -> None:
        self.calls = 0
        """Local calls that wait."""
        self._me = me
        self._alone: deque[e.Stimulus] = deque()
        self._local: deque[e.Stimulus] = deque()
        self._lanes: dict[str, deque[e.Stimulus]] = {}
        self._foreign = 0

    def __len__(self) -> int:
        return len(self._alone) + len(self._local) + self._foreign

    def __iter__(self) -> Iterator[e.Stimulus]:
        yield from self._alone
        yield from self._local
        for lane in self._lanes.values():
            yield from lane

    def has_room(self, stimulus: e.Stimulus) -> bool:
        """False for a local call or a peer's message too many; timers, completions and news of links always fit."""
        kind = type(stimulus)
        if kind is e.RpcCall:
            return self.calls < limits.INBOX_MAX
        if kind is e.MessageIn and stimulus.peer != self._me:  # type: ignore[attr-defined]
            waiting = len(self._lanes.get(stimulus.peer, ()))  # type: ignore[attr-defined]
            # Several that flood together fill what all share; a turn's share of its own is left to everybody.
            full = self._foreign >= limits.INBOX_MAX and waiting >= limits.INBOX_SHARE
            return waiting < limits.INBOX_OF_PEER_MAX and not full
        return True

    def put(self, stimulus: e.Stimulus) -> None:
        """At the end of its line, whether or not there is room."""
        kind = type(stimulus)
        if kind in _OF_PEERS and stimulus.peer != self._me:  # type: ignore[attr-defined]
            peer: str = stimulus.peer  # type: ignore[attr-defined]
            lane = self._lanes.get(peer)
            if lane is None:
                lane = self._lanes[peer] = deque()
            lane.append(stimulus)
            self._foreign += 1
            return
        if kind is e.RpcCall:
            self.calls += 1
        self._local.append(stimulus)

    def put_alone(self, stimuli: Iterable[e.Stimulus]) -> None:
        """Before everything else, each in a turn of its own."""
        self._alone.extend(stimuli)

    def turn(self) -> Iterator[e.Stimulus]:
        """What the next turn takes, at most INBOX_TURN_MAX; what is not asked for stays."""
        if self._alone:
            yield self._alone.popleft()
            return
        if not self._foreign:
            yield from self._of_here(limits.INBOX_TURN_MAX)
            return
        left = limits.INBOX_TURN_MAX
        foreign = max(left // 2, left - len(self._local))
        while foreign and self._lanes:
            # Whoever had its share goes to the end of the dictionary: the lanes take turns, over the turns of the loop.
            peer = next(iter(self._lanes))
            lane = self._lanes[peer] = self._lanes.pop(peer)
            for _ in range(min(len(lane), foreign, limits.INBOX_SHARE)):
                self._foreign -= 1
                foreign -= 1
                left -= 1
                yield lane.popleft()
            if not lane:
                del self._lanes[peer]
        if self._local:
            yield from self._of_here(left)

    def _of_here(self, most: int) -> Iterator[e.Stimulus]:
        for _ in range(min(most, len(self._local))):
            stimulus = self._local.popleft()
            if type(stimulus) is e.RpcCall:
                self.calls -= 1
            yield stimulus


_OF_PEERS = frozenset((e.MessageIn, e.PeerUp, e.PeerDown))


def describe(stimulus: e.Stimulus | None) -> str:
    """The kind of a stimulus, never its content."""
    if stimulus is None:
        return "end of turn"
    if isinstance(stimulus, e.MessageIn):
        return f"MessageIn({type(stimulus.message).__name__} from {stimulus.peer})"
    if isinstance(stimulus, e.RpcCall):
        return f"RpcCall({stimulus.method})"
    if isinstance(stimulus, e.TimerFired):
        return f"TimerFired({stimulus.key[0]})"
    return type(stimulus).__name__
