"""`python -m clawnet.commands`: the same program as `clawnet`; a worker process starts without the command line."""

from __future__ import annotations

import sys


def start() -> None:
    """The program, or the worker that the node starts."""
    if sys.argv[1:] == ["_worker"]:
        from .worker import serve

        serve()
    else:
        from .app import main

        main()


if __name__ == "__main__":
    start()
