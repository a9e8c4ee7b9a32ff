"""Fork proofs: two signed entries for one place of one chain. They convict their author by themselves, for ever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from clawnet.errors import SignatureRefused, WireError
from clawnet.ledger.entries import Parsed, Rotate, Verify, parse, possession_message, signed_by

PROOF_VERSION: Final = 1
PROOF_BYTES_MAX: Final = 256 * 1024
ROTATIONS_IN_PROOF_MAX: Final = 256


class ForkProof(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """`first` and `second` are entries with signature; `rotations` the account's rotate entries before them."""

    v: Annotated[int, Meta(ge=0)]
    first: bytes
    second: bytes
    rotations: Annotated[list[bytes], Meta(max_length=ROTATIONS_IN_PROOF_MAX)]


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(ForkProof)


def build_proof(first: Parsed, second: Parsed, rotations: Sequence[bytes]) -> bytes:
    """The proof that the author of both entries forked; the order of the two does not matter to the bytes."""
    low, high = sorted((first, second), key=lambda entry: entry.hash)
    return _ENCODER.encode(ForkProof(PROOF_VERSION, low.raw, high.raw, list(rotations)))


def verify_proof(proof: bytes, mesh: bytes, verify: Verify) -> tuple[Parsed, Parsed]:
    """The two entries of a fork proof that holds in this mesh.

    Raises WireError when it is none, SignatureRefused when a signature in it is not the account's.
    """
    if len(proof) > PROOF_BYTES_MAX:
        raise WireError(f"a fork proof of {len(proof)} bytes")
    try:
        shown = _DECODER.decode(proof)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"not a fork proof: {error}") from error
    if shown.v != PROOF_VERSION:
        raise WireError(f"a fork proof of the unknown version {shown.v}")
    first, second = parse(shown.first), parse(shown.second)
    if first.mesh != mesh or second.mesh != mesh:
        raise WireError("a fork proof of another mesh")
    if first.account != second.account or first.seq != second.seq or first.hash == second.hash:
        raise WireError("two entries that do not contradict each other")
    keys = rotated_keys(first.account, shown.rotations, mesh, verify)
    key = first.account
    for rotated_seq, new_key in keys:
        if rotated_seq < first.seq:
            key = new_key
    for entry in (first, second):
        if not signed_by(entry, key, verify):
            raise SignatureRefused("an entry of the fork proof is not signed by the account's key")
    return first, second


def rotated_keys(account: bytes, rotations: Sequence[bytes], mesh: bytes, verify: Verify) -> list[tuple[int, bytes]]:
    """(seq, new key) of each rotate entry, every one signed by the key before it, the first by the account's own.

    Raises WireError or SignatureRefused when the entries do not lead from key to key in rising order.
    """
    key, last_seq = account, 0
    keys: list[tuple[int, bytes]] = []
    for raw in rotations:
        entry = parse(raw)
        body = entry.body
        if not isinstance(body, Rotate) or entry.account != account or entry.mesh != mesh or entry.seq <= last_seq:
            raise WireError("not a rotate entry of this account, or out of order")
        if not signed_by(entry, key, verify):
            raise SignatureRefused("a rotate entry is not signed by the key before it")
        if not verify(body.new_key, possession_message(account, entry.seq, entry.prev), body.possession):
            raise SignatureRefused("a rotate entry does not show possession of its new key")
        key, last_seq = body.new_key, entry.seq
        keys.append((entry.seq, key))
    return keys


def current_key(account: bytes, rotations: Sequence[bytes], mesh: bytes, verify: Verify) -> bytes:
    """The key after all these rotate entries: the account itself when there are none. Raises as rotated_keys does."""
    keys = rotated_keys(account, rotations, mesh, verify)
    return keys[-1][1] if keys else account
