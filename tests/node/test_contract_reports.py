"""What a requester hears of a result that did not pass, which it has not paid."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from clawnet.wire import events as e
from clawnet.wire import verdict as v
from tests.node.meshkit import Member, Mesh
from tests.node.outcomes import answer
from tests.node.trades import CREDIT, SELFLESS, laws, only, paid, shell

SECRET = b"the whole answer"


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    built.run(2 * 3_600)
    laws(built)


def says_all(member: Member, run: e.Run) -> e.TaskExited:
    """A run whose verifier writes what it judges to its stderr and fails."""
    report = v.encode_report([v.judged(0, "passed"), v.judged(1, "failed", SECRET.decode(), SECRET)])
    return msgspec.structs.replace(answer(member, run, SECRET, 3), report=report)


@pytest.mark.parametrize(("preview", "heard"), [("own", False), ("own, member", True)])
def test_whoever_may_not_see_output_unpaid_hears_none_of_it_from_a_verifier(
    mesh: Mesh, preview: str, heard: bool
) -> None:
    alice = mesh.found("alice", **SELFLESS)
    bob = mesh.join(alice, "bob", credits_ucr=100 * CREDIT, **{"market.preview": preview})
    mesh.link_all()
    mesh.run(2)
    bob.runner = says_all
    call = shell(alice, "x", accept=["exit:3", "exit:0"])
    mesh.run(5)
    task, report = alice.task(call), only(alice).attempts[0].report
    assert (task["state"], task["error"]["exit_code"]) == ("failed", 80)
    assert [one["outcome"] for one in task["acceptance"]] == ["passed", "failed"]
    assert (SECRET in report) is heard and (v.UNTOLD in task["error"]["message"]) is not heard
    assert not paid(mesh)
