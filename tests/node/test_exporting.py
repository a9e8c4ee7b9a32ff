"""`wallet.export` page by page: a long chain comes whole and in order, and its bytes are those that were signed."""

from __future__ import annotations

import base64

import pytest

from clawnet import limits
from clawnet.ledger.entries import parse
from tests.node.meshkit import Mesh
from tests.node.trades import compute, pair


def test_pages_make_up_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "EXPORT_PAGE_BYTES", 700)
    mesh = Mesh()
    alice, bob = pair(mesh)
    for _ in range(3):
        compute(alice)
        mesh.run(5)
    following, lines, pages = 0, [], 0
    while following is not None:
        call = alice.call("wallet.export", **{"from": following})
        mesh.settle()
        page = alice.replies[call]
        lines += page["items"]
        following, pages = page["next"], pages + 1
    assert pages > 3
    assert [line["seq"] for line in lines] == list(range(page["last"] + 1))
    own = alice.node.rooms.books.book.head(alice.key.public)
    assert own is not None
    assert (lines[-1]["seq"], lines[-1]["hash"]) == (own[0], own[1].hex())
    for line in lines:
        entry = parse(base64.b64decode(line["raw_b64"]))
        assert (entry.seq, entry.hash.hex(), entry.account) == (line["seq"], line["hash"], alice.key.public)
    # Another's chain has no balances here; nonsense is refused by name.
    call = alice.call("wallet.export", account=bob.key.public.hex(), to=1)
    odd = alice.call("wallet.export", account="bob")
    mesh.settle()
    assert [(line["chain"], line["balance"]) for line in alice.replies[call]["items"]] == [("income", None)] * 2
    assert "no account" in alice.replies[odd]["message"]
