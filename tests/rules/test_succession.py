"""Keys that follow each other: what proves it, what does not, and the ids that go with them."""

from __future__ import annotations

import pytest

from clawnet.errors import NotPermittedError
from clawnet.identity.keys import KeyPair, peer_id_of, verify
from clawnet.ledger.entries import Rotate, Send, build, possession_message
from clawnet.ledger.succession import recorded, succession
from clawnet.mesh.ids import PeerIds

MESH = bytes(range(32))
KEYS = [KeyPair.from_seed(bytes([number]) * 32) for number in range(1, 5)]
FIRST, SECOND, THIRD, OTHER = KEYS


def rotation(
    old: KeyPair, new: KeyPair, seq: int, *, account: KeyPair = FIRST, possessed_by: KeyPair | None = None
) -> bytes:
    """A rotate entry, with whatever is to be wrong with it."""
    prev = bytes([seq]) * 32
    proof = (possessed_by or new).sign(possession_message(account.public, seq, prev))
    return build(MESH, account.public, seq, prev, 1_000, Rotate(new.public, proof), old.sign).raw


ONE, TWO = rotation(FIRST, SECOND, 5), rotation(SECOND, THIRD, 9)


def test_each_key_leads_to_the_next() -> None:
    publics = [key.public for key in (FIRST, SECOND, THIRD)]
    assert succession([], OTHER.public, MESH, verify) == [OTHER.public], "who never changed its key is its account"
    assert succession([ONE], SECOND.public, MESH, verify) == publics[:2]
    assert succession([ONE, TWO], THIRD.public, MESH, verify) == publics
    assert recorded([ONE, TWO]) == publics and recorded([]) == []


@pytest.mark.parametrize(
    ("rotations", "present"),
    [
        ([ONE], THIRD),
        ([ONE, TWO], SECOND),
        ([ONE], FIRST),
        ([TWO], THIRD),
        ([TWO, ONE], SECOND),
        ([rotation(OTHER, SECOND, 5)], SECOND),
        ([rotation(FIRST, SECOND, 5, possessed_by=OTHER)], SECOND),
        ([ONE, rotation(FIRST, THIRD, 9)], THIRD),
        ([ONE, rotation(SECOND, THIRD, 9, account=OTHER)], THIRD),
        ([ONE, rotation(SECOND, FIRST, 9)], FIRST),
        ([build(MESH, FIRST.public, 5, bytes(32), 1, Send(OTHER.public, 1, bytes(32)), FIRST.sign).raw], FIRST),
        ([ONE[:-1] + b"x"], SECOND),
        ([b"x" * 100], SECOND),
    ],
)
def test_what_does_not_lead_to_the_key_of_the_connection_proves_nothing(
    rotations: list[bytes], present: KeyPair
) -> None:
    with pytest.raises(NotPermittedError):
        succession(rotations, present.public, MESH, verify)


def test_entries_of_another_mesh_prove_nothing() -> None:
    with pytest.raises(NotPermittedError):
        succession([ONE], SECOND.public, bytes(32), verify)


def test_ids_are_told_both_ways() -> None:
    ids, (a, b, c, other) = PeerIds(), [peer_id_of(key.public) for key in KEYS]
    assert not ids and ids.inner(a) == ids.outer(a) == a
    ids.learn([a, b])
    ids.learn([a, b, c])
    assert ids
    assert [ids.inner(peer) for peer in (a, b, c, other)] == [a, a, a, other]
    assert [ids.outer(peer) for peer in (a, b, c, other)] == [c, c, c, other]
    assert [ids.given_up(peer) for peer in (a, b, c, other)] == [True, True, False, False]
    ids.forget(a)
    assert not ids and ids.outer(b) == b
