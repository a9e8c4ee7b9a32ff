"""Every control message: its number, its fields, who sends it. Formats are final; docs/PROTOCOL.md comes from here.

Payloads are MessagePack arrays in field order, decoded strictly: a wrong type, a missing field or a value out of its
bound is a WireError. Amounts are micro-credits, `_ms` fields Unix milliseconds, `_s` fields seconds.
"""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

from clawnet import limits
from clawnet.wire.kinds import Kind as Kind

U64 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Ucr = Annotated[int, Meta(ge=0, le=10**15)]
Bytes16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Bytes64 = Annotated[bytes, Meta(min_length=64, max_length=64)]
Name = Annotated[str, Meta(max_length=limits.NAME_CHARS_MAX)]
Text = Annotated[str, Meta(max_length=limits.TEXT_CHARS_MAX)]
Word = Annotated[str, Meta(max_length=64)]
Address = Annotated[str, Meta(max_length=256)]
Share = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Statement = Annotated[bytes, Meta(max_length=4 * limits.KIB)]
EntryBytes = Annotated[bytes, Meta(min_length=64, max_length=limits.ENTRY_BYTES_MAX + 64)]
Entries = Annotated[list[EntryBytes], Meta(max_length=4_096)]
Words = Annotated[list[Word], Meta(max_length=limits.LIST_ITEMS_MAX)]
Rotations = Annotated[list[EntryBytes], Meta(max_length=limits.ROTATIONS_MAX)]
RELAYED_BYTES_MAX: Final = limits.CARD_BYTES_MAX + limits.KIB


