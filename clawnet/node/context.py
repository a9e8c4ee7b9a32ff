"""What the rooms of the node share: the clock of this step, the effects so far, the links, the outbox."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from clawnet import limits
from clawnet.config import Config
from clawnet.errors import ClawnetError
from clawnet.identity.keys import KeyPair
from clawnet.mesh.ids import PeerIds
from clawnet.wire.codec import encode_payload
from clawnet.wire.events import (
    NEVER,
    Count,
    Delete,
    Durable,
    Effect,
    GrantBlob,
    Log,
    Notify,
    Put,
    Reply,
    RevokeBlobs,
    Send,
    Wake,
)
from clawnet.wire.messages import KIND_OF, PAYLOADS, Kind, Message

Rebuild = Callable[[bytes], "Message | None"]


class Ports(Struct, frozen=True):
    """What a node cannot have of its own: entropy, its signature, round trips, the owner key where it lies here."""

    entropy: Callable[[int], bytes]
    sign: Callable[[bytes], bytes]
    rtt_ms: Callable[[str], float]
    owner: KeyPair | None = None
    skew_ms: Callable[[str], int | None] | None = None
    """How far a peer's clock is ahead of ours by its last answer to a ping; None while unknown: then HELLO counts."""
    unseal: Callable[[bytes], bytes | None] = lambda sealed: None
    """Opens what was sealed to this node's key; None when it was not."""
    host: str = ""
    """Where the database lies, "machine file" (observe/host.py): another place may be a copy. Empty: not told."""
    room_bytes: Callable[[], int] = lambda: 2**62
    """How many bytes more the disk takes, and `storage.max_size` allows."""


class Link(Struct):
    """A connected member: what HELLO showed, and how far its clock is from ours."""

    peer: str
    account: bytes
    ring: str
    skew_ms: int
    address: str
    transport: str
    inbound: bool
    since_ms: int


def job_id(requester: str, task_id: bytes, attempt: int) -> bytes:
    """16 bytes: how requester and executor both name an award, and the blobs that they lend each other for it."""
    return hashlib.blake2b(requester.encode() + task_id + attempt.to_bytes(4, "big"), digest_size=16).digest()


def held_as(key: bytes, what: str) -> bytes:
    """16 bytes: the name under which a node holds blobs for its own part of a task or award."""
    return hashlib.blake2b(what.encode() + key, digest_size=16).digest()


class Context:
    """The step in progress. Rooms append effects; the kernel hands them to the runtime at the end of the turn."""

    def __init__(self, me: str, account: bytes, config: Config, ports: Ports) -> None:
        self.me = me
        """This node within: its first id, which is its account's."""
        self.wire_me = me
        """The same as others see it: the id of its present key."""
        self.ids = PeerIds()
        self.account = account
        self.config = config
        self.ports = ports
        self.now = 0
        self.out: list[Effect] = []
        self.links: dict[str, Link] = {}
        self.draining = False
        self.credential = ""
        """Whose call is being handled (RpcCall.credential)."""

    def entropy(self, count: int) -> bytes:
        """`count` random bytes from the injected port."""
        return self.ports.entropy(count)

    def send(self, peer: str, message: Message, reply_to: bytes | None = None) -> None:
        """A message without obligation; lost when the peer is not connected."""
        if peer == self.me or peer in self.links:
            self.out.append(Send(peer, message, reply_to))

    def connected(self, peer: str) -> bool:
        """True for a linked peer, and for this node itself."""
        return peer == self.me or peer in self.links

    def put(self, table: str, *row: Any) -> None:
        """Insert or replace a row in this turn's transaction."""
        self.out.append(Put(table, row))

    def delete(self, table: str, *key: Any) -> None:
        """Delete a row in this turn's transaction."""
        self.out.append(Delete(table, key))

    def lend(self, key: bytes, peer: str, blob: bytes) -> None:
        """From now on `peer` may fetch the blob by naming `key`, over restarts too, until let_go(key)."""
        self.put("blob_grants", key, peer, blob)
        self.out.append(GrantBlob(key, peer, blob))

    def hold(self, key: bytes, blob: bytes) -> None:
        """The blob is kept for this node's own use until let_go(key)."""
        self.lend(key, self.me, blob)

    def let_go(self, key: bytes) -> None:
        """Nobody needs the blobs of `key` any longer; those that no other key holds are deleted."""
        self.delete("blob_grants", key)
        self.out.append(RevokeBlobs(key))

    def durable(self) -> None:
        """This turn's transaction holds an own chain entry: it is synced before anything leaves."""
        self.out.append(Durable())

    def wake(self, key: tuple[Any, ...], at_ms: int) -> None:
        """TimerFired(key) at `at_ms`; replaces an earlier one."""
        self.out.append(Wake(key, max(at_ms, self.now)))

    def sleep(self, key: tuple[Any, ...]) -> None:
        """No TimerFired(key) any more: nothing can be due."""
        self.out.append(Wake(key, NEVER))

    def log(self, level: str, event: str, **fields: Any) -> None:
        """One structured log line."""
        self.out.append(Log(level, event, fields))

    def count(self, name: str, label: str = "", by: int = 1) -> None:
        """A counter goes up."""
        self.out.append(Count(name, label, by))

    def reply(self, call: int, value: Any) -> None:
        """The answer to a local call."""
        self.out.append(Reply(call, value))

    def fail(self, call: int, error: ClawnetError) -> None:
        """The error to a local call."""
        self.out.append(Reply(call, None, error.as_dict()))

    def notify(self, call: int, method: str, value: Any) -> None:
        """A streamed part of the answer to a local call."""
        self.out.append(Notify(call, method, value))


