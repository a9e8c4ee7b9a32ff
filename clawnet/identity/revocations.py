"""The ends of memberships, and the mesh's keys after them: statements that MEMBERSHIP carries. Formats are final.

A revocation counts when its signer stands above the key that it ends: the founder above everybody, an owner above those
it certified and above its own machines, and each key above itself. Who is not the founder proves its place by the
certificates in `chain`, so that anybody can judge a revocation of somebody it never met. An end is for good: whoever is
to come back comes with fresh keys. So the order in which revocations arrive does not matter.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Final

from msgspec import Meta, Struct

from clawnet import limits
from clawnet.errors import NotPermittedError
from clawnet.identity.certificates import Charter, NodeCertificate, OwnerCertificate, verify_chain, verify_owners
from clawnet.identity.keys import KeyPair, verify
from clawnet.identity.statements import Statement, decode_body, open_statement, sign_statement

REVOCATION_TAG: Final = b"clawnet/revocation/1"
MESH_KEY_TAG: Final = b"clawnet/mesh-key/1"
KEEPS_MAX: Final = 64
SEALED_KEY_BYTES: Final = 80
WORDS: Final = {
    "removed": "removed from the mesh by its founder",
    "lease": "its throw-away membership ended: not seen for too long",
    "left": "it left the mesh",
}
"""Causes of an end, as a person reads them."""

_Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
_U63 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Certificate = Annotated[bytes, Meta(max_length=limits.KIB)]


class Revocation(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="revocation"):
    """`by` ends `key`: one machine ("node"), or an owner with all its machines ("owner").

    `keeps` are the owners that a removed owner had invited and that stay; whoever else it certified, before or after,
    is out with it. `chain` are certificates from the founder to `key`; empty when the founder signs.
    """

    mesh: _Bytes32
    by: _Bytes32
    subject: Annotated[str, Meta(pattern="^(node|owner)$")]
    key: _Bytes32
    issued_ms: _U63
    cause: Annotated[str, Meta(pattern="^(removed|lease|left)$")]
    keeps: Annotated[tuple[_Bytes32, ...], Meta(max_length=KEEPS_MAX)] = ()
    chain: Annotated[tuple[_Certificate, ...], Meta(max_length=3)] = ()


class KeyShare(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The mesh key for one node: a libsodium sealed box to the X25519 form of its node key."""

    node: _Bytes32
    sealed: Annotated[bytes, Meta(min_length=SEALED_KEY_BYTES, max_length=SEALED_KEY_BYTES)]


class MeshKey(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="mesh-key"):
    """The mesh key number `epoch` (that of the mesh's beginning is 0), signed by the founder, for some of the members.

    `previous` holds the keys before it, newest first, in a libsodium secretbox under the new one (nonce in front).
    """

    mesh: _Bytes32
    epoch: Annotated[int, Meta(ge=1, le=2**31)]
    issued_ms: _U63
    previous: Annotated[bytes, Meta(max_length=64 + 32 * limits.MESH_KEYS_KEPT)]
    shares: Annotated[tuple[KeyShare, ...], Meta(max_length=limits.MESH_KEY_SHARES_MAX)]


Body = Revocation | MeshKey


def sign_revocation(revocation: Revocation, key: KeyPair) -> bytes:
    """The statement of a revocation by the key it names."""
    assert revocation.by == key.public
    return sign_statement(REVOCATION_TAG, revocation, key)


def sign_mesh_key(body: MeshKey, founder: KeyPair) -> bytes:
    """The statement of a mesh key."""
    return sign_statement(MESH_KEY_TAG, body, founder)


def statement_hash(statement: bytes) -> bytes:
    """How a statement is named: SHA-256 of its bytes."""
    return hashlib.sha256(statement).digest()


def read_statement(statement: bytes, charter: Charter, mesh: bytes) -> Body:
    """A revocation or mesh key that counts in this mesh. Raises NotPermittedError with the reason."""
    parts = open_statement(statement, "membership statement")
    body: Body = decode_body(parts.payload, Body, "membership statement")  # type: ignore[arg-type]
    if body.mesh != mesh:
        raise NotPermittedError("the membership statement is of another mesh")
    if isinstance(body, MeshKey):
        if not verify(charter.founder, MESH_KEY_TAG + parts.payload, parts.signature):
            raise NotPermittedError("the mesh key is not signed by the founder")
        return body
    _check_revocation(body, parts, charter)
    return body


def _check_revocation(body: Revocation, parts: Statement, charter: Charter) -> None:
    if not verify(body.by, REVOCATION_TAG + parts.payload, parts.signature):
        raise NotPermittedError("the revocation is not signed by the key it names")
    if body.key == charter.founder:
        raise NotPermittedError("a mesh cannot lose its founder")
    if body.by == charter.founder:
        return
    if body.by not in _above(body, charter):
        raise NotPermittedError("the revocation is signed by a key that does not stand above the one it ends")


def _above(body: Revocation, charter: Charter) -> list[bytes]:
    """Who besides the founder may end the key, by the certificates that come with the revocation."""
    chain = list(body.chain)
    if body.subject == "node":
        verify_chain(charter, body.mesh, chain, body.key)
        owners = verify_owners(charter, body.mesh, chain[:-1])
        return [body.key, *(certificate.owner for certificate in owners)]
    owners = verify_owners(charter, body.mesh, chain)
    if not owners or owners[-1].owner != body.key:
        raise NotPermittedError("the revocation lacks the certificates of the owner that it ends")
    return [body.key, *(certificate.issuer for certificate in owners)]


def owners_in(chain: list[bytes]) -> list[OwnerCertificate]:
    """The owner certificates of a chain that was verified before."""
    return [
        decode_body(open_statement(statement, "owner certificate").payload, OwnerCertificate, "owner certificate")
        for statement in chain[:-1]
    ]


def node_in(chain: list[bytes]) -> NodeCertificate:
    """The node certificate of a chain that was verified before."""
    return decode_body(open_statement(chain[-1], "node certificate").payload, NodeCertificate, "node certificate")
