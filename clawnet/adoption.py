"""Becoming a member of another mesh, on the disk: what an inviter's answer makes of a home."""

from __future__ import annotations

import time

from clawnet import paths
from clawnet.errors import DataError
from clawnet.identity import membership
from clawnet.identity.certificates import certify_node, read_charter
from clawnet.identity.keybox import MESH_KEY_BYTES
from clawnet.identity.keys import KeyPair
from clawnet.identity.membership import LocalMembership
from clawnet.paths import Home
from clawnet.wire.messages import JoinAnswer


def adopted(home: Home, node: bytes, answer: JoinAnswer, now_ms: int) -> LocalMembership:
    """The membership that an answer gives this node; nothing is written.

    Raises NotPermittedError, ConfigError or DataError when the answer does not make it a member.
    """
    _, mesh = read_charter(answer.charter)
    chain = list(answer.certificates)
    if answer.ring == "member":
        owner = KeyPair.load(home.owner_key)
        chain.append(certify_node(owner, mesh, node, issued_ms=now_ms, inviter=answer.inviter))
    if len(answer.mesh_key) != (0 if answer.lease_s else MESH_KEY_BYTES):
        raise DataError("the inviter's answer has no mesh key as it should be", hint="ask for a new token")
    local = LocalMembership(
        charter=answer.charter,
        certificates=tuple(chain),
        founded=False,
        inviter=answer.inviter,
        ring=answer.ring,
        lease_s=answer.lease_s,
    )
    local.verified(node)
    return local


def settle_in(home: Home, local: LocalMembership, mesh_key: bytes) -> None:
    """Archives what belongs to the mesh that is left, and writes the new membership. The database must be closed."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    paths.archive(home, stamp, keep_owner=local.ring == "member")
    membership.save_mesh_key(home, mesh_key or bytes(MESH_KEY_BYTES))
    membership.save_membership(home, local)
