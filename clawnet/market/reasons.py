"""Why a peer gives no bid, and why a bid does not count: the words of TASK_DECLINE and of `market why`."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Final


class Reason(StrEnum):
    """One word on the wire; MEANING has the sentence. docs/PROTOCOL.md lists them from here."""

    NO_CAPABILITY = "no_capability"
    NO_COMMAND = "no_command"
    NO_MODEL = "no_model"
    NO_GPU = "no_gpu"
    CPU = "cpu"
    MEMORY = "memory"
    LABELS = "labels"
    OS = "os"
    PRICE = "price"
    POLICY = "policy"
    NOT_TRUSTED = "not_trusted"
    REPUTATION = "reputation"
    TOO_LARGE = "too_large"
    DEADLINE = "deadline"
    FULL = "full"
    QUOTA = "quota"
    RATE = "rate"
    DRAINING = "draining"
    BUSY_AUDIT = "busy_audit"
    CANNOT_AUDIT = "cannot_audit"
    CLOCK = "clock"
    STORAGE_FULL = "storage_full"
    CLOSED = "closed"
    OTHER = "other"


MEANING: Final[dict[Reason, str]] = {
    Reason.NO_CAPABILITY: "it does not offer this kind of task or this operation",
    Reason.NO_COMMAND: "the command is not installed there",
    Reason.NO_MODEL: "it does not serve the model asked for",
    Reason.NO_GPU: "it has fewer GPUs than asked for",
    Reason.CPU: "it has fewer CPU cores than asked for",
    Reason.MEMORY: "it has less memory than asked for",
    Reason.LABELS: "it lacks a label asked for",
    Reason.OS: "it runs another family of operating systems",
    Reason.PRICE: "its price is above the budget",
    Reason.POLICY: "its policy refuses this kind of task from this ring",
    Reason.NOT_TRUSTED: "it does not accept work from this requester (ban, fork proof, or too low a reputation)",
    Reason.REPUTATION: "its reputation here is below the minimum asked for",
    Reason.TOO_LARGE: "the inputs are larger than it takes from this ring (execution.input_max), or the payload is",
    Reason.DEADLINE: "it cannot be done before the deadline",
    Reason.FULL: "all its slots are taken",
    Reason.QUOTA: "it keeps as much for this requester already as it does for any",
    Reason.RATE: "it was asked more often than it allows",
    Reason.DRAINING: "it is shutting down",
    Reason.BUSY_AUDIT: "it is still auditing the requester's chain",
    Reason.CANNOT_AUDIT: "it cannot audit the requester's chain (missing, invalid, or longer than it audits)",
    Reason.CLOCK: "its clock is off, so it signs nothing",
    Reason.STORAGE_FULL: "its disk or its storage limit is full",
    Reason.CLOSED: "the bid came after the auction had closed",
    Reason.OTHER: "a reason this version does not know",
}

PASSING: Final = frozenset((Reason.FULL, Reason.QUOTA, Reason.RATE, Reason.BUSY_AUDIT, Reason.STORAGE_FULL))
"""What is so at the moment only: whoever says one of these may take the same task later."""

_KNOWN: Final = {reason.value: reason for reason in Reason}


def reason_of(word: str) -> Reason:
    """The reason a peer's word stands for; OTHER for a word this version does not know, so it is never printed raw."""
    return _KNOWN.get(word, Reason.OTHER)


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """How often each reason was given: the most frequent first, then by name ("4 no_gpu, 2 price")."""
    counts: dict[str, int] = {}
    for reason in reasons:
        word = reason_of(reason).value
        counts[word] = counts.get(word, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