class Obligation(Struct):
    """One row of the outbox: a message that is sent again until it is acknowledged."""

    id: bytes
    peer: str
    created_ms: int
    about: bytes
    kind: Kind
    payload: bytes
    tries: int = 0
    due_ms: int = 0


class Outbox:
    """Messages that must arrive (DESIGN section 2). A row is written with what it obliges to; an answer deletes it.

    A kind with a registered rebuild function stores no payload: the message is made again from the state it speaks of,
    and None means that the state no longer owes it.
    """

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self.rows: dict[bytes, Obligation] = {}
        self._of_peer: dict[str, dict[bytes, None]] = {}
        self._of: dict[tuple[Kind, str, bytes], bytes] = {}
        self._rebuild: dict[Kind, Rebuild] = {}
        self._armed_ms = 0

    def register(self, kind: Kind, rebuild: Rebuild) -> None:
        """Messages of `kind` are rebuilt from their `about` instead of being stored."""
        self._rebuild[kind] = rebuild

    def load(self, row: tuple[Any, ...]) -> None:
        """Takes in a stored row at start-up."""
        obligation, peer, created_ms, about, kind, payload = row
        self._add(Obligation(obligation, peer, created_ms, about, Kind(kind), payload))

    def _add(self, row: Obligation) -> None:
        self.rows[row.id] = row
        self._of_peer.setdefault(row.peer, {})[row.id] = None
        self._of[(row.kind, row.peer, row.about)] = row.id

    def oblige(self, peer: str, message: Message, about: bytes) -> bytes:
        """Writes the row and sends the message for the first time. An equal (kind, peer, about) is replaced."""
        ctx = self._ctx
        kind = KIND_OF[type(message)]
        self.settle(kind, peer, about)
        identifier = hashlib.blake2b(
            ctx.now.to_bytes(8, "big") + len(ctx.out).to_bytes(4, "big") + peer.encode() + about + ctx.entropy(8),
            digest_size=16,
        ).digest()
        payload = b"" if kind in self._rebuild else encode_payload(message)[1]
        row = Obligation(identifier, peer, ctx.now, about, kind, payload)
        self._add(row)
        ctx.put("outbox", identifier, peer, ctx.now, about, int(kind), payload)
        self._send(row, message)
        return identifier

    def _send(self, row: Obligation, message: Message) -> None:
        ctx = self._ctx
        wait_ms = min(limits.OUTBOX_RESEND_MIN_MS << min(row.tries, 8), limits.OUTBOX_RESEND_MAX_MS)
        row.due_ms = ctx.now + wait_ms
        if ctx.connected(row.peer):
            row.tries += 1
            ctx.out.append(Send(row.peer, message, None, row.id))
        self._arm(row.due_ms)

    def _arm(self, at_ms: int) -> None:
        if self._armed_ms <= self._ctx.now or at_ms < self._armed_ms:
            self._armed_ms = at_ms
            self._ctx.wake(("outbox",), at_ms)

    def owed(self, peer: str) -> int:
        """How many messages this peer has not acknowledged."""
        return len(self._of_peer.get(peer, ()))

    def settle(self, kind: Kind, peer: str, about: bytes) -> bool:
        """The obligation of this kind about this thing is met; False when there was none."""
        identifier = self._of.get((kind, peer, about))
        return identifier is not None and self.acknowledged(identifier, peer)

    def acknowledged(self, identifier: bytes, peer: str) -> bool:
        """The obligation named is met; only the peer it was owed to may say so."""
        row = self.rows.get(identifier)
        if row is None or row.peer != peer:
            return False
        del self.rows[identifier]
        mine = self._of_peer[row.peer]
        del mine[identifier]
        if not mine:
            del self._of_peer[row.peer]
        self._of.pop((row.kind, row.peer, row.about), None)
        self._ctx.delete("outbox", identifier)
        return True

    def peer_up(self, peer: str) -> None:
        """A peer is back: everything owed to it goes out again, oldest first."""
        for identifier in list(self._of_peer.get(peer, ())):
            row = self.rows[identifier]
            row.tries = 0
            self._again(row)

    def timer(self) -> None:
        """Sends again what is due and not acknowledged."""
        ctx = self._ctx
        self._armed_ms = 0
        due_ms = 0
        for peer in list(self._of_peer):
            if not ctx.connected(peer):
                continue
            for identifier in list(self._of_peer.get(peer, ())):
                row = self.rows[identifier]
                if row.due_ms <= ctx.now or row.due_ms > ctx.now + limits.OUTBOX_RESEND_MAX_MS:
                    self._again(row)
                elif not due_ms or row.due_ms < due_ms:
                    due_ms = row.due_ms
        if due_ms:
            self._arm(due_ms)

    def _again(self, row: Obligation) -> None:
        rebuild = self._rebuild.get(row.kind)
        message: Message | None = None
        if rebuild is not None:
            message = rebuild(row.about)
        else:
            try:
                message = _decoder(row.kind).decode(row.payload)
            except msgspec.DecodeError as error:
                self._ctx.log("error", "outbox.unreadable", kind=row.kind.name, reason=str(error))
        if message is None:
            self.acknowledged(row.id, row.peer)
        else:
            self._send(row, message)


_decoders: dict[Kind, msgspec.msgpack.Decoder[Message]] = {}


def _decoder(kind: Kind) -> msgspec.msgpack.Decoder[Message]:
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(PAYLOADS[kind])
    return decoder
