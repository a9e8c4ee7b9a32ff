"""The shell of this platform: where its runs happen and what one is, by the same names everywhere."""

from __future__ import annotations

import sys

if sys.platform == "win32":
    from clawnet.execution.windows_job import JobRun as ShellRun
    from clawnet.execution.windows_job import Place, Places
else:
    from clawnet.execution.places import Places
    from clawnet.execution.shell import Place, ShellRun

__all__ = ["Place", "Places", "ShellRun"]
