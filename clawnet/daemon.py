"""The composition root: one plain function builds a node's daemon out of its parts and runs it until it is to stop."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clawnet import PROTOCOL_ID, __version__, config, handover, limits, rpc
from clawnet.adoption import adopted, settle_in, write_aside
from clawnet.config import Config
from clawnet.errands import End, Errands, end_all
from clawnet.errors import ClawnetError, ConfigError, StorageError
from clawnet.execution.executor import Executor
from clawnet.execution.spec import ExecutionSettings
from clawnet.identity import membership
from clawnet.identity.certificates import read_charter
from clawnet.identity.keys import KeyPair, peer_id_of
from clawnet.identity.membership import LocalMembership
from clawnet.ipc.server import IpcServer
from clawnet.ledger.terms import LedgerTerms
from clawnet.net.carriers import carriers
from clawnet.net.listening import gave_way, ports_findings
from clawnet.net.ping import measure
from clawnet.net.settings import SwitchSettings
from clawnet.net.switch import PROTOCOLS, Switch
from clawnet.net.vicinity import Vicinity
from clawnet.node.context import Ports
from clawnet.node.kernel import Node
from clawnet.node.members import MeshFacts
from clawnet.node.params import integer
from clawnet.observe import host
from clawnet.observe.logs import Observer
from clawnet.observe.process import on_signals, rss_bytes
from clawnet.paths import Home
from clawnet.runtime import Runtime
from clawnet.storage.blobs import BlobStore
from clawnet.storage.filelock import FileLock
from clawnet.storage.store import Store
from clawnet.timers import every
from clawnet.wire import events as e
from clawnet.wire.messages import Hello, JoinAnswer
from clawnet.wire.session import HelloFacts

SWEEP_EVERY_S, SWEEP_FIRST_S = 3_600.0, 60.0
OS_FAMILIES = {"linux": "linux", "darwin": "darwin", "win32": "windows", "android": "linux", "cygwin": "windows"}


def clock_ms() -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000


def run(
    home: Home,
    environ: Mapping[str, str],
    flags: Mapping[str, str] | None = None,
    *,
    ready: Callable[[list[str]], None] = lambda addresses: None,
    worker_argv: tuple[str, ...] = (),
) -> int:
    """Runs the daemon of `home` in the foreground until SIGTERM, SIGINT or `daemon stop`; returns the exit code.

    A home that was never initialised is initialised with defaults. `ready` is told the addresses once the daemon
    answers. Raises ConfigError when another daemon has the home, or its configuration or keys cannot be used.
    """
    settings = config.load(home, environ, flags)
    data_dir = settings.path("node.data_dir")
    if data_dir is not None:
        home = home.with_data_dir(data_dir)
    check = settings.flag("security.check_permissions")
    handover.settle(home, check_permissions=check)
    initial_ucr = settings.amount_ucr("market.initial_wallet_balance")
    made = membership.create_home(
        home,
        settings.text("node.name"),
        secrets.token_bytes,
        clock_ms(),
        initial_balance_ucr=initial_ucr,
        check_permissions=check,
    )
    if not home.config_file.exists():
        config.write_new(home.config_file, {})
    lock = FileLock.take(home.lock_file, what=f"the home {home.dir}")
    try:
        daemon = Daemon(home, settings, environ, flags or {}, made.node, worker_argv)
        return asyncio.run(daemon.serve(ready))
    finally:
        lock.release()


class Daemon:
    """One node as a process: the parts that live as long as it does, and the node and store that a join replaces."""

    def __init__(
        self,
        home: Home,
        settings: Config,
        environ: Mapping[str, str],
        flags: Mapping[str, str],
        key: KeyPair,
        worker_argv: tuple[str, ...],
    ) -> None:
        self.home = home
        self.config = settings
        self.environ = environ
        self.flags = flags
        self.key = key
        self.observer = Observer.open(settings, home)
        self.started_ms = clock_ms()
        self.exit_code = 0
        self._worker_argv = worker_argv
        self._next_key: KeyPair | None = None
        self._errands = Errands(
            lambda *answer: self.runtime.perform([e.Reply(*answer)]), lambda *defect: self.runtime.report(*defect)
        )
        self._store: Store
        self._node: Node
        self._warnings: list[str] = []

    async def serve(self, ready: Callable[[list[str]], None]) -> int:
        """Builds, runs, and takes everything down again."""
        loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self.blobs = BlobStore(self.home.blobs_dir, self.config.integer("storage.max_size"))
        self._store = Store.open(self.home.database)
        self.ipc = IpcServer(self._socket_name(), self._call, self._gone, self._calls_waiting)
        self.executor = Executor(
            self._execution(), self.home, self.blobs, entropy=secrets.token_bytes, deliver=self._deliver
        )
        try:
            self.switch = self._make_switch()
            self.vicinity = self._make_vicinity()
            self._compose()
            await self.executor.start()
            addresses = await self.switch.start()
            self._warnings += gave_way(self.switch.settings, addresses)
            self._listening(addresses)
            self.vicinity.start()
            on_signals(loop, self.drain, lambda: self._reload({}))
            await self.ipc.start()
            every(SWEEP_EVERY_S, self._sweep, first_s=SWEEP_FIRST_S)
            metrics = await self._metrics()
            self._log("info", "daemon.ready", pid=os.getpid(), peer=self.key.peer_id, listen=" ".join(addresses))
            ready(addresses)
            gc.collect()
            gc.freeze()
            await self._over.wait()
            if metrics is not None:
                metrics.close()
            if not self.exit_code:
                self._store.served()
        finally:
            await self._take_down()
        return self.exit_code

    # --- composition

    def _compose(self) -> None:
        """The node, the runtime and the switch around it."""
        self.runtime = Runtime(
            peer_id_of(self._local().account(self.key.public)),
            clock=clock_ms,
            store=self._store,
            blobs=self.blobs,
            executor=self.executor,
            ipc=self.ipc,
            observer=self.observer,
            rebuild=self._build,
            adopt=lambda effect: self._errands.begin(effect.call, "peer.join", lambda: self._become_member(effect)),
            drained=self._over.set,
            fail=self._failed,
        )
        self.runtime.switch = self.switch
        self.runtime.keep_mesh_key = self._keep_mesh_key
        self.runtime.rotated = self._rotated
        self._node, effects = self._build()
        self.runtime.node = self._node
        self.runtime.perform(effects)

    def _make_switch(self) -> Switch:
        settings = SwitchSettings.of(self.config, f"clawnet/{__version__}")
        return Switch(
            self.key,
            settings,
            clock=clock_ms,
            entropy=secrets.token_bytes,
            transports=carriers(self.key, PROTOCOLS, settings),
            local_hello=self._hello,
            admit=self._admit,
            deliver=self._deliver,
            blobs=self.blobs,
            log=self.observer.log,
            addresses_of=lambda peer: self._node.addresses(peer),
        )

    def _make_vicinity(self) -> Vicinity:
        return Vicinity(
            self.switch,
            mdns=self.config.flag("network.enable_mdns"),
            clock=clock_ms,
            entropy=secrets.token_bytes,
            tag=lambda: self._node.rooms.neighbours.tag(),
            is_ours=lambda peer, tag: self._node.rooms.neighbours.is_ours(peer, tag),
            deliver=self._deliver,
            log=self.observer.log,
        )

    def _build(self) -> tuple[Node, list[e.Effect]]:
        """A node from what the database and the home hold."""
        check = self.config.flag("security.check_permissions")
        local = self._local()
        owner = KeyPair.load(self.home.owner_key, check_permissions=check) if self.home.owner_key.exists() else None
        mesh_key = membership.load_mesh_key(self.home, check_permissions=check)
        facts = MeshFacts.of(local, self.key.public, mesh_key)
        terms = LedgerTerms.of(facts.charter)
        place = host.stamp(self.home.database)
        key, switch = self.key, self.switch
        ports = Ports(
            secrets.token_bytes, key.sign, switch.rtt_ms, owner, switch.skew_ms, key.unseal, place, self.blobs.room
        )
        node = Node(
            self.config,
            ports,
            me=peer_id_of(local.account(self.key.public)),
            account=local.account(self.key.public),
            facts=facts,
            terms=terms,
            escrow_seed=membership.load_escrow_seed(self.home, check_permissions=check),
            os_family=OS_FAMILIES.get(sys.platform, sys.platform),
            version=__version__,
        )
        effects = node.load(clock_ms(), self._read)
        previous = getattr(self, "_node", None)
        if previous is not None:
            node.rooms.cards.take_over(previous.rooms.cards)
            for up in self.switch.ups():
                self.runtime.feed(up)
        self._node = node
        self.vicinity.tell_again()
        return node, effects

    def _local(self) -> LocalMembership:
        return membership.load_membership(self.home, check_permissions=self.config.flag("security.check_permissions"))

    def _read(self, name: str, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if name.startswith("table:"):
            return list(self._store.load_all(name.removeprefix("table:")))
        return self._store.query(name, args)

    def _execution(self) -> ExecutionSettings:
        return ExecutionSettings.of(
            self.config,
            self.environ,
            worker_argv=self._worker_argv,
            backlog=lambda: self.runtime.backlog > limits.INBOX_TURN_MAX,
        )

    def _socket_name(self) -> Path | str:
        return self.home.pipe_name if sys.platform == "win32" else self.home.socket

    def _keep_mesh_key(self, effect: e.KeepMeshKey) -> None:
        membership.keep_mesh_key(self.home, effect.epoch, effect.key, effect.older)
        self.vicinity.tell_again()

    def _hello(self) -> HelloFacts:
        return HelloFacts(*self._node.hello_facts())

    def _admit(self, peer: str, hello: Hello, wanted: str) -> str:
        return self._node.admit(peer, hello, wanted)

    def _deliver(self, stimulus: e.Stimulus) -> None:
        self.runtime.feed(stimulus)
        self.vicinity.heed(stimulus)

    def _listening(self, addresses: list[str]) -> None:
        self.runtime.feed(e.Listening(tuple(addresses)))

    def _log(self, level: str, event: str, **fields: Any) -> None:
        self.observer.log(level, event, fields)

    # --- local calls

    def _call(self, call: int, method: str, params: dict[str, Any], client: int, credential: str) -> None:
        """A call of a local client: what only the process knows is answered here, all else by the node."""
        if method == "peer.ping":
            self._errands.begin(call, method, lambda: self._ping(params), for_caller=True)
            return
        own = {"status": self._status, "daemon.stop": self._stop, "config.reload": self._reload, "doctor": self._doctor}
        handler = own.get(method)
        try:
            if method == "identity.rotate":
                self._next_key = self._next_key or handover.begin(self.home, secrets.token_bytes)
                params = {"key": self._next_key}
            if handler is None:
                self.runtime.feed(e.RpcCall(call, method, params, client, credential))
                return
            self.ipc.reply(call, handler(params))
        except ClawnetError as error:
            self.ipc.reply(call, None, error.as_dict())

    async def _ping(self, params: dict[str, Any]) -> dict[str, Any]:
        peer = self._node.rooms.calls.named(params)
        count = integer(params, "count", 4, 1, limits.PINGS_MAX)
        party = self._node.rooms.members.party(peer)
        sent, seconds = await measure(self.switch.connection(self._node.ctx.ids.outer(peer)), count)
        return {"peer": party, "sent": sent, "received": len(seconds), "rtts_s": seconds}

    def _calls_waiting(self) -> int:
        return 0 if self.runtime.stopped else self.runtime.calls_waiting

    def _gone(self, call: int) -> None:
        self._errands.gone(call)
        self.runtime.feed(e.CallGone(call))

    def _status(self, params: dict[str, Any]) -> dict[str, Any]:
        node = self._node.rooms.views.status()
        node["warnings"] = [*self._warnings, *node["warnings"]]
        modes = {ring: self.executor.shell_mode(ring) for ring in ("own", "member", "stranger")}
        return {
            **node,
            "home": str(self.home.dir),
            "pid": os.getpid(),
            "rpc_version": rpc.RPC_VERSION,
            "protocol": PROTOCOL_ID,
            "started_at": self._node.rooms.views.time(self.started_ms),
            "uptime_s": (clock_ms() - self.started_ms) / 1000,
            "shell": modes,
            "memory_rss_bytes": rss_bytes(),
            "storage_bytes": self._store.size() + self.blobs.total_bytes,
            "activity": {**node["activity"], **self._activity()},
        }

    def _activity(self) -> dict[str, int]:
        """What this process has done since it started."""
        return {
            "turns": self.runtime.turns_total,
            "stimuli": self.runtime.stimuli_total,
            "commits": self._store.commits_total,
            "synced_commits": self._store.durable_total,
            "signatures": self.key.signed_total,
        }

    def _stop(self, params: dict[str, Any]) -> dict[str, Any]:
        self.drain("daemon stop")
        return {"pid": os.getpid(), "draining": True}

    def _reload(self, params: dict[str, Any]) -> dict[str, Any]:
        """Reads the configuration again: what may change in a running daemon does, the rest is named."""
        fresh = config.load(self.home, self.environ, self.flags)
        applied, restart = self.config.adopt(fresh)
        self.observer.set_level(self.config.text("log.level"))
        self.switch.settings = SwitchSettings.of(self.config, f"clawnet/{__version__}")
        self.executor.configure(self._execution())
        self.blobs.bytes_max = self.config.integer("storage.max_size")
        if applied or restart:
            self._log("security", "config.changed", applied=" ".join(applied), restart=" ".join(restart))
        self.runtime.feed(e.Reloaded())
        return {"applied": applied, "restart": restart}

    def _doctor(self, params: dict[str, Any]) -> dict[str, Any]:
        ports = ports_findings(self.switch.settings, self.switch.addresses())
        node = self._node.rooms.calls.findings()
        findings = [*node, *self.executor.findings(), *ports, self.vicinity.finding()]
        return {"ok": all(finding["level"] != "error" for finding in findings), "findings": findings}

    # --- joining another mesh

    async def _become_member(self, effect: e.Adopt) -> dict[str, Any]:
        """Writes the new membership, archives the old database, and builds the node again as a member.

        A failure before the old node retires leaves it as it is; after that the next start makes the node again.
        """
        answer = effect.answer
        local = adopted(self.home, self.key.public, answer, clock_ms())
        mesh = read_charter(local.charter)[1]
        write_aside(self.home, local, answer.mesh_key)
        self.runtime.retire(effect.call)
        try:
            self._move_over(answer)
        except Exception as error:
            self._failed(f"the node could not join another mesh: {error}")
            raise
        self._log("security", "mesh.joined", mesh=mesh.hex()[:16], ring=answer.ring, inviter=answer.inviter)
        return {**effect.value, "mesh": mesh.hex()}

    def _move_over(self, answer: JoinAnswer) -> None:
        self.switch.hangup_all("this node joins another mesh")
        self._store.close()
        settle_in(self.home)
        self._store = Store.open(self.home.database)
        del self._node
        self._compose()
        self._listening(self.switch.addresses())
        self.runtime.feed(self.executor.capacity())
        self.runtime.feed(e.MeetPeers(answer.peers))

    # --- another key

    def _rotated(self, effect: e.Rotated) -> None:
        """The chain has gone over to the new key; now the files do, and then every connection."""
        try:
            handover.finish(self.home, effect.row, check_permissions=self.config.flag("security.check_permissions"))
        except Exception as error:
            self._failed(str(error))
            raise
        self.key, self._next_key = effect.key, None
        self._errands.begin(effect.call, "identity.rotate", lambda: self._rekey(effect))

    async def _rekey(self, effect: e.Rotated) -> Any:
        try:
            await self.vicinity.stop()
            addresses = await self.switch.rekey(self.key, carriers(self.key, PROTOCOLS, self.switch.settings))
            self.vicinity = self._make_vicinity()
            self.vicinity.start()
        except Exception as error:
            self._failed(f"the node cannot be reached under its new key: {error}")
            raise
        self._listening(addresses)
        self.runtime.feed(e.Rekeyed())
        self._log("info", "daemon.rekeyed", peer=self.key.peer_id, listen=" ".join(addresses))
        return effect.value

    # --- the end

    def drain(self, why: str) -> None:
        """Stops bidding, hands back what has not started, lets the rest finish, exits; a second time: at once."""
        self._log("info", "daemon.stopping", why=why)
        # A node that rests takes nothing in; what it promised is on the disk, and the next start goes on with it.
        if self._node.ctx.draining or self.runtime.stopped or self.runtime.resting is not None:
            self._over.set()
            return
        self.runtime.feed(e.Drain())

    def _failed(self, reason: str) -> None:
        self._log("error", "daemon.failed", reason=reason)
        self.exit_code = 70
        self._over.set()

    async def _take_down(self) -> None:
        net: list[End] = []
        if hasattr(self, "runtime"):
            self.runtime.stopped = True
            self._errands.stop()
            net = [self.vicinity.stop, self.switch.stop]
        try:
            for error in await end_all(net, [self.executor.close], [self.ipc.stop]):
                self._log("error", "daemon.stop_failed", traceback="".join(traceback.format_exception(error)))
                self.exit_code = self.exit_code or 70
        finally:
            self._store.close()
            self._log("info", "daemon.stopped", pid=os.getpid())
            self.observer.close()

    # --- upkeep

    def _sweep(self) -> None:
        """Forgets what is past its retention and needed by nobody."""
        from clawnet.storage.retention import sweep

        if self.runtime.stopped:
            return
        try:
            for task_id in sweep(self._store, clock_ms(), self._node.kept_ids()):
                self.blobs.revoke(task_id)
            self.blobs.sweep_parts(clock_ms() - limits.BLOB_PART_AGE_MS)
            self.blobs.sweep(clock_ms() - limits.BLOB_UNUSED_AGE_MS)
        except StorageError as error:
            self._log("error", "storage.sweep_failed", reason=error.message)

    async def _metrics(self) -> Any:
        port = self.config.integer("metrics.port")
        if not port:
            return None
        from clawnet.observe.metrics import serve

        try:
            return await serve(port, self.observer, self._gauges)
        except OSError as error:
            raise ConfigError(
                f"metrics.port {port} cannot be used: {error.strerror}", hint="choose another port, or 0 for none"
            ) from error

    def _gauges(self) -> dict[str, float]:
        rtts = [link.rtt_ms for link in self.switch.links() if link.rtt_ms]
        return {
            **self._node.rooms.views.gauges(),
            "rtt_seconds": sum(rtts) / len(rtts) / 1000 if rtts else 0.0,
            "memory_bytes": rss_bytes(),
            "storage_bytes": self._store.size() + self.blobs.total_bytes,
            **{f"net_{name}_total": float(count) for name, count in self.switch.counters.items()},
        }
