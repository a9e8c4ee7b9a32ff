"""The charter of a mesh and the certificates that make a node a member of it. Formats are final.

Every statement is MessagePack of [payload bytes, signature]; the signature covers a domain tag and the payload bytes as
they are, so nothing is ever re-encoded. The trust runs founder's owner key -> (a member's owner key) -> an owner key ->
that owner's node keys. A charter's payload, hashed, is the mesh id.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Annotated, Final, NamedTuple

from msgspec import Meta, Struct

from clawnet import limits
from clawnet.errors import NotPermittedError
from clawnet.identity.keys import KeyPair, verify
from clawnet.identity.statements import decode_body, open_statement, sign_statement

CHAIN_OWNERS_MAX: Final = 2
CHARTER_TAG: Final = b"clawnet/charter/1"
OWNER_TAG: Final = b"clawnet/owner-certificate/1"
NODE_TAG: Final = b"clawnet/node-certificate/1"

GRANT_MAX_UCR: Final = 10**10
ISSUE_TOTAL_MAX_UCR: Final = 10**18

_Bytes16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
_Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
_Bytes64 = Annotated[bytes, Meta(min_length=64, max_length=64)]
_U63 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Name = Annotated[str, Meta(max_length=limits.NAME_CHARS_MAX)]
_PeerId = Annotated[str, Meta(max_length=128)]


class Charter(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the founder fixed for good. `founder` is an owner key, `issuers` are accounts (first node keys)."""

    v: Annotated[int, Meta(ge=1, le=1)]
    name: _Name
    founder: _Bytes32
    issuers: Annotated[tuple[_Bytes32, ...], Meta(min_length=1, max_length=16)]
    mode: Annotated[str, Meta(pattern="^(private|open)$")]
    created_ms: _U63
    random: _Bytes16
    grant_max_ucr: Annotated[int, Meta(ge=0, le=10**15)] = GRANT_MAX_UCR
    issue_total_max_ucr: Annotated[int, Meta(ge=0, le=10**18)] = ISSUE_TOTAL_MAX_UCR
    stranger_credit_ucr: Annotated[int, Meta(ge=0, le=10**15)] = 0
    pow_bits: Annotated[int, Meta(ge=0, le=256)] = 0
    open_lines_max: Annotated[int, Meta(ge=1, le=2**20)] = limits.OPEN_LINES_MAX
    margin_ms: _U63 = limits.MARGIN_MS
    lock_max_ms: _U63 = limits.LOCK_MAX_MS
    dispute_fee_ucr: Annotated[int, Meta(ge=0, le=10**15)] = 0


