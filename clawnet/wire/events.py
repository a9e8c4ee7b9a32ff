"""What the node can be told (Stimulus) and what it can ask for (Effect). Frozen data; no behaviour.

`now_ms` comes beside every stimulus. Effects of one turn are performed in this order: Append rows in one transaction,
then everything else in the order emitted.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from clawnet.wire.jobspec import Check
from clawnet.wire.messages import Hello, JoinAnswer, JoinAsk, JoinPeer, Message
from clawnet.wire.verdict import Verdict


class Stimulus(Struct, frozen=True, gc=False):
    """Base of all that the runtime feeds to Node.step."""


class MessageIn(Stimulus, frozen=True, gc=False):
    """One authenticated, decoded envelope from a connected peer (or from this node itself: peer == own id)."""

    peer: str
    id: bytes
    message: Message
    reply_to: bytes | None = None
    obligation: bytes | None = None


class PeerUp(Stimulus, frozen=True, gc=False):
    """The control stream to `peer` is open; `hello` was verified and admitted. `inbound` tells who dialled."""

    peer: str
    hello: Hello
    address: str
    transport: str
    inbound: bool


class PeerDown(Stimulus, frozen=True, gc=False):
    """The control stream to `peer` is gone."""

    peer: str
    reason: str


class RpcCall(Stimulus, frozen=True, gc=False):
    """A local client's request; answered by Reply (once) after any number of Notify with the same call id."""

    call: int
    method: str
    params: dict[str, Any]
    client: int = 0
    credential: str = ""
    """Who asks, as the node itself found out (the user behind the local socket); spend limits go by it."""


class CallGone(Stimulus, frozen=True, gc=False):
    """The client of `call` went away before the answer."""

    call: int


class TimerFired(Stimulus, frozen=True, gc=False):
    """A Wake came due (`key` is the Wake's)."""

    key: tuple[Any, ...]


class TaskOutput(Stimulus, frozen=True, gc=False):
    """Bytes a running job wrote: stream 1 is stdout, 2 is stderr; `offset` its place in that stream."""

    job: bytes
    stream: int
    offset: int
    data: bytes


class OutputKept(Stimulus, frozen=True, gc=False):
    """What a running job wrote earlier, as asked for by ReadOutput; no data when the run is over."""

    job: bytes
    stream: int
    offset: int
    data: bytes


class TaskExited(Stimulus, frozen=True, gc=False):
    """A job ended; its bundle is packed and, with a seal key given in Run, sealed.

    `ended` is "exit" (the command ran; see exit_code and signal), or why there is no result: "cancelled",
    "wall_limit", "memory_limit", "disk_limit", "output_limit", "fuel_limit", "bad_input" (no executor could run it),
    "failed" (`reason` says it), or "contract": the result did not pass its acceptance contract, as `report` tells
    (wire/verdict.py). `inline` holds the bundle up to RESULT_INLINE_BYTES_MAX, else it is the stored blob `blob`.
    `plain_hash` is SHA-256 of the unsealed bundle.
    """

    job: bytes
    ended: str
    reason: str
    exit_code: int | None
    signal: int | None
    inline: bytes
    blob: bytes
    blob_bytes: int
    plain_hash: bytes
    output_bytes: int
    duration_s: float
    cpu_s: float
    memory_bytes_max: int
    tokens_in: int = 0
    tokens_out: int = 0
    report: bytes = b""


class InputsReady(Stimulus, frozen=True, gc=False):
    """The files named in PackInputs are stored as blobs (or `error` says what, where and what to do)."""

    request: bytes
    inputs: tuple[dict[str, Any], ...]
    error: dict[str, Any] | None = None


class BlobReady(Stimulus, frozen=True, gc=False):
    """A Fetch ended: all its blobs are stored and verified, or `reason` says why not, and `fault` whose fault it is.

    Asking again goes on where this one ended; `received` bytes are new since it began.
    """

    request: bytes
    reason: str = ""
    inline: bytes = b""
    fault: str = ""
    received: int = 0


LINK = "link"
"""The connection was cut, the other side stalled, or does not give it: it may be had later."""
CONTENT = "content"
"""What came is not what was promised: the sender is convicted."""
STORAGE = "storage"
"""There is no room here, or the disk does not work."""


class Opened(Stimulus, frozen=True, gc=False):
    """An Open ended: `bundle` is the result's summary (execution/bundle.py) and `verdict` how the conditions came out
    that were judged here, or `reason` says why it does not open."""

    request: bytes
    reason: str
    bundle: Any = None
    verdict: Verdict = ()
    fault: str = ""
    """STORAGE where the reason is this machine's own, and says nothing about the executor."""


