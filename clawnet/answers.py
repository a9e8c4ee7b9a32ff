"""Every answer of the node as a struct: what `--json` prints and what docs/schema/ is generated from.

Amounts are decimal strings of credits, times RFC 3339 in UTC, durations seconds as numbers, sizes bytes. Keys are
stable; fields may be added. A field that does not apply is null; a key ending in `_b64` replaces its namesake (which is
then null) where the bytes are no UTF-8. Nothing here may be imported at the top of a command: it loads msgspec.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from msgspec import field

from clawnet.answers_demo import Demo
from clawnet.answers_local import LOCAL_ANSWERS
from clawnet.answers_market import *  # noqa: F403 - one vocabulary in two files
from clawnet.answers_market import (
    Answer,
    ApprovalList,
    AttemptLine,
    BidList,
    CancelAnswer,
    JobList,
    Party,
    Ring,
    StreamLine,
    Submitted,
    Task,
    TaskItems,
    TaskList,
    Why,
)
from clawnet.answers_mesh import *  # noqa: F403
from clawnet.answers_mesh import MESH_ANSWERS
from clawnet.answers_wallet import *  # noqa: F403
from clawnet.answers_wallet import WALLET_ANSWERS, Restore

Level = Literal["ok", "warn", "error"]


# --- errors


class Failure(Answer):
    """An error: `code` is stable, `exit_code` is what the command exits with. Further keys depend on the code."""

    code: str
    message: str
    hint: str
    exit_code: int


class ErrorAnswer(Answer):
    """What `--json` prints on stderr instead of an answer."""

    error: Failure


class BatchLine(Answer):
    """One line of `market batch`: the task of `line` has ended with `exit_code`, or `error` says why it has none.

    With both, `error` is why its output files are not in their directory.

    `resumed`: the task had been submitted before, by an earlier run over the same lines or under the same key.
    """

    line: int
    idempotency_key: str | None
    resumed: bool
    exit_code: int
    task: Task | None
    error: Failure | None


# --- peers


class Peer(Answer):
    """A peer this node knows. `state` is connected, connecting, known, banned or removed.

    `came_by` is how its link was made: inbound, dialled, mdns or bootstrap; card: never connected, known by its card.
    """

    peer_id: str
    name: str
    ring: Ring
    state: str
    address: str | None
    transport: str | None
    rtt_s: float | None
    reputation: float
    last_seen: str | None
    inbound: bool = False
    connected_at: str | None = None
    addresses: list[str] = field(default_factory=list)
    capabilities: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    os: str = ""
    cpu: int = 0
    memory_bytes: int = 0
    gpu: int = 0
    load: float = 0.0
    account: str = ""
    owner: str = ""
    inviter: str = ""
    version: str = ""
    notes: list[str] = field(default_factory=list)
    came_by: str = ""
    invited_by: Party | None = None
    known_since: str | None = None


class PeerList(Answer):
    """Own machines first, then members."""

    items: list[Peer]
    next: str | None = None


class Neighbour(Answer):
    """Somebody who announces itself on the local network; nothing of it is proven before it is connected.

    `same_mesh`: it showed the mesh's own tag. `name` is null for who never was a peer. `state` is connected, known,
    banned, or seen: announced and no more.
    """

    peer_id: str
    name: str | None
    same_mesh: bool
    state: str
    addresses: list[str]
    since: str


class NeighbourList(Answer):
    """What `peer list --nearby` prints: this mesh first."""

    items: list[Neighbour]
    next: str | None = None


class PingAnswer(Answer):
    """Round trips over the open connection."""

    peer: Party
    sent: int
    received: int
    rtts_s: list[float]


class Invite(Answer):
    """A token to hand over secretly; whoever holds it may join in ring `ring`, `uses` times."""

    token: str
    ring: Ring
    expires_at: str
    uses: int
    credits: str
    mesh: str
    ephemeral: bool = False


class Joined(Answer):
    """The mesh this node is a member of now."""

    mesh: str
    ring: Ring
    inviter: Party
    peers: int
    granted: str = "0"


class PeerChanged(Answer):
    """What connect, disconnect, ban and unban did; `changed` is false where it was so before."""

    peer: Party
    state: str
    changed: bool


class Factors(Answer):
    """Decayed averages in 0..1 with a prior of 0.5."""

    completion: float
    on_time: float
    accuracy: float
    dispute_ratio: float
    swarm: float


class Reputation(Answer):
    """This node's own view of a peer; `evidence` is the decayed number of tasks that it rests on."""

    peer: Party
    score: float
    factors: Factors
    evidence: float
    confidence_discount: float
    notes: list[str] = field(default_factory=list)


class ReputationList(Answer):
    """Best score first."""

    items: list[Reputation]
    next: str | None = None


# --- the node


class DaemonStatus(Answer):
    """The daemon as a process and as a node. Only `running` and `home` are set when none runs."""

    running: bool
    home: str
    pid: int | None = None
    version: str | None = None
    protocol: str | None = None
    rpc_version: int | None = None
    peer_id: str | None = None
    name: str | None = None
    mesh: str | None = None
    account: str | None = None
    started_at: str | None = None
    uptime_s: float | None = None
    draining: bool = False
    listen: list[str] = field(default_factory=list)
    peers_connected: int = 0
    peers_known: int = 0
    tasks: dict[str, int] = field(default_factory=dict)
    runs: int = 0
    slots: int = 0
    capabilities: list[str] = field(default_factory=list)
    shell: dict[str, str] = field(default_factory=dict)
    balance: str | None = None
    memory_rss_bytes: int = 0
    storage_bytes: int = 0
    activity: dict[str, int] = field(default_factory=dict)
    restore: Restore | None = None
    warnings: list[str] = field(default_factory=list)


class Reloaded(Answer):
    """Keys that changed at once, and those that wait for a restart."""

    applied: list[str]
    restart: list[str]


class Finding(Answer):
    """One check of `doctor`."""

    check: str
    level: Level
    message: str
    remedy: str


class DoctorReport(Answer):
    """`ok` is false when a finding has level error."""

    ok: bool
    findings: list[Finding]


class VersionAnswer(Answer):
    """`clawnet version`."""

    version: str
    protocol: str
    python: str
    platform: str


class Hello(Answer):
    """The daemon's half of the handshake on the local socket."""

    rpc_version: int
    version: str
    pid: int


ANSWERS: Final[dict[str, Any]] = {
    **LOCAL_ANSWERS,
    **MESH_ANSWERS,
    **WALLET_ANSWERS,
    "daemon start": DaemonStatus,
    "daemon status": DaemonStatus,
    "daemon restart": DaemonStatus,
    "demo": Demo,
    "doctor": DoctorReport,
    "market approve": ApprovalList,
    "market approve held": TaskList,
    "market batch": BatchLine,
    "market bids": BidList,
    "market cancel": CancelAnswer,
    "market history": TaskList,
    "market history executor": JobList,
    "market list": TaskList,
    "market result": Task,
    "market show": Task,
    "market status": Task,
    "market submit": Submitted,
    "market wait": TaskItems,
    "market why": Why,
    "peer ban": PeerChanged,
    "peer connect": PeerChanged,
    "peer disconnect": PeerChanged,
    "peer invite": Invite,
    "peer join": Joined,
    "peer list": PeerList,
    "peer list nearby": NeighbourList,
    "peer ping": PingAnswer,
    "peer reputation": ReputationList,
    "peer show": Peer,
    "peer unban": PeerChanged,
    "run": Task,
    "version": VersionAnswer,
    "error": ErrorAnswer,
    "stream": StreamLine,
    "stream again": AttemptLine,
}
