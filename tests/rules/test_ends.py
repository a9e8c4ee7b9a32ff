"""Ended memberships as a set: what is kept without room, how two nodes find what the one lacks, and nonsense."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet import limits
from clawnet.errors import NotPermittedError
from clawnet.identity.certificates import Charter, certify_owner, read_charter
from clawnet.identity.keys import KeyPair
from clawnet.identity.membership import found_mesh
from clawnet.identity.revocations import Revocation, read_statement, sign_revocation
from clawnet.mesh.ends import Ends

NOW_MS = 1_800_000_000_000


def pair(number: int) -> KeyPair:
    return KeyPair.from_seed(number.to_bytes(32, "big"))


FOUNDER = pair(1)
LOCAL = found_mesh(FOUNDER, pair(2).public, "alice", lambda count: bytes(count), NOW_MS)
CHARTER, MESH = read_charter(LOCAL.charter)


def removal(number: int, at_ms: int = NOW_MS) -> bytes:
    """The founder removes an owner."""
    return sign_revocation(Revocation(MESH, FOUNDER.public, "owner", pair(number).public, at_ms, "removed"), FOUNDER)


def leave(number: int, at_ms: int = NOW_MS) -> bytes:
    """An owner leaves by itself."""
    key = pair(number)
    paper = certify_owner(FOUNDER, MESH, key.public, may_invite=False, issued_ms=NOW_MS, inviter="")
    return sign_revocation(Revocation(MESH, key.public, "owner", key.public, at_ms, "left", (), (paper,)), key)


def ends() -> Ends:
    return Ends(CHARTER, MESH)


def test_two_sets_become_one_by_their_digests_in_any_order() -> None:
    statements = [removal(number) for number in range(10, 40)] + [leave(number) for number in range(40, 60)]
    one, other = ends(), ends()
    random.Random(1).shuffle(statements)
    for statement in statements[:35]:
        one.learn(statement, NOW_MS)
    for statement in statements[20:][::-1]:
        other.learn(statement, NOW_MS)
    assert one.digest() != other.digest()
    for left, right in ((one, other), (other, one)):
        for statement in left.differing(right.digest()):
            right.learn(statement, NOW_MS)
    assert one.digest() == other.digest()
    assert one.differing(other.digest()) == []
    assert len(one) == len(other) == 50
    assert len(one.differing([])) == len(one.differing([1])) == 50, "who holds nothing gets all"


def test_of_two_by_the_same_key_about_the_same_one_the_earlier_stays_whichever_came_first() -> None:
    early, late = removal(10, NOW_MS), removal(10, NOW_MS + 1)
    one, other = ends(), ends()
    assert one.learn(early, NOW_MS) is not None
    assert one.learn(late, NOW_MS) is None
    assert other.learn(late, NOW_MS) is not None
    learned = other.learn(early, NOW_MS)
    assert learned is not None and len(learned.needless) == 1
    assert one.digest() == other.digest()


def test_without_room_the_oldest_leave_is_forgotten_and_never_a_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MEMBERSHIP_STATEMENTS_MAX", 4)
    held = ends()
    for statement in (removal(10), leave(20, NOW_MS - 2), leave(21, NOW_MS - 1), removal(11)):
        assert held.learn(statement, NOW_MS) is not None
    learned = held.learn(leave(22), NOW_MS)
    assert learned is not None and len(learned.needless) == 1
    assert not held.ended("owner", pair(20).public)
    with pytest.raises(NotPermittedError, match="no room"):
        held.learn(leave(20, NOW_MS - 2), NOW_MS)
    assert held.learn(removal(12), NOW_MS) is not None
    assert held.learn(removal(13), NOW_MS) is not None
    with pytest.raises(NotPermittedError, match="no room"):
        held.learn(removal(14), NOW_MS)
    assert len(held) == 4
    assert all(held.ended("owner", pair(number).public) for number in (10, 11, 12, 13))


@given(st.binary(max_size=600))
def test_nonsense_is_no_statement(data: bytes) -> None:
    with pytest.raises(NotPermittedError):
        read_statement(data, CHARTER, MESH)


@given(st.data())
def test_a_statement_with_any_byte_changed_ends_nobody(data: st.DataObject) -> None:
    true = data.draw(st.sampled_from([removal(10), leave(20)]))
    place = data.draw(st.integers(0, len(true) - 1))
    bent = bytearray(true)
    bent[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(NotPermittedError):
        read_statement(bytes(bent), CHARTER, MESH)


def test_another_meshs_founder_ends_nobody_here() -> None:
    other = pair(99)
    charter: Charter = read_charter(
        found_mesh(other, pair(98).public, "x", lambda count: bytes(count), NOW_MS).charter
    )[0]
    assert charter.founder == other.public
    body = Revocation(MESH, other.public, "owner", pair(10).public, NOW_MS, "removed")
    with pytest.raises(NotPermittedError, match="lacks the certificates"):
        read_statement(sign_revocation(body, other), CHARTER, MESH)
