"""Stimuli and effects of files on this machine: output files that are saved, and how far long transfers are."""

from __future__ import annotations

from typing import Any

from clawnet.wire.events import Effect, Stimulus


class SaveOutputs(Effect, frozen=True, gc=False):
    """Put the output files in the archive `blob` into a local directory, all or none; answered by OutputsSaved.

    `outputs` are the patterns they were asked for by, `umask` is that of the caller. `directory` is absolute. With
    `told` Moved comes while it lasts.
    """

    call: int
    blob: bytes
    outputs: tuple[str, ...]
    directory: str
    umask: int
    told: bool = False


class OutputsSaved(Stimulus, frozen=True, gc=False):
    """A SaveOutputs ended: the files are in their places, or `error` says why none is."""

    call: int
    files: int
    bytes: int
    error: dict[str, Any] | None = None


class Moved(Stimulus, frozen=True, gc=False):
    """So many of `total` bytes are done of what `about` names, as far as it is known now; never the last word.

    `what` is "packing" (about: a PackInputs request), "fetching" (a Fetch request), "uploading" (an award whose inputs
    another node fetches here) or "saving" (a call).
    """

    what: str
    about: bytes | int
    done: int
    total: int