class Loaded(Stimulus, frozen=True, gc=False):
    """Rows asked for by Load, in order."""

    request: tuple[Any, ...]
    rows: tuple[Any, ...]


class JoinAsked(Stimulus, frozen=True, gc=False):
    """Somebody redeems an invite of ours over the join stream; answered by JoinReply with the same call."""

    call: int
    peer: str
    address: str
    ask: JoinAsk


class JoinAnswered(Stimulus, frozen=True, gc=False):
    """The inviter answered our JoinSend (or it could not be reached: `error`)."""

    call: int
    answer: JoinAnswer | None
    error: str = ""
    inviter: str = ""


class DialEnded(Stimulus, frozen=True, gc=False):
    """A Dial asked for by a command ended; `reason` empty when the peer is connected (or already was)."""

    call: int
    peer: str
    reason: str = ""


class CapacityChanged(Stimulus, frozen=True, gc=False):
    """What the execution adapters can do now: capability words, shell policy by ring, slots, hardware.

    `models` and `prompt_rings` are of the AI endpoint; `prompt_trouble` says why one that is configured does not serve.
    """

    capabilities: tuple[str, ...]
    shell_rings: tuple[str, ...]
    cpu: int
    memory_bytes: int
    gpu: int
    models: tuple[str, ...] = ()
    prompt_rings: tuple[str, ...] = ()
    prompt_trouble: str = ""


class Listening(Stimulus, frozen=True, gc=False):
    """The switch listens at these multiaddrs."""

    addresses: tuple[str, ...]


class NeighbourSeen(Stimulus, frozen=True, gc=False):
    """A node announces itself on the local network at these multiaddrs; nothing of it is proven.

    `tag` shows members of its mesh that it is one of them; empty for a libp2p node that is no clawnet node.
    """

    peer: str
    addresses: tuple[str, ...]
    tag: bytes


class NeighbourGone(Stimulus, frozen=True, gc=False):
    """Nothing on the local network announces that node any longer."""

    peer: str


class Rekeyed(Stimulus, frozen=True, gc=False):
    """The switch listens again, under this node's new key; nothing is dialled yet."""


class MeetPeers(Stimulus, frozen=True, gc=False):
    """Members named by the inviter: connect to them."""

    peers: list[JoinPeer]


class Reloaded(Stimulus, frozen=True, gc=False):
    """The configuration was read again."""


class Drain(Stimulus, frozen=True, gc=False):
    """SIGTERM or `daemon stop`: no new bids or tasks; finish or hand back what runs."""


class Effect(Struct, frozen=True, gc=False):
    """Base of all that Node.step may ask for."""


class Put(Effect, frozen=True, gc=False):
    """Append: insert or replace one row (storage/schema.py names the columns; the key columns come first)."""

    table: str
    row: tuple[Any, ...]


class Delete(Effect, frozen=True, gc=False):
    """Append: delete the row with this key."""

    table: str
    key: tuple[Any, ...]


class Durable(Effect, frozen=True, gc=False):
    """This turn's transaction must reach the disk (synchronous=FULL) before anything leaves: it holds an own entry."""


class Send(Effect, frozen=True, gc=False):
    """One message to one peer, in this turn's batch; dropped when the peer is not connected."""

    peer: str
    message: Message
    reply_to: bytes | None = None
    obligation: bytes | None = None


class Reply(Effect, frozen=True, gc=False):
    """The final answer to a local call: a JSON-able value, or `error` (ClawnetError.as_dict)."""

    call: int
    value: Any = None
    error: dict[str, Any] | None = None


class Notify(Effect, frozen=True, gc=False):
    """A streamed part of the answer to a local call."""

    call: int
    method: str
    value: Any


class Wake(Effect, frozen=True, gc=False):
    """TimerFired(key) at `at_ms` (Unix milliseconds). A later Wake with the same key replaces the earlier one.

    At NEVER the earlier one is forgotten: what it spoke of has ended.
    """

    key: tuple[Any, ...]
    at_ms: int


NEVER = -1


class Run(Effect, frozen=True, gc=False):
    """Start a job: `spec` is an execution.spec.JobSpec."""

    job: bytes
    spec: Any


class StopRun(Effect, frozen=True, gc=False):
    """Kill a job's process group; TaskExited(ended="cancelled") follows, unless it had already ended."""

    job: bytes


class ReadOutput(Effect, frozen=True, gc=False):
    """Read again what a running job wrote: stream 1 or 2, from `offset`, at most `length`; answered by OutputKept."""

    job: bytes
    stream: int
    offset: int
    length: int


