"""Keys that had a life elsewhere: an imported identity writes nothing before it has its chain back."""

from __future__ import annotations

import msgspec

from clawnet.storage.memory import MemoryStore
from tests.node.meshkit import Mesh


def test_an_imported_identity_waits_for_its_chain_and_goes_on_with_it() -> None:
    mesh = Mesh()
    alice = mesh.found("alice")
    bob = mesh.join(alice, "bob", credits_ucr=50_000_000)
    mesh.link_all()
    mesh.run(2)
    alice.node.rooms.books.send(bob.key.public, 1_000_000, bytes(32))
    alice.perform(alice.node.end_turn(mesh.now_ms))
    mesh.run(2)
    head = bob.node.rooms.books.book.head(bob.key.public)
    mesh.cut(alice, bob)
    mesh.settle()

    bob.local = msgspec.structs.replace(bob.local, imported=True)
    bob.store = MemoryStore()
    bob.boot()
    mesh.run(15)
    assert bob.node.rooms.books.book.head(bob.key.public) is None
    assert "imported" in bob.node.rooms.books.purse.read_only_reason

    mesh.link(alice, bob)
    mesh.run(15)
    assert bob.node.rooms.books.purse.read_only_reason == ""
    assert bob.node.rooms.books.book.head(bob.key.public) == head
    assert not alice.node.rooms.books.convicted(bob.key.public)
    call = bob.call("wallet.send", peer="alice", amount="2")
    mesh.run(5)
    assert bob.replies[call]["amount"] == "2"
    assert not alice.node.rooms.books.convicted(bob.key.public)
    mesh.check()
