"""What can stand in the way of listening on the local socket, in the user's words."""

from __future__ import annotations

from clawnet.errors import ConfigError, UnreachableError


def in_use(path: object, pid: int | None = None) -> ConfigError:
    """Another daemon listens there."""
    who = f" (pid {pid})" if pid else ""
    return ConfigError(
        f"another daemon{who} already listens on {path}",
        hint="`clawnet daemon status` shows it; stop it, or use another --home",
        pid=pid,
    )


def cannot_listen(path: object, error: OSError) -> UnreachableError:
    """The socket cannot be made."""
    return UnreachableError(f"cannot listen on {path}: {error.strerror or error}", path=str(path))
