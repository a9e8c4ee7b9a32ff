"""`clawnet version`: version, protocol, Python and platform."""

from __future__ import annotations

import sys

import typer

from clawnet import PROTOCOL_ID, __version__

from .invocation import here
from .render import show


def version(context: typer.Context) -> None:
    """Version, protocol, Python and platform."""
    import platform

    value = {
        "version": __version__,
        "protocol": PROTOCOL_ID,
        "python": platform.python_version(),
        "platform": f"{sys.platform}-{platform.machine()}",
    }
    lines = [
        ("clawnet", __version__),
        ("protocol", PROTOCOL_ID),
        ("Python", value["python"]),
        ("platform", value["platform"]),
    ]
    show(here(context), value, bare=list(value.values()), lines=lines)
