"""All that is known of ended memberships and of the newest mesh key: a set that only grows, the same on every node.

Two nodes find out what the one lacks by a digest of BUCKETS words, each the exclusive or of the hashes of the
statements in its bucket.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from clawnet import limits
from clawnet.errors import NotPermittedError
from clawnet.identity.certificates import Charter
from clawnet.identity.revocations import MeshKey, Revocation, node_in, owners_in, read_statement, statement_hash

BUCKETS: Final = limits.MEMBERSHIP_BUCKETS
_WORD_BITS: Final = 63


class Learned(NamedTuple):
    """A statement that is new here, and the hashes of those that it makes needless."""

    hash: bytes
    body: Revocation | MeshKey
    needless: list[bytes]


class _Kept(NamedTuple):
    issued_ms: int
    hash: bytes
    body: Revocation


class Ends:
    """Revocations by the key they end, and the statements of the newest key epoch. Pure; the caller stores the rows."""

    def __init__(self, charter: Charter, mesh: bytes) -> None:
        self._charter = charter
        self._mesh = mesh
        self._of: dict[tuple[str, bytes], dict[bytes, _Kept]] = {}
        self._raw: dict[bytes, bytes] = {}
        self._buckets = [0] * BUCKETS
        self._revocations = 0
        self.epoch = 0
        self.key_statements: dict[bytes, MeshKey] = {}

    def __len__(self) -> int:
        return len(self._raw)

    # --- learning

    def learn(self, statement: bytes, now_ms: int | None) -> Learned | None:
        """Takes in a statement; None when it is known, or older than what is.

        Without `now_ms` its date is not judged: it was taken before, by a clock that may have been set back since.
        Raises NotPermittedError when it does not count, or when there is no room for it.
        """
        name = statement_hash(statement)
        if name in self._raw:
            return None
        body = read_statement(statement, self._charter, self._mesh)
        if now_ms is not None and body.issued_ms > now_ms + limits.CLOCK_AHEAD_MS:
            raise NotPermittedError("the membership statement is dated in the future")
        needless = self._mesh_key(name, body) if isinstance(body, MeshKey) else self._revocation(name, body)
        if needless is None:
            return None
        for old in needless:
            self._flip(old)
            del self._raw[old]
        self._raw[name] = statement
        self._flip(name)
        return Learned(name, body, needless)

    def _mesh_key(self, name: bytes, body: MeshKey) -> list[bytes] | None:
        if body.epoch < self.epoch:
            return None
        needless: list[bytes] = []
        if body.epoch > self.epoch:
            needless = list(self.key_statements)
            self.key_statements.clear()
            self.epoch = body.epoch
        elif len(self.key_statements) >= limits.MEMBERSHIP_STATEMENTS_MAX:
            raise NotPermittedError("there is no room for more shares of the mesh key")
        self.key_statements[name] = body
        return needless

    def _revocation(self, name: bytes, body: Revocation) -> list[bytes] | None:
        kept = _Kept(body.issued_ms, name, body)
        mine = self._of.setdefault((body.subject, body.key), {})
        known = mine.get(body.by)
        if known is not None:
            if known[:2] <= kept[:2]:
                return None
            mine[body.by] = kept
            return [known.hash]
        needless: list[bytes] = []
        if self._revocations >= limits.MEMBERSHIP_STATEMENTS_MAX:
            oldest = self._oldest()
            if oldest is None or (not self._for_good(body) and oldest[:2] > kept[:2]):
                if not mine:
                    del self._of[(body.subject, body.key)]
                raise NotPermittedError("there is no room for more ended memberships")
            self._forget(oldest)
            needless = [oldest.hash]
        mine = self._of.setdefault((body.subject, body.key), {})
        mine[body.by] = kept
        self._revocations += 1
        return needless

    def _oldest(self) -> _Kept | None:
        """The end that is forgotten first when there is no room."""
        ended = (kept for mine in self._of.values() for kept in mine.values() if not self._for_good(kept.body))
        return min(ended, key=lambda kept: kept[:2], default=None)

    def _for_good(self, body: Revocation) -> bool:
        """A removal by the founder, for which every other end makes room."""
        return body.by == self._charter.founder and body.cause == "removed"

    def _forget(self, kept: _Kept) -> None:
        key = (kept.body.subject, kept.body.key)
        del self._of[key][kept.body.by]
        if not self._of[key]:
            del self._of[key]
        self._revocations -= 1

    def _flip(self, name: bytes) -> None:
        self._buckets[name[-1] % BUCKETS] ^= int.from_bytes(name[:8], "big") >> (64 - _WORD_BITS)

    # --- asking

    def reason(self, chain: list[bytes]) -> str:
        """The cause for which the membership that this (verified) chain proves is over; "" while it is not."""
        if not self._of:
            return ""
        owners = owners_in(chain)
        node = node_in(chain)
        above = {self._charter.founder}
        for place, certificate in enumerate(owners):
            signers = above | {certificate.owner}
            for by, kept in self._of.get(("owner", certificate.owner), {}).items():
                stays = place + 1 < len(owners) and owners[place + 1].owner in kept.body.keeps
                if by in signers and not stays:
                    return kept.body.cause
            above = signers
        for by, kept in self._of.get(("node", node.node), {}).items():
            if by in above or by == node.node:
                return kept.body.cause
        return ""

    def ended(self, subject: str, key: bytes) -> bool:
        """Whether anybody ended this very key."""
        return (subject, key) in self._of

    def digest(self) -> list[int]:
        """What another node needs to find out which buckets differ; empty when there is nothing."""
        return list(self._buckets) if self._raw else []

    def agrees(self, digest: list[int]) -> bool:
        """Whether another node with this digest holds the same."""
        return digest == self.digest()

    def differing(self, digest: list[int]) -> list[bytes]:
        """The statements held here in the buckets that differ from another node's digest."""
        theirs = digest if len(digest) == BUCKETS else [0] * BUCKETS
        unlike = {place for place in range(BUCKETS) if theirs[place] != self._buckets[place]}
        return [raw for name, raw in self._raw.items() if name[-1] % BUCKETS in unlike] if unlike else []
