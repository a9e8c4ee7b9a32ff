"""A daemon inside the test, parts of which fail: its calls are answered, and it ends in order or goes on."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from clawnet import adoption, config, handover, paths
from clawnet import daemon as daemons
from clawnet.daemon import Daemon
from clawnet.errors import StorageFullError
from clawnet.identity import membership
from clawnet.identity.keys import KeyPair
from clawnet.identity.membership import create_home, load_membership
from clawnet.paths import Home
from clawnet.storage.store import Store
from clawnet.wire import events as e
from clawnet.wire.messages import JoinAnswer
from tests.conftest import NOW_MS, counted_entropy

pytestmark = pytest.mark.slow

CALL = 1_000_000
FLAGS = {
    "node.listen_addrs": "/ip4/127.0.0.1/tcp/0",
    "network.enable_quic": "false",
    "network.enable_mdns": "false",
    "execution.shell.own": "off",
    "execution.shell.member": "off",
}


class House:
    """The daemon and what it answered."""

    def __init__(self, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gc, "freeze", lambda: None)
        monkeypatch.setattr(daemons, "on_signals", lambda *args: None)
        self.home = home
        self.daemon = Daemon(home, config.load(home, {}, FLAGS), {}, FLAGS, KeyPair.load(home.node_key), ())
        self.answers: dict[int, asyncio.Future[Any]] = {}
        self.code = -1

    async def ask(self, method: str, **params: Any) -> Any:
        """The answer to a local call: its value, or its error's object."""
        call = CALL + len(self.answers)
        answer = self.expect(call)
        self.daemon._call(call, method, params, 1, "local")
        return await answer

    def expect(self, call: int) -> asyncio.Future[Any]:
        return self.answers.setdefault(call, asyncio.get_running_loop().create_future())

    def reply(self, call: int, value: Any, error: dict[str, Any] | None = None) -> None:
        answer = self.expect(call)
        assert not answer.done(), "a second answer"
        answer.set_result(value if error is None else error)

    def play(self, test: Callable[[House], Awaitable[None]]) -> str:
        """Serves until the test is over and the daemon has ended; returns its log."""

        async def go() -> None:
            async with asyncio.timeout(60):
                ready = asyncio.Event()
                serving = asyncio.get_running_loop().create_task(self.daemon.serve(lambda addresses: ready.set()))
                await asyncio.wait([serving, asyncio.ensure_future(ready.wait())], return_when="FIRST_COMPLETED")
                assert not serving.done(), await serving
                self.daemon.ipc.reply = self.reply  # type: ignore[method-assign]
                await test(self)
                self.code = await serving

        asyncio.run(go())
        return self.home.log_file.read_text()


@pytest.fixture
def house(fresh_home: Home, monkeypatch: pytest.MonkeyPatch) -> House:
    return House(fresh_home, monkeypatch)


async def stop(house: House) -> None:
    assert (await house.ask("daemon.stop"))["draining"]


@pytest.mark.parametrize("count", ["many", 0, -1, 1_001, 1.5e9, [4], True])
def test_pings_are_counted_by_a_number_in_bounds(house: House, monkeypatch: pytest.MonkeyPatch, count: object) -> None:
    async def test(house: House) -> None:
        monkeypatch.setattr(house.daemon._node.rooms.calls, "named", lambda params: house.daemon.key.peer_id)
        answer = await house.ask("peer.ping", peer="x", count=count)
        assert (answer["code"], answer["exit_code"], answer["field"]) == ("bad_input", 65, "count")
        assert "from 1 to 1000" in answer["hint"]
        await stop(house)

    house.play(test)
    assert house.code == 0