class OwnerCertificate(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`issuer` (the founder, or an owner who may invite) makes `owner` a member; `inviter` is the node that did it."""

    mesh: _Bytes32
    owner: _Bytes32
    issuer: _Bytes32
    may_invite: bool
    issued_ms: _U63
    inviter: _PeerId


class NodeCertificate(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`owner` says that `node` is one of its own machines."""

    mesh: _Bytes32
    node: _Bytes32
    owner: _Bytes32
    issued_ms: _U63
    inviter: _PeerId


class Membership(NamedTuple):
    """What a chain proves: whose machine the node is, whether its owner may invite, and which node let it in."""

    owner: bytes
    may_invite: bool
    inviter: str


# --- signing


def sign_charter(charter: Charter, founder: KeyPair) -> bytes:
    """The statement of a charter; `founder` must be the key it names."""
    assert charter.founder == founder.public
    return sign_statement(CHARTER_TAG, charter, founder)


def certify_owner(
    issuer: KeyPair, mesh: bytes, owner: bytes, *, may_invite: bool, issued_ms: int, inviter: str
) -> bytes:
    """The statement that makes another owner a member."""
    body = OwnerCertificate(mesh, owner, issuer.public, may_invite, issued_ms, inviter)
    return sign_statement(OWNER_TAG, body, issuer)


def certify_node(owner: KeyPair, mesh: bytes, node: bytes, *, issued_ms: int, inviter: str) -> bytes:
    """The statement by which an owner takes a machine as its own."""
    return sign_statement(NODE_TAG, NodeCertificate(mesh, node, owner.public, issued_ms, inviter), owner)


# --- reading


def read_charter(statement: bytes) -> tuple[Charter, bytes]:
    """A charter and its mesh id. Raises NotPermittedError when it is malformed or not signed by its founder."""
    parts = open_statement(statement, "charter")
    charter = decode_body(parts.payload, Charter, "charter")
    if not verify(charter.founder, CHARTER_TAG + parts.payload, parts.signature):
        raise NotPermittedError("the charter is not signed by its founder")
    return charter, mesh_id(parts.payload)


def mesh_id(charter_payload: bytes) -> bytes:
    """The mesh a charter founds: SHA-256 of its payload bytes."""
    return hashlib.sha256(charter_payload).digest()


def verify_chain(charter: Charter, mesh: bytes, chain: list[bytes], node_public: bytes) -> Membership:
    """Proves that a node is a member: at most two owner certificates from the founder on, then its node certificate.

    The founder's own machines need only the last. Raises NotPermittedError with the reason.
    """
    if not 1 <= len(chain) <= CHAIN_OWNERS_MAX + 1:
        raise NotPermittedError(f"a membership has 1 to {CHAIN_OWNERS_MAX + 1} certificates, not {len(chain)}")
    return _proven(charter, mesh, tuple(chain), node_public)


@lru_cache(maxsize=4_096)
def _proven(charter: Charter, mesh: bytes, chain: tuple[bytes, ...], node_public: bytes) -> Membership:
    owners = verify_owners(charter, mesh, list(chain[:-1]))
    owner, may_invite = (owners[-1].owner, owners[-1].may_invite) if owners else (charter.founder, True)
    parts = open_statement(chain[-1], "node certificate")
    node = decode_body(parts.payload, NodeCertificate, "node certificate")
    if node.mesh != mesh:
        raise NotPermittedError("the node certificate is of another mesh")
    if node.node != node_public:
        raise NotPermittedError("the node certificate is for another key")
    if node.owner != owner:
        raise NotPermittedError("the node certificate is by another owner than the chain's")
    if not verify(owner, NODE_TAG + parts.payload, parts.signature):
        raise NotPermittedError("the node certificate is not signed by its owner")
    return Membership(owner, may_invite, node.inviter)


def verify_owners(charter: Charter, mesh: bytes, statements: list[bytes]) -> list[OwnerCertificate]:
    """The owner certificates of a chain, proven from the founder on. Raises NotPermittedError with the reason."""
    if len(statements) > CHAIN_OWNERS_MAX:
        raise NotPermittedError(f"a chain has at most {CHAIN_OWNERS_MAX} owner certificates, not {len(statements)}")
    found: list[OwnerCertificate] = []
    owner, may_invite = charter.founder, True
    for depth, statement in enumerate(statements):
        certificate = _read_owner(statement, mesh, owner)
        if not may_invite:
            raise NotPermittedError("a member was certified by an owner who may not invite")
        if certificate.may_invite and depth > 0:
            raise NotPermittedError("an invited owner cannot pass on the right to invite")
        owner, may_invite = certificate.owner, certificate.may_invite
        found.append(certificate)
    return found


def _read_owner(statement: bytes, mesh: bytes, issuer: bytes) -> OwnerCertificate:
    parts = open_statement(statement, "owner certificate")
    certificate = decode_body(parts.payload, OwnerCertificate, "owner certificate")
    if certificate.mesh != mesh:
        raise NotPermittedError("the owner certificate is of another mesh")
    if certificate.issuer != issuer or not verify(issuer, OWNER_TAG + parts.payload, parts.signature):
        raise NotPermittedError("the owner certificate is not signed by the owner before it in the chain")
    return certificate
