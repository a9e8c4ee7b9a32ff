"""The parameters that a mesh's charter fixes for its ledger: those marked (c) in docs/LEDGER.md."""

from __future__ import annotations

from msgspec import Struct

from clawnet import limits
from clawnet.identity.certificates import Charter

GRANT_MAX_UCR = 10**10
ISSUE_TOTAL_MAX_UCR = 10**18


class LedgerTerms(Struct, frozen=True):
    """What every book of one mesh judges by. `issuers` are accounts; `open_mesh` lets strangers open with credit."""

    issuers: frozenset[bytes]
    grant_max_ucr: int = GRANT_MAX_UCR
    issue_total_max_ucr: int = ISSUE_TOTAL_MAX_UCR
    open_lines_max: int = limits.OPEN_LINES_MAX
    margin_ms: int = limits.MARGIN_MS
    lock_max_ms: int = limits.LOCK_MAX_MS
    stranger_credit_ucr: int = 0
    pow_bits: int = 0
    open_mesh: bool = False

    @classmethod
    def of(cls, charter: Charter) -> LedgerTerms:
        """The terms that a mesh was founded on."""
        return cls(
            issuers=frozenset(charter.issuers),
            grant_max_ucr=charter.grant_max_ucr,
            issue_total_max_ucr=charter.issue_total_max_ucr,
            open_lines_max=charter.open_lines_max,
            margin_ms=charter.margin_ms,
            lock_max_ms=charter.lock_max_ms,
            stranger_credit_ucr=charter.stranger_credit_ucr,
            pow_bits=charter.pow_bits,
            open_mesh=charter.mode == "open",
        )