class Message(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """Base of all payloads."""


# --- link


class Ping(Message, frozen=True):
    """Liveness and round trip over the control stream; answered by Pong with the same nonce."""

    nonce: U64
    time_ms: U64


class Pong(Message, frozen=True):
    """Answer to Ping; `time_ms` is the answerer's clock (skew is estimated from it)."""

    nonce: U64
    time_ms: U64


class Relayed(Message, frozen=True):
    """A statement that travels on under its author's own signature (over "clawnet/relayed/1" and these bytes).

    `id` is the statement's own: each node takes (author, id) once, within the time window around `time_ms`. `kind` is
    that of the message that carries it, `body` what that kind says.
    """

    author: Address
    id: Bytes16
    time_ms: U64
    kind: U32
    body: Annotated[bytes, Meta(max_length=limits.CARD_BYTES_MAX)]


class PeerInfo(Message, frozen=True):
    """What a node says of itself: `statement` is an encoded Relayed, its body a PeerCard.

    `hops` is not signed: each carrier adds one, and passes nothing on that has reached RELAY_HOPS_MAX.
    """

    statement: Annotated[bytes, Meta(max_length=RELAYED_BYTES_MAX)]
    signature: Bytes64
    hops: Annotated[int, Meta(ge=0, le=limits.RELAY_HOPS_MAX)]


class PeerCard(Message, frozen=True):
    """What a node can do, where it listens, and what its Hello proves. Of two cards the higher `serial` (ms) wins."""

    peer: Address
    serial: U64
    name: Name
    version: Word
    addresses: Annotated[list[Address], Meta(max_length=16)]
    capabilities: Words
    labels: Words
    os: Word
    cpu: U32
    memory_bytes: U64
    gpu: U32
    models: Words
    slots: U32
    running: U32
    queued: U32
    shell_rings: Words
    certificates: Annotated[list[Statement], Meta(max_length=4)] = []
    prompt_rings: Words = []
    rotations: Rotations = []


class Disconnect(Message, frozen=True):
    """The sender closes the link and says why."""

    reason: Text


class Hello(Message, frozen=True):
    """First message on a control stream, from both sides; signed as a whole (wire/session.py).

    `certificates` is the chain from the mesh's founder to this node's key or one before it, to which its `rotations`
    (rotate entries) lead; `remote` is whom the sender believes to be the other end.
    """

    version: Annotated[list[U32], Meta(min_length=2, max_length=2)]
    agent: Word
    peer: Address
    remote: Address
    mesh: Bytes32
    nonce: Bytes32
    time_ms: U64
    name: Name
    certificates: Annotated[list[Statement], Meta(max_length=4)]
    rotations: Rotations


class Ack(Message, frozen=True):
    """The obligation named was durably taken (or had been before)."""

    obligation: Bytes16


class Succession(PeerInfo, frozen=True):
    """A node goes on under another key: `statement` is a Relayed by the key given up, its body a Rotated."""


class Membership(Message, frozen=True):
    """Revocations, sealed mesh keys, and `successions` (alone), each carrying its author's own signature.

    Without statements it asks for what the sender lacks: `digest` has a word for each of MEMBERSHIP_BUCKETS buckets of
    the statements it holds (none at all: it holds none), and the receiver answers with its own of those that differ.
    """

    statements: Annotated[list[Statement], Meta(max_length=limits.MEMBERSHIP_MESSAGE_STATEMENTS)]
    digest: Annotated[list[U64], Meta(max_length=limits.MEMBERSHIP_BUCKETS)] = []
    successions: Annotated[list[Succession], Meta(max_length=limits.SUCCESSIONS_IN_MESSAGE)] = []


class Error(Message, frozen=True):
    """A message was not acted on; `code` is one of the protocol's error numbers, `about` the message id."""

    code: U32
    text: Text
    about: Annotated[bytes, Meta(max_length=32)] = b""


# --- market


class Requirements(Message, frozen=True):
    """What a task needs; zero and empty mean "does not matter". `os` is a family: linux, darwin, windows."""

    capabilities: Words = []
    min_reputation: Share = 0.0
    cpu: U32 = 0
    memory_bytes: U64 = 0
    gpu: U32 = 0
    model: Word = ""
    labels: Words = []
    os: Word = ""


class Offer(Message, frozen=True):
    """MARKET_TASK_ANNOUNCE: all that anyone but the winner ever sees of a task.

    `task` is the salted hash of the task document; `round` counts the auctions of one task; `close_ms` is the outer
    bound for bids; `input_bytes` and `payload_bytes` are sizes only.
    """

    task_id: Bytes16
    round: U32
    kind: Word
    task: Bytes32
    payload_bytes: U64
    input_bytes: U64
    max_budget_ucr: Ucr
    deadline_ms: U64
    close_ms: U64
    lease_s: U32
    requirements: Requirements
    retries: U32 = 0


class Gossip(PeerInfo, frozen=True):
    """MARKET_GOSSIP: an offer that is passed on; `statement` is a Relayed of kind 30, its body an OpenOffer."""


class Bid(Message, frozen=True):
    """MARKET_BID, sealed to the requester: a fixed price for the whole task.

    `estimated_s` is run time, `queue_wait_s` what stands before it; `known_seq` and `known_hash` are the head the
    bidder holds of the requester's chain (known_seq -1 and 32 zero bytes: none); `energy_cost` is in credits.
    """

    task_id: Bytes16
    round: U32
    price_ucr: Ucr
    estimated_s: Seconds
    queue_wait_s: Seconds
    confidence: Share
    capability_hash: Bytes32
    load: Share
    energy_cost: Seconds
    nonce: Bytes16
    known_seq: Annotated[int, Meta(ge=-1, le=2**63 - 1)]
    known_hash: Bytes32


class Decline(Message, frozen=True):
    """TASK_DECLINE: no bid, and why (one of the reasons in docs/PROTOCOL.md)."""

    task_id: Bytes16
    round: U32
    reason: Word


class Winner(Message, frozen=True):
    """MARKET_WINNER: the task document, to the winner alone. Ring own: price 0 and no lock follows."""

    task_id: Bytes16
    attempt: U32
    document: Annotated[bytes, Meta(max_length=limits.TASK_DOCUMENT_BYTES_MAX)]
    price_ucr: Ucr
    deadline_ms: U64
    deliver_by_ms: U64
    stream_output: bool
    locked: bool
    description: Text = ""


class EscrowLock(Message, frozen=True):
    """MARKET_ESCROW_LOCK: where this attempt's line is, and the requester's entries after the head the bidder named."""

    task_id: Bytes16
    attempt: U32
    lock_seq: U64
    lock_hash: Bytes32
    line: U32
    entries: Entries


class Accept(Message, frozen=True):
    """TASK_ACCEPT: durably taken; the executor agrees to the lease."""

    task_id: Bytes16
    attempt: U32


class Reject(Message, frozen=True):
    """TASK_REJECT: durably not started, with the waiver that frees the line (empty where there was no lock)."""

    task_id: Bytes16
    attempt: U32
    reason: Word
    text: Text
    waiver: Statement


class Cancel(Message, frozen=True):
    """TASK_CANCEL, from the requester."""

    task_id: Bytes16
    attempt: U32
    reason: Text


class Result(Message, frozen=True):
    """TASK_RESULT: the note (a signed statement, LEDGER.md section 3; empty in ring own) and the sealed bundle.

    The bundle is inline, or empty and then fetched as the blob `blob` of `blob_bytes` from the sender. A non-empty
    `waiver` gives back what the note does not ask. `cpu_s` and `memory_bytes_max` are the run's cost record.
    """

    task_id: Bytes16
    attempt: U32
    note: Statement
    waiver: Statement
    inline: Annotated[bytes, Meta(max_length=limits.RESULT_INLINE_BYTES_MAX + 64 * limits.KIB)]
    blob: Bytes32
    blob_bytes: U64
    output_bytes: U64
    duration_s: Seconds
    cpu_s: Seconds
    memory_bytes_max: U64


class Progress(Message, frozen=True):
    """TASK_PROGRESS, at least every lease_s / 3, and after the output that a TASK_OUTPUT asked for: the attempt lives.

    `stdout_bytes` and `stderr_bytes` tell how much the command has written so far (0 where previews are not allowed).
    """

    task_id: Bytes16
    attempt: U32
    state: Word
    elapsed_s: Seconds
    stdout_bytes: U64 = 0
    stderr_bytes: U64 = 0


class Output(Message, frozen=True):
    """TASK_OUTPUT: a preview of stdout (1) or stderr (2) as it comes; `offset` is its place in that stream.

    From the requester, with `data` empty, it asks for what follows `offset` in that stream: a bounded piece, then
    TASK_PROGRESS, and from then on what is written while nothing is missing. An offset past the end asks for what
    comes from now on.
    """

    task_id: Bytes16
    attempt: U32
    stream: Annotated[int, Meta(ge=1, le=2)]
    offset: U64
    data: Annotated[bytes, Meta(max_length=limits.OUTPUT_CHUNK_BYTES_MAX)]


class Waiver(Message, frozen=True):
    """TASK_WAIVER: the attempt ends without a result; `waiver` frees the line, `report` says what happened.

    The last four are the cost record of a run that ended so; all 0 when nothing ran.
    """

    task_id: Bytes16
    attempt: U32
    waiver: Statement
    reason: Word
    report: Annotated[bytes, Meta(max_length=64 * limits.KIB)]
    duration_s: Seconds = 0.0
    cpu_s: Seconds = 0.0
    memory_bytes_max: U64 = 0
    output_bytes: U64 = 0


class Settlement(Message, frozen=True):
    """MARKET_SETTLEMENT: entries of `account` up to the release (from the payer) or the claim (from the payee)."""

    account: Bytes32
    entries: Entries
    tasks: Annotated[list[Bytes16], Meta(max_length=limits.ENTRY_ITEMS_MAX)]


# --- ledger


class Head(Message, frozen=True):
    """The newest entry of an account that the sender holds."""

    account: Bytes32
    seq: U64
    hash: Bytes32


class LedgerPull(Message, frozen=True):
    """Asks for entries of `account` from `from_seq` on (inclusive), up to `to_seq`; answered by LedgerPush."""

    account: Bytes32
    from_seq: U64
    to_seq: U64


class LedgerPush(Message, frozen=True):
    """Entries of one account, heads of several, fork proofs. `end` tells that the sender has no later entry."""

    account: Bytes32
    entries: Entries
    heads: Annotated[list[Head], Meta(max_length=limits.HEADS_MAX)] = []
    proofs: Annotated[list[Annotated[bytes, Meta(max_length=256 * limits.KIB)]], Meta(max_length=8)] = []
    end: bool = True


class Countersign(Message, frozen=True):
    """LEDGER_COUNTERSIGN: a request (statement empty) names account, seq and hash; the answer holds the statement."""

    account: Bytes32
    seq: U64
    hash: Bytes32
    statement: Statement
    state: Annotated[bytes, Meta(max_length=512 * limits.KIB)] = b""


# --- joining (its own stream, not in batches)


class JoinAsk(Message, frozen=True):
    """Redeems an invite: the token's secret and the joiner's keys. The proofs sign the rest."""

    mesh: Bytes32
    secret: Bytes16
    node_key: Bytes32
    owner_key: Bytes32
    name: Name
    time_ms: U64
    node_proof: Bytes64
    owner_proof: Bytes64


class JoinPeer(Message, frozen=True):
    """A member to connect to."""

    peer: Address
    name: Name
    addresses: Annotated[list[Address], Meta(max_length=16)]


class JoinAnswer(Message, frozen=True):
    """Admission or the reason for refusal (`refusal` non-empty: everything else is empty).

    `lease_s` above 0: a throw-away membership, over when its holder is not seen for so long; it has no mesh key.
    """

    refusal: Text
    ring: Word = ""
    charter: Statement = b""
    certificates: Annotated[list[Statement], Meta(max_length=4)] = []
    mesh_key: Annotated[bytes, Meta(max_length=32)] = b""
    inviter: Address = ""
    peers: Annotated[list[JoinPeer], Meta(max_length=64)] = []
    lease_s: U32 = 0
    credits_ucr: Ucr = 0


PAYLOADS: Final[dict[Kind, type[Message]]] = {
    Kind.PING: Ping,
    Kind.PONG: Pong,
    Kind.PEER_INFO: PeerInfo,
    Kind.DISCONNECT: Disconnect,
    Kind.HELLO: Hello,
    Kind.ACK: Ack,
    Kind.MEMBERSHIP: Membership,
    Kind.ERROR: Error,
    Kind.TASK_ACCEPT: Accept,
    Kind.TASK_REJECT: Reject,
    Kind.TASK_RESULT: Result,
    Kind.TASK_CANCEL: Cancel,
    Kind.TASK_DECLINE: Decline,
    Kind.TASK_PROGRESS: Progress,
    Kind.TASK_OUTPUT: Output,
    Kind.TASK_WAIVER: Waiver,
    Kind.MARKET_GOSSIP: Gossip,
    Kind.MARKET_TASK_ANNOUNCE: Offer,
    Kind.MARKET_BID: Bid,
    Kind.MARKET_WINNER: Winner,
    Kind.MARKET_ESCROW_LOCK: EscrowLock,
    Kind.MARKET_SETTLEMENT: Settlement,
    Kind.LEDGER_PULL: LedgerPull,
    Kind.LEDGER_PUSH: LedgerPush,
    Kind.LEDGER_COUNTERSIGN: Countersign,
}
KIND_OF: Final[dict[type[Message], Kind]] = {payload: kind for kind, payload in PAYLOADS.items()}