def test_a_ping_that_trips_the_daemon_is_answered_and_logged(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(house: House) -> None:
        monkeypatch.setattr(house.daemon._node.rooms.calls, "named", lambda params: 1 // 0)
        answer = await house.ask("peer.ping", peer="x")
        assert answer["code"] == "internal" and answer["id"] in answer["message"]
        await stop(house)

    log = house.play(test)
    assert "daemon.errand_failed" in log and "ZeroDivisionError" in log
    assert house.code == 0


def invited(tmp_path: Path, house: House) -> JoinAnswer:
    """An inviter's answer that makes this home a member of another mesh."""
    other = create_home(Home(tmp_path / "other"), "bob", counted_entropy("bob"), NOW_MS)
    owner = KeyPair.load(Home(tmp_path / "other").owner_key)
    mesh = membership.read_charter(other.membership.charter)[1]
    ours = membership.certify_node(owner, mesh, house.daemon.key.public, issued_ms=NOW_MS, inviter="")
    return JoinAnswer("", "own", other.membership.charter, [ours], b"k" * 32, "/ip4/127.0.0.1/tcp/1")


def fails_with(error: Exception) -> Callable[..., None]:
    def work(*args: Any, **kwargs: Any) -> None:
        raise error

    return work


@pytest.mark.parametrize("raw", [True, False])
def test_a_join_that_fails_half_way_is_answered_and_ends_the_daemon_with_the_home_as_it_was(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bool
) -> None:
    before = house.home.mesh_file.read_bytes()
    answer = invited(tmp_path, house)
    place, error = (daemons, OSError(errno.EXDEV, "odd")) if raw else (paths, StorageFullError("no room"))

    async def test(house: House) -> None:
        monkeypatch.setattr(place, "settle_in" if raw else "archive", fails_with(error))
        told = house.expect(7)
        house.daemon.runtime.perform([e.Adopt(7, answer, {})])
        said = await told
        assert said["code"] == ("internal" if raw else "storage_full")
        assert raw or ("no room" in said["message"] and "start it again" in said["hint"])

    log = house.play(test)
    assert house.code == 70
    assert "daemon.failed" in log and ("odd" if raw else "no room") in log
    handover.settle(house.home)
    assert house.home.mesh_file.read_bytes() == before
    Store.open(house.home.database).close()


def test_a_join_that_cannot_be_written_leaves_the_node_in_its_mesh(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = house.home.mesh_file.read_bytes()
    answer = invited(tmp_path, house)

    async def test(house: House) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fails_with(OSError(errno.ENOSPC, "No space left on device")))
            told = house.expect(7)
            house.daemon.runtime.perform([e.Adopt(7, answer, {})])
            said = await told
        assert said["code"] == "storage_full" and "stays in its mesh" in said["hint"]
        assert (await house.ask("peer.list"))["items"] == []
        await stop(house)

    house.play(test)
    assert house.code == 0
    assert house.home.mesh_file.read_bytes() == before and not adoption.half_done(house.home)


def test_a_join_makes_the_node_a_member_and_it_goes_on(house: House, tmp_path: Path) -> None:
    answer = invited(tmp_path, house)

    async def test(house: House) -> None:
        told = house.expect(7)
        house.daemon.runtime.perform([e.Adopt(7, answer, {"ring": "own"})])
        assert (await told)["ring"] == "own"
        assert (await house.ask("status"))["pid"] == os.getpid()
        await stop(house)

    house.play(test)
    assert house.code == 0
    assert load_membership(house.home).charter == answer.charter


@pytest.mark.parametrize("part", ["vicinity", "switch", "executor", "ipc"])
def test_a_part_that_does_not_end_well_is_logged_and_the_others_end(
    house: House, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    closed: list[bool] = []

    async def test(house: House) -> None:
        daemon = house.daemon
        broken = getattr(daemon, part)
        name = "close" if part == "executor" else "stop"
        end, close = getattr(broken, name), daemon._store.close

        async def ends() -> None:
            await end()
            raise OSError(errno.EIO, "a part that does not end well")

        monkeypatch.setattr(broken, name, ends)
        monkeypatch.setattr(daemon._store, "close", lambda: (close(), closed.append(True)))
        await stop(house)

    log = house.play(test)
    assert closed == [True]
    assert "daemon.stop_failed" in log and "a part that does not end well" in log and "daemon.stopped" in log
    assert house.code == 70


def test_a_new_key_under_which_nobody_can_reach_the_node_ends_the_daemon_with_an_answer(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(house: House) -> None:
        monkeypatch.setattr(daemons, "carriers", fails_with(OSError(errno.EMFILE, "no sockets")))
        answer = await house.ask("identity.rotate")
        assert answer["code"] == "internal"

    log = house.play(test)
    assert "daemon.errand_failed" in log and "no sockets" in log and "daemon.failed" in log
    assert house.code == 70
