"""The switch: every connection of the node. It listens, dials, admits, sends and receives, and reports in stimuli.

Of two connections between the same peers the one with the smaller peer id decides alone which stays: it takes the first
Hello it can admit and refuses a second connection, unless the peer opened it so much later that it must have lost the
first. The other side follows: a link is up there once the decider's first batch has come over it. So both sides agree
without a further message, also when they dial each other at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

from clawnet import limits
from clawnet.errors import DataError, LinkError
from clawnet.identity.keys import KeyPair, public_of, verify
from clawnet.identity.multiaddr import Multiaddr
from clawnet.net.blobs import BLOB_PROTOCOL, BlobDesk, BlobStore
from clawnet.net.bulk import BulkRoutes
from clawnet.net.control import CONTROL_PROTOCOL, Link, LinkInfo
from clawnet.net.dialling import DUPLICATE, Dialler, parsed, peer_in, race
from clawnet.net.fetching import BlobFetcher, Wish
from clawnet.net.joining import JOIN_PROTOCOL, JoinDesk
from clawnet.net.listening import listen, reachable
from clawnet.net.names import Names, is_name
from clawnet.net.port import Connection, Listener, Stream, Transport
from clawnet.net.ratelimit import Bans
from clawnet.net.settings import SwitchSettings
from clawnet.net.visits import Visit, Visits
from clawnet.wire.codec import encode_payload
from clawnet.wire.envelope import Envelope
from clawnet.wire.events import LINK, BlobReady, DialEnded, MessageIn, PeerDown, PeerUp, Stimulus
from clawnet.wire.fileevents import Moved
from clawnet.wire.messages import Hello, JoinAnswer, JoinAsk, Message
from clawnet.wire.session import Encoded, Handshake, HelloFacts, Item

PROTOCOLS = (CONTROL_PROTOCOL, BLOB_PROTOCOL, JOIN_PROTOCOL)
"""What inbound streams may speak, besides the transport's own ping and identify."""


