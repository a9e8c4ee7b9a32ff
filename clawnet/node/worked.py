"""What this node did for others: the jobs it took, how they ended, what they cost and what they brought."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from clawnet.answers_market import time_text
from clawnet.errors import DataError
from clawnet.ledger.taskdoc import TaskDocument, encode
from clawnet.market.records import JOB_FINAL, Job, decode_job
from clawnet.money import format_credits
from clawnet.node.context import Context
from clawnet.node.params import Params, integer

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

PAGE_MAX: Final = 500


def received(document: TaskDocument) -> int:
    """The bytes that a job's requester gives: the document, with standard input in it, and the inputs."""
    return len(encode(document)) + sum(item.bytes for item in document.inputs)


class Worked:
    """The executor's side of the run history; rows are kept as long as results (storage/retention.py)."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms

    def page(self, call: int, params: Params) -> None:
        """Jobs that have ended, newest first."""
        limit = max(1, min(integer(params, "limit", 20), PAGE_MAX))
        before_ms, before_job = _cursor(params.get("after"))

        def done(rows: tuple[Any, ...]) -> None:
            jobs = [decode_job(row[-1]) for row in rows if row[1] in JOB_FINAL]
            following = f"{rows[-1][2]}-{rows[-1][0].hex()}" if len(rows) == limit else None
            self._ctx.reply(call, {"items": [self._job(job) for job in jobs], "next": following})

        self._rooms.loads.ask("jobs_page", ("", before_ms, before_job, limit), done, call=call)

    def _job(self, job: Job) -> dict[str, Any]:
        earned_ucr = job.amount_ucr if job.claimed_seq >= 0 else 0
        return {
            "task_id": job.task_id.hex(),
            "attempt": job.attempt,
            "requester": self._rooms.members.party(job.peer),
            "type": job.kind,
            "state": job.state,
            "reason": job.reason,
            "price": format_credits(job.price_ucr),
            "earned": format_credits(earned_ucr),
            "received_at": time_text(job.received_ms),
            "started_at": time_text(job.started_ms) if job.started_ms else None,
            "ended_at": time_text(job.ended_ms) if job.ended_ms else None,
            "usage": self._usage(job),
        }

    @staticmethod
    def _usage(job: Job) -> dict[str, Any] | None:
        """What the run cost here; None where none came to an end."""
        if not job.ended_ms:
            return None
        return {
            "duration_s": job.duration_s,
            "cpu_s": job.cpu_s,
            "memory_bytes_max": job.memory_bytes_max,
            "output_bytes": job.output_bytes,
            "bytes_in": job.input_bytes,
            "bytes_out": job.output_bytes,
        }


def _cursor(after: Any) -> tuple[int | None, bytes | None]:
    if after in (None, ""):
        return None, None
    try:
        stamp, _, identifier = str(after).partition("-")
        return min(int(stamp), 2**62), bytes.fromhex(identifier)
    except ValueError:
        raise DataError(f"{str(after)[:64]!r} is no continuation of a list") from None
