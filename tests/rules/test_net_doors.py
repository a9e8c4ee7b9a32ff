"""The entrance of a transport, on a clock of numbers: how many at once and a minute, and who proves its address."""

from __future__ import annotations

from clawnet import limits
from clawnet.net.doors import FAILED, REFUSED, TOO_MANY, TOO_OFTEN, Doors


def watched() -> tuple[Doors, list[tuple[str, str, str]]]:
    doors, told = Doors(), []
    doors.tell = lambda what, place, reason: told.append((what, place, reason))
    return doors, told


def test_handshakes_at_once_are_bounded_by_address_and_in_all() -> None:
    doors, told = watched()
    most, share = limits.PENDING_HANDSHAKES_MAX, limits.PENDING_HANDSHAKES_PER_ADDRESS_MAX
    assert [doors.enter("192.0.2.1", 0.0) for _ in range(share + 1)] == [*[""] * share, TOO_MANY]
    assert [doors.enter("2001:db8::1", 0.0) for _ in range(share)] == [""] * share
    assert doors.pending == most
    assert doors.enter("192.0.2.2", 0.0) == TOO_MANY
    assert told == [(REFUSED, "192.0.2.1", TOO_MANY), (REFUSED, "192.0.2.2", TOO_MANY)]
    doors.leave("2001:db8::2")
    assert doors.enter("192.0.2.2", 0.0) == ""


def test_arrivals_a_minute_are_bounded_by_address_and_refused_ones_hold_no_place() -> None:
    doors, told = watched()
    for _ in range(limits.CONNECTIONS_PER_ADDRESS_PER_MINUTE):
        assert doors.enter("192.0.2.1", 0.0) == ""
        doors.leave("192.0.2.1")
    assert doors.enter("192.0.2.1", 0.0) == TOO_OFTEN
    assert doors.pending == 0 and told == [(REFUSED, "192.0.2.1", TOO_OFTEN)]
    assert doors.enter("192.0.2.2", 0.0) == ""
    assert doors.enter("192.0.2.1", 1.0) == ""


def test_who_only_writes_an_address_spends_nothing_of_its_owner() -> None:
    """With a spoofed source a crowd of first datagrams costs the true owner neither its arrivals nor all places."""
    doors, _ = watched()
    for _ in range(10 * limits.CONNECTIONS_PER_ADDRESS_PER_MINUTE):
        if not doors.is_strict("192.0.2.1", 0.0):
            assert doors.begin("192.0.2.1") == ""
    assert doors.pending == limits.PENDING_HANDSHAKES_MAX // 4
    assert doors.enter("192.0.2.1", 0.0) == ""


def test_an_address_that_came_too_often_has_to_be_proven_at_once() -> None:
    doors, _ = watched()
    assert not doors.is_strict("192.0.2.1", 0.0)
    while not doors.prove("192.0.2.1", 0.0):
        pass
    assert doors.is_strict("192.0.2.1", 0.0) and not doors.is_strict("192.0.2.2", 0.0)
    assert not doors.is_strict("192.0.2.1", 60.0)


def test_what_went_wrong_is_told_and_what_just_ended_is_not() -> None:
    doors, told = watched()
    for failed in ("", "the handshake took too long"):
        doors.enter("2001:db8::7", 0.0)
        doors.leave("2001:db8::7", failed)
    assert told == [(FAILED, "2001:db8::/64", "the handshake took too long")]
    assert doors.pending == 0
