"""`clawnet _worker`: the process that does built-in operations for the node; started by the node alone."""

from __future__ import annotations


def serve() -> None:
    """Serve the node on descriptor 0 until it goes away."""
    from clawnet.execution.worker import main

    main()
