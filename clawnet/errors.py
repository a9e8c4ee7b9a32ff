"""The one error tree: whose fault it was, whether it is final, the exit code a script sees, and what to do next."""

from __future__ import annotations

from typing import Any, ClassVar


class ClawnetError(Exception):
    """Something clawnet can say in one sentence; every error that reaches a user is one of these.

    `message` says what happened and to what; `hint` says what to do next (may be empty); `details` are further
    JSON-able fields of the `--json` error object. The class carries `code` (stable, for programs) and `exit_code`
    (docs/CLI.md).
    """

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, *, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details

    def as_dict(self) -> dict[str, Any]:
        """The object under "error" in JSON output and in RPC error data."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "exit_code": self.exit_code,
            **self.details,
        }


class UsageError(ClawnetError):
    """The command line asks for something that does not exist or does not fit together."""

    code = "usage"
    exit_code = 64


class DataError(ClawnetError):
    """Input data (a file, standard input, JSON, an invite, an amount) is malformed."""

    code = "bad_input"
    exit_code = 65


class NotFoundError(ClawnetError):
    """No such task, peer, key or file."""

    code = "not_found"
    exit_code = 66


class UnreachableError(ClawnetError):
    """The daemon (or the peer that a command needs) does not answer."""

    code = "unreachable"
    exit_code = 69


class BusyError(UnreachableError):
    """The daemon has more to do than it can take; nothing was begun, asking again later may help."""

    code = "busy"


class NoDaemonError(UnreachableError):
    """No daemon answers: there is none, or it went away before it answered. What it had accepted is kept."""


class StoppedError(UnreachableError):
    """The daemon was stopped; the tasks that it had accepted go on when it runs again."""

    code = "stopped"


class InternalError(ClawnetError):
    """A defect of clawnet; the log holds the traceback under the id named."""

    code = "internal"
    exit_code = 70


class NoBidError(ClawnetError):
    """Nobody allowed to take the task can take it at this price."""

    code = "no_bids"
    exit_code = 75


class ExecutorLostError(ClawnetError):
    """The executor was lost or failed and no retry is left."""

    code = "executor_lost"
    exit_code = 76


class NotPermittedError(ClawnetError):
    """Policy forbids it (ring, ban, membership, mode)."""

    code = "not_permitted"
    exit_code = 77


class ConfigError(ClawnetError):
    """The configuration, or the ownership or mode of a file, cannot be used."""

    code = "bad_configuration"
    exit_code = 78


class FundsError(ClawnetError):
    """Budget, balance or a spend limit does not allow it."""

    code = "funds"
    exit_code = 79


class VerificationError(ClawnetError):
    """The result did not pass its acceptance contract, or does not match what was promised."""

    code = "verification_failed"
    exit_code = 80


class CancelledError(ClawnetError):
    """The task was cancelled by someone else than this command."""

    code = "cancelled"
    exit_code = 81


class TimedOutError(ClawnetError):
    """The time allowed ran out."""

    code = "timed_out"
    exit_code = 124


class StorageError(ClawnetError):
    """The database or the blob directory does not work; what was accepted before is still there."""

    code = "storage"
    exit_code = 70


class StorageFullError(StorageError):
    """The disk or the configured storage limit is full; nothing was accepted and nothing was lost."""

    code = "storage_full"
    exit_code = 70


class RemoteError(ClawnetError):
    """The other side of a connection broke a rule; never the user's fault, never trusted further.

    `wire_code` is one of docs/PROTOCOL.md's error numbers.
    """

    code = "peer_error"
    exit_code = 69
    wire_code: ClassVar[int] = 100


class WireError(RemoteError):
    """Bytes from the network that are no message of ours (code 100)."""

    code = "invalid_format"
    wire_code = 100


class SignatureRefused(RemoteError):
    """A signature that does not verify, or by somebody else (code 101)."""

    code = "invalid_signature"
    wire_code = 101


class MessageTooOld(RemoteError):
    """A message outside the time or replay window (code 102)."""

    code = "too_old"
    wire_code = 102


class Replayed(MessageTooOld):
    """A message that was taken before, overtaken, or of another session (code 102)."""

    code = "replayed"


class RateLimited(RemoteError):
    """More than the limit allows (code 103)."""

    code = "rate_limit"
    wire_code = 103


class LinkError(RemoteError):
    """A connection could not be made or was lost: refused, timed out, reset, wrong peer."""

    code = "link"


def _tree(root: type[ClawnetError]) -> dict[str, type[ClawnetError]]:
    found: dict[str, type[ClawnetError]] = {}
    todo = [root]
    while todo:
        cls = todo.pop()
        found.setdefault(cls.code, cls)
        todo.extend(cls.__subclasses__())
    return found


def from_dict(fields: dict[str, Any]) -> ClawnetError:
    """Rebuilds the error that `as_dict` described; an unknown code becomes an InternalError that keeps the text."""
    rest = {k: v for k, v in fields.items() if k not in ("code", "message", "hint", "exit_code")}
    cls = _tree(ClawnetError).get(str(fields.get("code")), InternalError)
    if cls is ClawnetError:
        cls = InternalError
    return cls(str(fields.get("message", "unknown error")), hint=str(fields.get("hint", "")), **rest)


def exit_code_of(code: str) -> int:
    """The exit code that goes with a stable error word; 70 for an unknown one."""
    return _tree(ClawnetError).get(code, InternalError).exit_code
