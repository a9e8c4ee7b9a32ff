"""This node's place in a mesh as it lies on the disk, and the making of a new home with a mesh of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec
from msgspec import Struct

from clawnet import limits, paths
from clawnet.errors import ConfigError, NotPermittedError
from clawnet.identity.certificates import (
    GRANT_MAX_UCR,
    Charter,
    Membership,
    certify_node,
    read_charter,
    sign_charter,
    verify_chain,
)
from clawnet.identity.keys import KeyPair, read_secret, write_secret
from clawnet.paths import Home

VERSION = 1
MESH_KEY_PREFIX = "clawnet-mesh-key-1:"
ESCROW_SEED_PREFIX = "clawnet-escrow-seed-1:"

Entropy = Callable[[int], bytes]


class Handover(Struct, frozen=True):
    """A change of this node's key: the key that was given up, and the rotate entry by which it went to the next one."""

    key: bytes
    entry: bytes


class LocalMembership(Struct, frozen=True):
    """The mesh this node belongs to: the content of mesh.json; the mesh key lies in a file of its own.

    `certificates` is the chain from the founder to this node; `founded` says that this home's owner key founded the
    mesh; `inviter` is the peer that let this node in ("" for a founder); `ring` is what it is to that peer. `imported`
    tells that these keys had a life elsewhere: a chain of theirs may exist that is not on this disk. `handovers` are
    the changes of the node's key, from the first one on. `lease_s` above 0: a throw-away membership, and how long its
    holder may be out of the inviter's sight.
    """

    charter: bytes
    certificates: tuple[bytes, ...]
    founded: bool
    inviter: str = ""
    ring: str = "own"
    imported: bool = False
    v: int = VERSION
    handovers: tuple[Handover, ...] = ()
    lease_s: int = 0

    def keys(self, node_public: bytes) -> list[bytes]:
        """All keys that this node has had in this mesh, the present one last; the first one is its account."""
        return [*(handover.key for handover in self.handovers), node_public]

    def account(self, node_public: bytes) -> bytes:
        """The account of this node, which stays through every change of key."""
        return self.keys(node_public)[0]

    def rotations(self) -> list[bytes]:
        """The rotate entries that lead from the account to the present key: shown in every HELLO."""
        return [handover.entry for handover in self.handovers]

    def verified(self, node_public: bytes) -> tuple[Charter, bytes, Membership]:
        """The charter, the mesh id, and what the certificates prove for this node's key.

        Raises ConfigError when they do not fit: a mixed-up or damaged home.
        """
        try:
            charter, mesh = read_charter(self.charter)
            return charter, mesh, verify_keys(charter, mesh, list(self.certificates), self.keys(node_public))
        except NotPermittedError as error:
            raise ConfigError(
                f"mesh.json does not belong to this node's key: {error.message}",
                hint="restore keys and mesh.json from the same backup",
            ) from error


def verify_keys(charter: Charter, mesh: bytes, chain: list[bytes], keys: Sequence[bytes]) -> Membership:
    """As verify_chain, for a node that had several keys: its certificate may be for any of them.

    Raises NotPermittedError with what is said of its present key, the last one.
    """
    for key in keys[:-1]:
        try:
            return verify_chain(charter, mesh, chain, key)
        except NotPermittedError:
            continue
    return verify_chain(charter, mesh, chain, keys[-1])


class Created(Struct, frozen=True):
    """What `create_home` found or made; `made` is empty when everything was there."""

    node: KeyPair
    membership: LocalMembership
    made: tuple[str, ...]