class Switch:
    """See the module's first lines. Everything is called from one event loop; `deliver` and `log` must not raise."""

    def __init__(
        self,
        identity: KeyPair,
        settings: SwitchSettings,
        *,
        clock: Callable[[], int],
        entropy: Callable[[int], bytes],
        transports: Mapping[str, Transport],
        local_hello: Callable[[], HelloFacts],
        admit: Callable[[str, Hello, str], str],
        deliver: Callable[[Stimulus], None],
        blobs: BlobStore,
        log: Callable[[str, str, dict[str, Any]], None],
        addresses_of: Callable[[str], Sequence[str]] = lambda _: (),
    ) -> None:
        self.peer_id = identity.peer_id
        self.settings = settings
        self.clock = clock
        self.ping_interval_s = settings.ping_interval_s
        self.counters: Counter[str] = Counter()
        self.bans = Bans()
        self._identity = identity
        self._entropy = entropy
        self._transports = transports
        self._local_hello = local_hello
        self._admit_peer = admit
        self._deliver = deliver
        self._log = log
        self._joins = JoinDesk(deliver, self.note)
        self._blobs = BlobDesk(blobs, self.note, self.count, self._moved)
        self._fetcher = BlobFetcher(blobs, self.note, self.count, self._moved)
        self._names = Names()
        self._bulk = BulkRoutes(self._dial_bulk, addresses_of)
        self._links: dict[str, Link] = {}
        self._chosen: dict[str, Link] = {}
        self._visits = Visits(self, self._fetcher.forget)
        self._diallers: dict[str, Dialler] = {}
        self._listeners: list[Listener] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._early: list[tuple[int, str, tuple[str, ...], bool]] | None = []
        self._stopping = False

    # --- the runtime's side

    async def start(self) -> list[str]:
        """Listens; returns the multiaddrs under which this node can be dialled. ConfigError when a port is taken."""
        self._loop = asyncio.get_running_loop()
        settings = self.settings
        for name, transport in self._transports.items():
            transport.doors.tell = self._visits.at_the_door
            self._listeners += await listen(name, transport, settings, self._on_connection, self.note)
        early, self._early = self._early or [], None
        for asked in early:
            self.dial(*asked)
        return self.addresses()

    def addresses(self) -> list[str]:
        """The multiaddrs under which this node can be dialled, as far as it can know."""
        return reachable(self._listeners, self.peer_id)

    async def stop(self, reason: str = "the node stops") -> None:
        """Says goodbye on every link, stops dialling and listening, and waits at most GOODBYE_S for it all to leave."""
        self._stopping = True
        for dialler in list(self._diallers.values()):
            dialler.cancel(reason)
        self._diallers.clear()
        for listener in self._listeners:
            await listener.close()
        self._listeners.clear()
        visits = list(self._visits)
        for visit in visits:
            if visit.link is not None:
                visit.link.close(reason)
            visit.connection.close(reason)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        waiting: list[asyncio.Future[Any]] = [*tasks, *(visit.connection.closed for visit in visits)]
        waiting += [asyncio.ensure_future(transport.close()) for transport in self._transports.values()]
        if waiting:
            await asyncio.wait(waiting, timeout=limits.GOODBYE_S)

    async def rekey(self, identity: KeyPair, transports: Mapping[str, Transport]) -> list[str]:
        """Goes over to another key: every connection ends, and the same ports listen again. As start otherwise."""
        self._early = []
        self.settings = self.settings.at([where for listener in self._listeners for where in listener.addresses])
        await self.stop("this node goes on under another key")
        self.peer_id, self._identity, self._transports = identity.peer_id, identity, transports
        self._stopping = False
        return await self.start()

    def send(self, peer: str, items: list[Item]) -> bool:
        """These messages in one write; False when the peer is not connected (or has just been dropped)."""
        link = self._links.get(peer)
        return link is not None and link.send(items)

    def send_many(self, peers: Iterable[str], message: Message) -> int:
        """One message to several peers, encoded once; returns to how many it went."""
        kind, payload = encode_payload(message)
        items: list[Encoded] = [(kind, payload, None, None)]
        links = [self._links[peer] for peer in peers if peer in self._links]
        return sum(link.send_encoded(items) for link in links)

    def dial(self, call: int, peer: str, addresses: Sequence[str], keep: bool = False) -> None:
        """Connects to a peer; `keep` tries for ever and again after every loss. A call gets DialEnded; of a kept peer
        its first failure is told under call 0, so that nobody waits for a machine that is off.

        What is asked before the start is done once this node listens.
        """
        if self._early is not None:
            self._early.append((call, peer, tuple(addresses), keep))
            return
        peer = peer or peer_in(addresses)
        keep = keep and bool(peer)
        if peer == self.peer_id:
            self.dial_ended(call, peer, "this is the node itself")
            return
        if self._stopping:
            self.dial_ended(call, peer, "the node stops")
            return
        linked = peer in self._links
        if linked and not keep:
            self.dial_ended(call, peer, "")
            return
        key = peer or " ".join(addresses)
        dialler = self._diallers.get(key)
        if dialler is None:
            if len(self._diallers) >= limits.DIALS_MAX:
                self.dial_ended(call, peer, "too many peers are being dialled")
                return
            dialler = self._diallers[key] = Dialler(self, peer, key)
        if linked:
            if dialler.addresses and not set(addresses) <= set(dialler.addresses):
                self._links[peer].probe()
            dialler.keep = True
            dialler.addresses = tuple(addresses)
            self.dial_ended(call, peer, "")
        else:
            dialler.want(call, addresses, keep)

    def hangup(self, peer: str, reason: str) -> None:
        """Ends the link to a peer and does not dial it again."""
        self._early = self._early and [asked for asked in self._early if asked[1] != peer]
        dialler = self._diallers.pop(peer, None)
        if dialler is not None:
            dialler.cancel(reason)
        for visit in self._visits:
            if visit.connection.peer == peer:
                if visit.link is not None:
                    visit.link.close(reason)
                visit.connection.close(reason)

    def hangup_all(self, reason: str) -> None:
        """Ends every link and all dialling, but goes on listening: the node is about to be another one."""
        for peer in {*self._diallers, *(visit.connection.peer for visit in self._visits)}:
            self.hangup(peer, reason)

    def network_changed(self) -> None:
        """This machine slept or moved: every link has to show that it lives, every pause before a dial ends."""
        for link in list(self._links.values()):
            link.probe()
        for dialler in list(self._diallers.values()):
            dialler.hurry()

    def join(self, call: int, inviter: str, addresses: Sequence[str], ask: JoinAsk) -> None:
        """Redeems an invite; JoinAnswered follows."""
        self._spawn(self._joins.ask(call, inviter, partial(self.connect, inviter, addresses), ask))

    def join_reply(self, call: int, answer: JoinAnswer) -> None:
        """Answers JoinAsked."""
        self._joins.reply(call, answer)

    def _moved(self, what: str, about: bytes, done: int, total: int) -> None:
        self._deliver(Moved(what, about, done, total))

    def fetch(
        self,
        request: bytes,
        peer: str,
        task_id: bytes,
        blobs: Sequence[tuple[bytes, int]],
        inline_max: int = 0,
        source: str = "",
    ) -> None:
        """Fetches blobs (id, size) of a task; BlobReady follows, before the start of the switch with a reason."""
        if self._early is not None:
            self._deliver(BlobReady(request, f"{peer} is not connected yet", fault=LINK))
            return
        self._spawn(self._fetch(request, peer, Wish(task_id, blobs, inline_max, source)))

    def connection(self, peer: str) -> Connection:
        """The open connection to a peer; raises LinkError when there is none."""
        link = self._links.get(peer)
        if link is None:
            raise LinkError("that peer is not connected", hint="`clawnet peer connect` dials it", peer=peer)
        return link.connection

    def links(self) -> list[LinkInfo]:
        """Every link that is up."""
        return [link.info() for link in self._links.values()]

    def link(self, peer: str) -> LinkInfo | None:
        """The link to one peer."""
        link = self._links.get(peer)
        return link.info() if link is not None else None

    def rtt_ms(self, peer: str) -> float:
        """The smoothed round trip to a peer; 0 while unknown."""
        link = self._links.get(peer)
        return link.rtt_ms if link is not None else 0.0

    def skew_ms(self, peer: str) -> int | None:
        """How far a peer's clock is ahead of ours, by its last answer to a ping; None before the first."""
        link = self._links.get(peer)
        return link.skew_ms if link is not None and link.rtt_ms else None

    def ups(self) -> list[PeerUp]:
        """What a node that was rebuilt has to be told: who is connected."""
        return [_up(link) for link in self._links.values()]

    def gauges(self) -> dict[str, int]:
        """What is open now, for metrics and the doctor."""
        return {
            "links": len(self._links),
            "connections": len(self._visits),
            "dialling": len(self._diallers),
            "send_queue_bytes": sum(link.info().buffered for link in self._links.values()),
        }

    # --- the links' side

    def admit(self, link: Link, hello: Hello) -> str:
        """See control.LinkOwner."""
        peer = link.peer
        if self._stopping:
            return "the node stops"
        if left_s := self.bans.left_s(peer, self._loop.time()):
            return f"banned for {left_s:.0f} s more"
        if refusal := self._admit_peer(peer, hello, link.wanted):
            self.note("security", "membership.refused", peer=peer, address=link.connection.address, reason=refusal)
            return refusal
        if peer not in self._links and len(self._links) >= self.settings.links_max:
            return f"this node has its {self.settings.max_peers} peers already"
        if self.peer_id < peer:
            chosen = self._chosen.get(peer)
            if chosen is not None and chosen.hello is not None:
                if hello.time_ms - chosen.hello.time_ms <= 1000 * limits.HANDSHAKE_TIMEOUT_S:
                    chosen.probe()
                    return DUPLICATE
                chosen.close("replaced by a newer connection")
            self._chosen[peer] = link
        return ""

    def link_up(self, link: Link) -> None:
        """See control.LinkOwner."""
        peer = link.peer
        current = self._links.get(peer)
        if current is not None:
            if self.peer_id > peer and link.welcomed_ms < current.welcomed_ms:
                current.probe()  # it may be dead, and the peer's clock set back
                link.close("older than the present connection")
                return
            current.close("replaced by a newer connection")
        self._links[peer] = link
        self._visits.linked(link.connection)
        self.note("info", "link.up", peer=peer, address=link.connection.address, inbound=link.connection.inbound)
        self.count("links_up")
        self._deliver(_up(link))
        dialler = self._diallers.get(peer)
        if dialler is not None:
            dialler.linked()

    def link_message(self, link: Link, envelope: Envelope, message: Message) -> None:
        """See control.LinkOwner."""
        self.counters["messages_received"] += 1
        self._deliver(MessageIn(link.peer, envelope.id, message, envelope.reply_to, envelope.obligation))

    def link_down(self, link: Link, reason: str) -> None:
        """See control.LinkOwner."""
        peer = link.peer
        if self._chosen.get(peer) is link:
            del self._chosen[peer]
        if self._links.get(peer) is not link:
            return
        del self._links[peer]
        self._bulk.link_down(peer)
        self._drop_unlinked(peer)
        self.note("info", "link.down", peer=peer, reason=reason)
        self.count("links_down")
        self._deliver(PeerDown(peer, reason))
        dialler = self._diallers.get(peer)
        if dialler is not None:
            dialler.lost(self._loop.time() - link.up_s)

    def ban(self, peer: str, reason: str) -> None:
        """See control.LinkOwner."""
        length_s = self.bans.ban(peer, self._loop.time())
        self.count("bans")
        self.note("security", "peer.banned", peer=peer, seconds=length_s, reason=reason)

    def note(self, level: str, event: str, **fields: Any) -> None:
        """A log event."""
        self._log(level, event, fields)

    def count(self, name: str, by: int = 1) -> None:
        """A counter goes up."""
        self.counters[name] += by

    # --- the diallers' side

    async def connect(self, peer: str, addresses: Sequence[str]) -> Connection:
        """See dialling.DialOwner."""
        timeout_s = self.settings.connection_timeout_s
        targets = [where for where in parsed(addresses) if where.transport in self._transports]
        if not targets:
            spoken = " and ".join(self._transports) or "no transport"
            raise LinkError(f"this node speaks {spoken}, and no address of that peer is for it")

        return await race(partial(self._dial, peer, timeout_s), targets)

    async def _dial(self, peer: str, timeout_s: float, where: Multiaddr) -> Connection:
        self._visits.may_dial(where.host, self._loop.time())
        if is_name(where):  # any number of names may stand for one address: that counts too
            return await race(partial(self._dial, peer, timeout_s), await self._names.addresses(where, timeout_s))
        return await self._transports[where.transport].dial(where, peer or None, timeout_s)

    async def open_link(self, connection: Connection, wanted: str = "") -> Link:
        """See dialling.DialOwner."""
        if connection.peer in self._links or self._stopping:
            connection.close(DUPLICATE)
            raise LinkError(DUPLICATE, peer=connection.peer)
        visit = self._watch(connection)
        try:
            return self._greet(visit, await connection.open_stream([CONTROL_PROTOCOL]), wanted)
        except (LinkError, asyncio.CancelledError):
            connection.close("no control stream")
            raise

    def chance(self) -> float:
        """See dialling.DialOwner."""
        return int.from_bytes(self._entropy(4), "big") / 2**32

    def dial_ended(self, call: int, peer: str, reason: str) -> None:
        """See dialling.DialOwner."""
        if call or reason:
            self._deliver(DialEnded(call, peer, reason))

    def dialler_idle(self, dialler: Dialler) -> None:
        """See dialling.DialOwner."""
        if self._diallers.get(dialler.key) is dialler:
            del self._diallers[dialler.key]

    # --- connections and streams

    def _on_connection(self, connection: Connection) -> None:
        if self._stopping:
            connection.close("the node stops")
        elif self._visits.welcome(connection, self.settings.max_peers, known=connection.peer in self._links):
            self._watch(connection)

    def _watch(self, connection: Connection) -> Visit:
        visit = self._visits.watch(connection, known=connection.peer in self._links)
        connection.set_stream_handler(partial(self._on_stream, visit))
        return visit

    def _drop_unlinked(self, peer: str) -> None:
        """Connections for bulk data alone go with the link that vouched for them."""
        for visit in self._visits:
            if visit.connection.peer == peer and visit.link is None and visit.blobs:
                visit.connection.close("its link is gone")

    def _on_stream(self, visit: Visit, stream: Stream) -> None:
        connection = visit.connection
        link = self._links.get(connection.peer)
        if self._stopping:
            stream.reset()
        elif stream.protocol == CONTROL_PROTOCOL and connection.inbound and visit.link is None:
            try:
                self._greet(visit, stream)
            except LinkError as problem:
                connection.close(problem.message)
        elif stream.protocol == BLOB_PROTOCOL and link is not None and visit.link in (link, None):
            self._spawn(self._serve_blobs(visit, stream))
        elif stream.protocol == JOIN_PROTOCOL and connection.inbound:
            self._spawn(self._joins.serve(stream))
        else:
            self.count("streams_refused")
            stream.reset()

    async def _serve_blobs(self, visit: Visit, stream: Stream) -> None:
        visit.blobs += 1
        try:
            await self._blobs.serve(stream)
        finally:
            visit.blobs -= 1

    async def _dial_bulk(self, peer: str, addresses: Sequence[Multiaddr]) -> Connection:
        if "tcp" not in self._transports:
            raise LinkError("this node does not speak TCP")
        connection = await race(partial(self._dial, peer, limits.BULK_DIAL_S), addresses)
        connection.closed.add_done_callback(lambda _: self._fetcher.forget(connection))
        connection.closed.add_done_callback(lambda _: self._visits.cut(connection))
        return connection

    def _greet(self, visit: Visit, stream: Stream, wanted: str = "") -> Link:
        peer = visit.connection.peer
        try:
            public = public_of(peer)
        except DataError as problem:
            raise LinkError(f"{peer} has no Ed25519 key: {problem.message}", peer=peer) from problem
        handshake = Handshake(
            self.peer_id,
            peer,
            self._local_hello(),
            agent=self.settings.agent,
            nonce=self._entropy(32),
            now_ms=self.clock(),
            sign=self._identity.sign,
            verify=partial(verify, public),
        )
        link = visit.link = Link(self, stream, handshake, wanted)
        link.start()
        return link

    async def _fetch(self, request: bytes, peer: str, wish: Wish) -> None:
        try:
            self._deliver(await self._fetcher.outcome(request, peer, wish, self._bulk_way))
        except asyncio.CancelledError:
            self._deliver(BlobReady(request, "the connection was closed", b"", LINK, wish.received))
            raise

    def _bulk_way(self, peer: str, size: int) -> AbstractAsyncContextManager[Connection]:
        return self._bulk.route(self.connection(peer), size)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_over)

    def _task_over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (defect := task.exception()) is not None:
            self.note("error", "net.defect", problem=repr(defect))
            self._loop.call_exception_handler({"message": "a network task failed", "exception": defect, "task": task})


def _up(link: Link) -> PeerUp:
    assert link.hello is not None
    connection = link.connection
    return PeerUp(link.peer, link.hello, connection.address, connection.transport, connection.inbound)