class PackInputs(Effect, frozen=True, gc=False):
    """Read these local files or directories into the blob store: (name, path) pairs; answered by InputsReady.
    `schemas`, each with the words it is called by, are looked at first: one that is none is the answer's error."""

    request: bytes
    paths: tuple[tuple[str, str], ...]
    schemas: tuple[tuple[str, bytes], ...] = ()
    gitignore: bool = False


class Fetch(Effect, frozen=True, gc=False):
    """Fetch blobs (hash, size) of a task from a peer; answered by BlobReady. `inline_max`: a small one comes inline.

    Blobs that are here are not fetched if `source`, the peer's owner, has sent them before, or is empty; else the peer
    has to show that it has them.
    """

    request: bytes
    peer: str
    task_id: bytes
    blobs: tuple[tuple[bytes, int], ...]
    inline_max: int = 0
    source: str = ""


class GrantBlob(Effect, frozen=True, gc=False):
    """From now on `peer` may fetch `blob` by naming `task_id`."""

    task_id: bytes
    peer: str
    blob: bytes


class RevokeBlobs(Effect, frozen=True, gc=False):
    """Nobody may fetch the blobs of `task_id` any longer; unshared ones are deleted."""

    task_id: bytes


class Open(Effect, frozen=True, gc=False):
    """Unseal a result (key None: it is not sealed) held inline or as a blob; answered by Opened.
    An opened result is judged by `acceptance`, unless StopJudging names the request. `outputs` are the patterns of the
    files that may be in it, `outputs_bytes_max` bounds their archive.
    """

    request: bytes
    key: bytes | None
    inline: bytes
    blob: bytes
    blob_bytes: int
    acceptance: tuple[Check, ...] = ()
    outputs: tuple[str, ...] = ()
    outputs_bytes_max: int = 0


class StopJudging(Effect, frozen=True, gc=False):
    """Nobody waits for the verdict on an opened result any longer: what judges it is killed, and Opened follows."""

    request: bytes


class ReadBlob(Effect, frozen=True, gc=False):
    """Answer rpc task.read with a piece of a blob: {"data_b64", "size", "eof"}; `gone` is the error when it is lost."""

    call: int
    blob: bytes
    offset: int
    length: int
    gone: dict[str, Any] | None = None


class Load(Effect, frozen=True, gc=False):
    """Read rows on a read-only connection: `query` names one of storage/queries.py; answered by Loaded."""

    request: tuple[Any, ...]
    query: str
    args: tuple[Any, ...]


class Dial(Effect, frozen=True, gc=False):
    """Connect to a peer at these multiaddrs; call 0: keep trying with backoff, else answer with DialEnded."""

    call: int
    peer: str
    addresses: tuple[str, ...]


class Hangup(Effect, frozen=True, gc=False):
    """Close the link to a peer and do not redial; `reason` is told to it."""

    peer: str
    reason: str


class JoinSend(Effect, frozen=True, gc=False):
    """Redeem an invite at the inviter's addresses; answered by JoinAnswered."""

    call: int
    inviter: str
    addresses: tuple[str, ...]
    ask: JoinAsk


class JoinReply(Effect, frozen=True, gc=False):
    """The answer to JoinAsked."""

    call: int
    answer: JoinAnswer


class Adopt(Effect, frozen=True, gc=False):
    """This node has joined another mesh: write the membership, archive the database, rebuild the node.

    The reply to `call` is sent once the new node runs.
    """

    call: int
    answer: JoinAnswer
    value: Any


class Succeeded(Effect, frozen=True, gc=False):
    """A peer goes on as `new`: connections with its key `old` are closed, and what was lent to `old` is lent to `new`.

    Both are ids as the wire knows them.
    """

    old: str
    new: str


class Rotated(Effect, frozen=True, gc=False):
    """This node's rotate entry is durable: its files and its connections go over to the new `key`.

    `row` is the HandoverRow (mesh/ids.py) of that turn. `value` is the answer to `call`, sent once the node listens.
    """

    call: int
    key: Any
    row: Any
    value: Any


class KeepMeshKey(Effect, frozen=True, gc=False):
    """Write the mesh key of this epoch; `older` are those before it, by their numbers."""

    epoch: int
    key: bytes
    older: dict[int, bytes]


class Drained(Effect, frozen=True, gc=False):
    """Nothing runs any longer; the daemon may exit."""


class Log(Effect, frozen=True, gc=False):
    """A log event with fields; level is debug, info, warn, error or security."""

    level: str
    event: str
    fields: dict[str, Any]


class Count(Effect, frozen=True, gc=False):
    """A counter of docs/OPERATIONS.md goes up by `by`."""

    name: str
    label: str = ""
    by: int = 1
