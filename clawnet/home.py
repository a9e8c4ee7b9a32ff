"""Making a home: the commented configuration, the keys, and a mesh of one; what is there already stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from clawnet import config, paths
from clawnet.config import Config
from clawnet.errors import ConfigError
from clawnet.identity.keys import KeyPair
from clawnet.identity.membership import LocalMembership, create_home, is_initialised
from clawnet.paths import Home

KEPT_AT_INIT = ("market.initial_wallet_balance",)
"""Keys whose value in the environment at init must still hold at the first start: init writes them into the file."""
JOIN_READY = "join.ready"
"""In a home whose join of another mesh was cut short (clawnet/adoption.py): the next start finishes it."""


class Initialised(NamedTuple):
    """A home that is ready; `made` names the files that this call wrote (none: nothing was changed)."""

    home: Home
    config: Config
    node: KeyPair
    membership: LocalMembership
    made: tuple[str, ...]


def is_ready(home: Home) -> bool:
    """Whether this home was initialised before, be it that it has no mesh until a join is finished."""
    return is_initialised(home) or (home.dir / JOIN_READY).exists()


def initialise(
    home: Home,
    environ: Mapping[str, str],
    flags: Mapping[str, str],
    *,
    entropy: Callable[[int], bytes],
    now_ms: int,
    name: str = "",
    force: bool = False,
) -> Initialised:
    """Makes what a home lacks; `force` writes the configuration anew and keeps the old file as config.yaml.old.

    Keys and mesh are never overwritten. Raises ConfigError when what is there cannot be used.
    """
    paths.make_private_dir(home.dir)
    made: list[str] = []
    file = home.config_file
    if force and file.exists():
        paths.write_private(file.with_name(file.name + ".old"), _read(file))
    if force or not file.exists():
        layers = config.load_layers(environ, flags)
        values = {"node.name": name or _old_name(home) or layers.text("node.name")}
        values.update({key: layers.shown(key) for key in KEPT_AT_INIT if layers.is_set(key)})
        paths.make_private_dir(file.parent)
        config.write_new(file, values)
        made.append(str(file))
    settings = config.load(home, environ, flags)
    placed = settings.home(home)
    created = create_home(
        placed,
        settings.text("node.name"),
        entropy,
        now_ms,
        initial_balance_ucr=settings.amount_ucr("market.initial_wallet_balance"),
        check_permissions=settings.flag("security.check_permissions"),
    )
    made += [str(home.dir / word) for word in created.made]
    return Initialised(placed, settings, created.node, created.membership, tuple(made))


def _old_name(home: Home) -> str:
    """The name in a configuration that is about to be written anew, if it can be read."""
    try:
        return config.load(home, {}).text("node.name") if home.config_file.exists() else ""
    except ConfigError:
        return ""


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
