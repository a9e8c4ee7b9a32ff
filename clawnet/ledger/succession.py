"""Whose key this is: the rotate entries that lead from an account's first key to the one its node has now."""

from __future__ import annotations

from collections.abc import Sequence

from clawnet.errors import NotPermittedError, RemoteError, WireError
from clawnet.ledger.entries import Rotate, Verify, parse
from clawnet.ledger.proofs import rotated_keys


def succession(rotations: Sequence[bytes], present: bytes, mesh: bytes, verify: Verify) -> list[bytes]:
    """All keys of the node whose present key is `present`, the account first: just that one without rotate entries.

    Every entry must be signed by the key before it, and the last one must name `present`. Raises NotPermittedError.
    """
    if not rotations:
        return [present]
    try:
        account = parse(rotations[0]).account
        keys = [account, *(key for _, key in rotated_keys(account, rotations, mesh, verify))]
    except RemoteError as error:
        raise NotPermittedError(f"its changes of key prove nothing: {error.message}") from error
    if keys[-1] != present:
        raise NotPermittedError("its changes of key do not lead to the key it has")
    if len(set(keys)) != len(keys):
        raise NotPermittedError("its changes of key return to one that was given up")
    return keys


def recorded(rotations: Sequence[bytes]) -> list[bytes]:
    """The same for rotate entries that this node has verified before: all keys, the account first; none for none."""
    keys: list[bytes] = []
    for raw in rotations:
        entry = parse(raw)
        if not isinstance(entry.body, Rotate):
            raise WireError("not a rotate entry")
        keys = [*(keys or [entry.account]), entry.body.new_key]
    return keys
