"""`python -m clawnet.commands`: the same program as `clawnet`."""

from __future__ import annotations

from .app import main

if __name__ == "__main__":
    main()
