"""Answers of the commands that work on a home without a node: init, config, identity."""

from __future__ import annotations

from typing import Any, Final

from clawnet.answers_market import Answer


class Home(Answer):
    """`clawnet init`: the home as it is now; `made` names the files that this call wrote."""

    home: str
    config_file: str
    peer_id: str
    name: str
    mesh: str
    made: list[str]


class ConfigItem(Answer):
    """One key. `value` is a string, number, boolean or list; durations are seconds, sizes bytes, amounts strings.

    `source` is default, FILE:LINE, or an environment variable; `apply` is reload or restart.
    """

    key: str
    value: str | float | bool | list[str]
    source: str
    default: str
    allowed: str
    meaning: str
    apply: str


class ConfigList(Answer):
    """`clawnet config show`."""

    items: list[ConfigItem]
    next: str | None = None


class ConfigChanged(Answer):
    """`clawnet config set`: the keys as they are now, which of them a running daemon took up, and which wait."""

    items: list[ConfigItem]
    applied: list[str]
    restart: list[str]
    daemon_running: bool


class ConfigProblem(Answer):
    """Something that is wrong; `line` is 0 where no line of the file is at fault."""

    line: int
    message: str
    hint: str


class ConfigChecked(Answer):
    """`clawnet config check`; exit code 78 unless `ok`."""

    ok: bool
    file: str
    problems: list[ConfigProblem]


class ConfigPath(Answer):
    """`clawnet config path`."""

    path: str
    exists: bool


class IdentityAnswer(Answer):
    """`clawnet identity show`. `account` is the node's first public key, `owner` its owner's, `mesh` the mesh id."""

    peer_id: str
    account: str
    owner: str
    mesh: str
    mesh_name: str
    founded: bool
    issuer: bool
    may_invite: bool
    owner_key_here: bool
    inviter: str
    rotations: int
    home: str


class IdentityMoved(Answer):
    """`clawnet identity export` and `import`."""

    peer_id: str
    path: str


class IdentityRotated(Answer):
    """`clawnet identity rotate`. `account` is what stays; `invites_void` are tokens given before that name `previous`.

    `rotations` counts the changes of key so far, `told` the peers that were connected and heard of this one.
    """

    peer_id: str
    previous: str
    account: str
    rotations: int
    told: int
    invites_void: int


LOCAL_ANSWERS: Final[dict[str, Any]] = {
    "config check": ConfigChecked,
    "config get": ConfigItem,
    "config path": ConfigPath,
    "config set": ConfigChanged,
    "config show": ConfigList,
    "identity export": IdentityMoved,
    "identity import": IdentityMoved,
    "identity rotate": IdentityRotated,
    "identity show": IdentityAnswer,
    "init": Home,
}
