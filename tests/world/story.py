"""What happens to a machine, in the words of the story that a seed tells."""

from __future__ import annotations

from typing import Any

from clawnet.wire import events as e


def fields_shown(fields: dict[str, Any]) -> str:
    """What a log line says besides its event."""
    return " ".join(f"{name}={value}" for name, value in fields.items())[:300]


def shown(stimulus: e.Stimulus, names: dict[str, str]) -> str:
    """A stimulus in a few words."""
    if type(stimulus) is e.MessageIn:
        return f"<- {names.get(stimulus.peer, '?')}: {type(stimulus.message).__name__}"
    if isinstance(stimulus, e.TimerFired):
        key = stimulus.key
        what = key[1].hex()[:8] if len(key) > 1 and isinstance(key[1], bytes) else ""
        return f"timer {key[0]} {what}"
    if isinstance(stimulus, e.RpcCall):
        return f"call {stimulus.method}"
    if isinstance(stimulus, e.PeerUp | e.PeerDown):
        return f"{type(stimulus).__name__} {names.get(stimulus.peer, '?')}"
    return type(stimulus).__name__
