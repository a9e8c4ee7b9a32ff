"""What peers can do (their cards), who fits a task, and whom to ask. Pure; random picks are injected."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from itertools import islice
from typing import Final

import msgspec

from clawnet import limits
from clawnet.market.reasons import Reason
from clawnet.wire.messages import PeerCard, Requirements

Pick = Callable[[int], int]
"""pick(n) returns a random number from 0 to n - 1."""

CAPABILITY_OF_KIND: Final[dict[str, str]] = {
    "shell": "shell-execution",
    "shell_task": "shell-execution",
    "compute": "compute",
    "prompt": "ai-inference",
    "openclaw_prompt": "ai-inference",
    "storage": "storage",
    "swarm": "compute",
    "swarm_ai": "ai-inference",
}
SHELL: Final = "shell-execution"
AI: Final = "ai-inference"
_SYNONYMS: Final = {"shell": SHELL, "prompt": AI}


def _canonical(word: str) -> str:
    return _SYNONYMS.get(word, word)


@lru_cache(maxsize=256)
def _offered(words: tuple[str, ...]) -> dict[str, None]:
    """The capabilities of a card by their own names; most nodes of a mesh can do the same."""
    return dict.fromkeys(map(_canonical, words))


def capability_hash(card: PeerCard) -> bytes:
    """SHA-256 of what a card claims its node can do: 32 bytes that stay while load, addresses and serial change.

    A bid carries it, so that a requester sees whether the bidder's claims are those of the card it was chosen by.
    """
    return hashlib.sha256(msgspec.msgpack.encode(("clawnet/capability/1", *_claims(card)))).digest()


def _claims(card: PeerCard) -> tuple[object, ...]:
    """What a card says its node can do, whatever the order in which it says so."""
    return (
        sorted(card.capabilities),
        sorted(card.labels),
        card.os,
        card.cpu,
        card.memory_bytes,
        card.gpu,
        sorted(card.models),
        card.slots,
        sorted(card.shell_rings),
        sorted(card.prompt_rings),
    )


def unmet(kind: str, requirements: Requirements, card: PeerCard, ring: str) -> Reason | None:
    """The first thing that keeps the node of `card` from doing such a task for a requester of `ring`; None: it fits.

    The same rule serves the requester who chooses whom to ask and the worker who is asked. A kind needs its
    capability word (CAPABILITY_OF_KIND); a shell task, and one whose contract has a verifier command, also needs `ring`
    among the card's shell rings, a prompt among its prompt rings.
    """
    needed = CAPABILITY_OF_KIND.get(kind)
    offered = _offered(tuple(card.capabilities))
    if needed is None or needed not in offered:
        return Reason.NO_CAPABILITY
    if not all(_canonical(word) in offered for word in requirements.capabilities):
        return Reason.NO_CAPABILITY
    if SHELL in (needed, *map(_canonical, requirements.capabilities)) and ring not in card.shell_rings:
        return Reason.POLICY
    if needed == AI and ring not in card.prompt_rings:
        return Reason.POLICY
    if requirements.os and requirements.os != card.os:
        return Reason.OS
    if requirements.gpu > card.gpu:
        return Reason.NO_GPU
    if requirements.model and requirements.model not in card.models:
        return Reason.NO_MODEL
    if requirements.cpu > card.cpu:
        return Reason.CPU
    if requirements.memory_bytes > card.memory_bytes:
        return Reason.MEMORY
    if not all(label in card.labels for label in requirements.labels):
        return Reason.LABELS
    return None


class CapabilityIndex:
    """The newest card of every known peer, found by capability word. Bounded: the card heard longest ago goes first.

    Who fits a task depends on its requirements and ring alone until a card's claims change, so that list is kept
    (ELIGIBLE_CACHE_MAX of them); a card that only reports another load leaves the lists alone. Asking for candidates
    looks at CANDIDATE_POOL_MAX peers at most beyond the walk over the shorter of "fit" and "reachable", so its cost
    does not grow with the mesh.
    """

    def __init__(self, cards_max: int = limits.CAPABILITY_CARDS_MAX) -> None:
        self._cards_max = cards_max
        self._cards: dict[str, PeerCard] = {}
        self._rings: dict[str, str] = {}
        self._heard: dict[str, int] = {}
        self.heard_total = 0
        """How many cards were taken so far: a mark for heard_since."""
        self._hashes: dict[str, bytes] = {}
        self._by_word: dict[str, dict[str, None]] = {}
        self._fitting: dict[bytes, dict[str, None]] = {}

    def __len__(self) -> int:
        return len(self._cards)

    def put(self, card: PeerCard, ring: str) -> bool:
        """Takes a verified card of a peer in `ring`; False if a card at least as new is known (a new ring counts)."""
        known = self._cards.get(card.peer)
        if known is not None and known.serial >= card.serial:
            if self._rings[card.peer] != ring:
                self._rings[card.peer] = ring
                self._fitting.clear()
            return False
        if known is None or self._rings[card.peer] != ring or _claims(known) != _claims(card):
            self._fitting.clear()
            self._unlist(card.peer)
            self._hashes.pop(card.peer, None)
            by_word, peer = self._by_word, card.peer
            for word in _offered(tuple(card.capabilities)):
                peers = by_word.get(word)
                if peers is None:
                    peers = by_word[word] = {}
                peers[peer] = None
        self._cards.pop(card.peer, None)
        self._cards[card.peer] = card
        self.heard_total += 1
        self._heard[card.peer] = self.heard_total
        self._rings[card.peer] = ring
        if len(self._cards) > self._cards_max:
            self.remove(next(iter(self._cards)))
        return True

    def remove(self, peer: str) -> None:
        """Forgets a peer (removed from the mesh, banned, or no room)."""
        if peer in self._cards:
            self._unlist(peer)
            del self._heard[peer], self._cards[peer], self._rings[peer]
            self._hashes.pop(peer, None)
            self._fitting.clear()

    def _unlist(self, peer: str) -> None:
        card = self._cards.get(peer)
        for word in card.capabilities if card is not None else ():
            peers = self._by_word.get(_canonical(word))
            if peers is not None:
                peers.pop(peer, None)
                if not peers:
                    del self._by_word[_canonical(word)]

    def card(self, peer: str) -> PeerCard | None:
        """The newest card of a peer."""
        return self._cards.get(peer)

    def newest(self, count: int, since_ms: int) -> list[str]:
        """The `count` peers heard of last whose cards are not from before `since_ms`."""
        fresh = (peer for peer in reversed(self._cards) if self._cards[peer].serial >= since_ms)
        return list(islice(fresh, count))

    def heard_since(self, mark: int) -> list[tuple[str, int]]:
        """The peers heard of since the mark `mark`, longest ago first, each with the mark that follows it."""
        news = []
        for peer in reversed(self._cards):
            if self._heard[peer] <= mark:
                break
            news.append((peer, self._heard[peer]))
        return news[::-1]

    def stale(self, before_ms: int) -> list[str]:
        """Peers whose cards are from before this time."""
        return [peer for peer, card in self._cards.items() if card.serial < before_ms]

    def capability_hash(self, peer: str) -> bytes | None:
        """capability_hash of the newest card of a peer; made when it is first asked for."""
        found = self._hashes.get(peer)
        if found is None and peer in self._cards:
            found = self._hashes[peer] = capability_hash(self._cards[peer])
        return found

    def unmet(self, kind: str, requirements: Requirements, peer: str) -> Reason | None:
        """Why this peer does not fit (see `unmet`); OTHER for a peer without a card."""
        card = self._cards.get(peer)
        return Reason.OTHER if card is None else unmet(kind, requirements, card, self._rings[peer])

    def fitting(self, kind: str, requirements: Requirements, ring: str) -> Mapping[str, None]:
        """All peers of `ring` whose card meets the requirements, as a read-only ordered set."""
        key = msgspec.msgpack.encode((kind, ring, requirements))
        found = self._fitting.get(key)
        if found is None:
            words = [CAPABILITY_OF_KIND.get(kind, kind), *map(_canonical, requirements.capabilities)]
            shortest = min((self._by_word.get(word, {}) for word in words), key=len)
            found = {
                peer: None
                for peer in shortest
                if self._rings[peer] == ring and unmet(kind, requirements, self._cards[peer], ring) is None
            }
            if len(self._fitting) >= limits.ELIGIBLE_CACHE_MAX:
                del self._fitting[next(iter(self._fitting))]
            self._fitting[key] = found
        return found

    def eligible(
        self,
        kind: str,
        requirements: Requirements,
        ring: str,
        *,
        among: Mapping[str, object] | None = None,
        only: Iterable[str] = (),
        exclude: Iterable[str] = (),
        usable: Callable[[str], bool] | None = None,
    ) -> list[str]:
        """Peers of `ring` that may be asked, in a stable order.

        `among`: those an offer can reach (connected; None: all); `only`: when not empty nobody else is asked;
        `exclude`: never; `usable`: the caller's own objections (ban, minimum reputation).
        """
        fitting = self.fitting(kind, requirements, ring)
        named = dict.fromkeys(only)
        barred = frozenset(exclude)
        sets: list[Mapping[str, object]] = [fitting]
        if among is not None:
            sets.append(among)
        if named:
            sets.append(named)
        sets.sort(key=len)
        first, rest = sets[0], sets[1:]
        return [
            peer
            for peer in first
            if all(peer in other for other in rest) and peer not in barred and (usable is None or usable(peer))
        ]

    def candidates(
        self,
        kind: str,
        requirements: Requirements,
        ring: str,
        *,
        score_hint: Callable[[str], float],
        pick: Pick,
        among: Mapping[str, object] | None = None,
        only: Iterable[str] = (),
        exclude: Iterable[str] = (),
        usable: Callable[[str], bool] | None = None,
        count: int = limits.CANDIDATES_MAX,
        explore: int = limits.EXPLORE_CANDIDATES,
    ) -> list[str]:
        """At most `count` peers to ask: the best by `score_hint`, and `explore` of the others at random.

        With more than CANDIDATE_POOL_MAX eligible, a random sample of that size stands for them. Equal hints are
        drawn by lot, so newcomers are not always the same few. With `count` or fewer eligible, all are asked.
        """
        eligible = self.eligible(kind, requirements, ring, among=among, only=only, exclude=exclude, usable=usable)
        if len(eligible) <= count:
            return eligible
        pool = draw(eligible, min(len(eligible), limits.CANDIDATE_POOL_MAX), pick)
        explore = min(explore, count)
        best = heapq.nlargest(count - explore, pool, key=score_hint)
        taken = frozenset(best)
        others = [peer for peer in pool if peer not in taken]
        return [*best, *others[:explore]]


def draw(items: list[str], count: int, pick: Pick) -> list[str]:
    """`count` different items in random order (a partial Fisher-Yates shuffle that leaves `items` as it is)."""
    count = min(count, len(items))
    moved: dict[int, int] = {}
    drawn: list[str] = []
    for place in range(count):
        other = place + pick(len(items) - place)
        drawn.append(items[moved.get(other, other)])
        moved[other] = moved.get(place, place)
    return drawn