def load_membership(home: Home, *, check_permissions: bool = True) -> LocalMembership:
    """The membership of a home. Raises ConfigError when there is none or it is unreadable."""
    path = home.mesh_file
    if check_permissions:
        paths.check_private(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{home.dir} is not initialised (there is no mesh.json)", hint="clawnet init") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    try:
        membership = msgspec.json.decode(data[: limits.JOIN_BYTES_MAX], type=LocalMembership)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {error}", hint="restore it from a backup") from error
    if membership.v > VERSION:
        raise ConfigError(f"{path} is from a newer version of clawnet", hint="install that version")
    return membership


def save_membership(home: Home, membership: LocalMembership) -> None:
    """Writes mesh.json in one step, mode 0600."""
    paths.write_private(home.mesh_file, msgspec.json.format(msgspec.json.encode(membership), indent=2) + b"\n")


def load_mesh_key(home: Home, *, check_permissions: bool = True) -> bytes:
    """The 32 secret bytes that all members share."""
    return read_secret(home.mesh_key, MESH_KEY_PREFIX, check_permissions=check_permissions)


def save_mesh_key(home: Home, mesh_key: bytes) -> None:
    """Writes the mesh key in one step, mode 0600."""
    write_secret(home.mesh_key, MESH_KEY_PREFIX, mesh_key)


def keep_mesh_key(home: Home, epoch: int, mesh_key: bytes, older: Mapping[int, bytes]) -> None:
    """The mesh key of a new epoch, and those before it in files of their own: old data is still read with them."""
    for number, key in older.items():
        if 0 <= number < epoch and not home.old_mesh_key(number).exists():
            write_secret(home.old_mesh_key(number), MESH_KEY_PREFIX, key)
    save_mesh_key(home, mesh_key)


def load_escrow_seed(home: Home, *, check_permissions: bool = True) -> bytes:
    """The 32 secret bytes from which this node derives the keys that seal its results."""
    return read_secret(home.escrow_seed, ESCROW_SEED_PREFIX, check_permissions=check_permissions)


def save_escrow_seed(home: Home, escrow_seed: bytes) -> None:
    """Writes the escrow seed in one step, mode 0600."""
    write_secret(home.escrow_seed, ESCROW_SEED_PREFIX, escrow_seed)


def is_initialised(home: Home) -> bool:
    """Whether this home has a node key and a mesh."""
    return home.node_key.exists() and home.mesh_file.exists()


def create_home(
    home: Home,
    name: str,
    entropy: Entropy,
    now_ms: int,
    *,
    initial_balance_ucr: int = 0,
    check_permissions: bool = True,
) -> Created:
    """Makes what a home lacks: directories 0700, node key, owner key, escrow seed, mesh key, and a mesh of one.

    Each file is written whole or not at all, mesh.json last, so a home cut short is finished by the next call; a
    complete one is left as it is. No key is ever overwritten. Raises ConfigError when a file that is there cannot be
    used, or when a key of a mesh that exists is gone.
    """
    for directory in (home.dir, home.keys_dir, home.run_dir, home.data_dir, home.logs_dir):
        paths.make_private_dir(directory)
        if check_permissions:
            paths.check_private(directory)
    made: list[str] = []
    if home.half_restored:
        raise ConfigError(
            f"a restore into {home.dir} was cut short", hint="`clawnet daemon start` finishes it, or the restore again"
        )
    if home.mesh_file.exists():
        node = KeyPair.load(home.node_key, check_permissions=check_permissions)
        membership = load_membership(home, check_permissions=check_permissions)
        membership.verified(node.public)
        load_mesh_key(home, check_permissions=check_permissions)
        load_escrow_seed(home, check_permissions=check_permissions)
        return Created(node, membership, ())
    if home.database.exists():
        raise ConfigError(
            f"{home.dir} has a database but no mesh.json",
            hint="restore mesh.json and keys/ from a backup, or move the database away to begin anew",
        )
    node = _key(home, "node", entropy, made, check_permissions)
    owner = _key(home, "owner", entropy, made, check_permissions)
    _secret(home, "escrow.seed", ESCROW_SEED_PREFIX, entropy, made, check_permissions)
    _secret(home, "mesh.key", MESH_KEY_PREFIX, entropy, made, check_permissions)
    membership = found_mesh(owner, node.public, name, entropy, now_ms, initial_balance_ucr)
    save_membership(home, membership)
    made.append("mesh.json")
    return Created(node, membership, tuple(made))


def found_mesh(
    owner: KeyPair, account: bytes, name: str, entropy: Entropy, now_ms: int, initial_balance_ucr: int = 0
) -> LocalMembership:
    """A new mesh whose only member and issuer is this node; the charter's grant limit covers the initial balance."""
    charter = Charter(
        v=1,
        name=name,
        founder=owner.public,
        issuers=(account,),
        mode="private",
        created_ms=now_ms,
        random=entropy(16),
        grant_max_ucr=max(GRANT_MAX_UCR, initial_balance_ucr),
    )
    statement = sign_charter(charter, owner)
    mesh = read_charter(statement)[1]
    certificate = certify_node(owner, mesh, account, issued_ms=now_ms, inviter="")
    return LocalMembership(charter=statement, certificates=(certificate,), founded=True)


def _key(home: Home, word: str, entropy: Entropy, made: list[str], check_permissions: bool) -> KeyPair:
    path = home.keys_dir / f"{word}.key"
    if path.exists():
        return KeyPair.load(path, check_permissions=check_permissions)
    key = KeyPair.generate(entropy)
    key.save(path)
    made.append(f"keys/{word}.key")
    return key


def _secret(home: Home, file: str, prefix: str, entropy: Entropy, made: list[str], check_permissions: bool) -> None:
    path = home.keys_dir / file
    if path.exists():
        read_secret(path, prefix, check_permissions=check_permissions)
        return
    write_secret(path, prefix, entropy(32))
    made.append(f"keys/{file}")
