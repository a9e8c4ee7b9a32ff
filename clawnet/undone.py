"""What the node hears of an effect that could not be performed: the failure it knows of that effect, and its words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from clawnet.errors import ClawnetError, InternalError
from clawnet.wire import events as e
from clawnet.wire.fileevents import OutputsSaved, SaveOutputs


def internal(identifier: str) -> InternalError:
    """The answer where the mistake is ours: all that is told of it is the id under which the log has it."""
    return InternalError(
        f"an internal error happened (id {identifier})",
        hint="`clawnet daemon logs` shows it under that id; please report it",
        id=identifier,
    )


def failing(effect: e.Effect, error: ClawnetError) -> e.Stimulus | None:
    """The end of an effect that failed before it began; None for one whose end nobody waits for."""
    make = _ENDS.get(type(effect))
    return make(effect, error) if make is not None else None


def _exited(effect: e.Run, error: ClawnetError) -> e.TaskExited:
    return e.TaskExited(
        effect.job,
        "failed",
        error.message,
        None,
        None,
        b"",
        b"",
        0,
        b"",
        0,
        duration_s=0.0,
        cpu_s=0.0,
        memory_bytes_max=0,
    )


# What was not done here says nothing about a peer: bytes that could not be asked for or looked at are our storage's.
_ENDS: Final[dict[type[e.Effect], Callable[[Any, ClawnetError], e.Stimulus]]] = {
    e.Run: _exited,
    e.ReadOutput: lambda effect, error: e.OutputKept(effect.job, effect.stream, effect.offset, b""),
    SaveOutputs: lambda effect, error: OutputsSaved(effect.call, 0, 0, error.as_dict()),
    e.PackInputs: lambda effect, error: e.InputsReady(effect.request, (), error.as_dict()),
    e.Open: lambda effect, error: e.Opened(effect.request, error.message, fault=e.STORAGE),
    e.Fetch: lambda effect, error: e.BlobReady(effect.request, error.message, fault=e.STORAGE),
    e.Load: lambda effect, error: e.Loaded(effect.request, ()),
    e.Dial: lambda effect, error: e.DialEnded(effect.call, effect.peer, error.message),
}
