"""Names of hosts looked up, in threads of their own: somebody else's name server answers when it likes, or never."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import Final

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.identity.multiaddr import Multiaddr, of_socket

_FAMILIES: Final = {"dns": socket.AF_UNSPEC, "dns4": socket.AF_INET, "dns6": socket.AF_INET6}


def is_name(where: Multiaddr) -> bool:
    """Whether the host of an address has to be looked up."""
    return where.family in _FAMILIES


class Names:
    """At most NAME_LOOKUPS_MAX lookups at once; no one of them delays the end of this process."""

    def __init__(self) -> None:
        self._room = asyncio.Semaphore(limits.NAME_LOOKUPS_MAX)

    async def addresses(self, name: Multiaddr, timeout_s: float) -> list[Multiaddr]:
        """Where that is by IP address, the resolver's best first, at most NAME_ADDRESSES_MAX. Raises LinkError."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._room.acquire()
                hosts = await self._look_up(name.host, _FAMILIES[name.family])
        except TimeoutError as error:
            raise LinkError(f"cannot connect to {name}: the name was not looked up within {timeout_s:g} s") from error
        except (OSError, UnicodeError) as error:
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise LinkError(f"cannot connect to {name}: {said}") from error
        return [of_socket(host, name.port, name.transport, name.peer) for host in hosts][: limits.NAME_ADDRESSES_MAX]

    def _look_up(self, host: str, family: int) -> asyncio.Future[list[str]]:
        """Begins a lookup; its place is free when its thread is done, whoever still waits for it."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[str]] = loop.create_future()

        def done(hosts: list[str], problem: Exception | None) -> None:
            self._room.release()
            if found.cancelled():
                return
            if problem is not None:
                found.set_exception(problem)
            else:
                found.set_result(hosts)

        def work() -> None:
            hosts: list[str] = []
            problem: Exception | None = None
            try:
                rows = socket.getaddrinfo(host, None, family=family, type=socket.SOCK_STREAM)
                hosts = list(dict.fromkeys(str(where[0]) for *_, where in rows))
            except Exception as error:  # noqa: BLE001 - else its place would never be free again
                problem = error
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(done, hosts, problem)

        try:
            threading.Thread(target=work, name="lookup", daemon=True).start()
        except RuntimeError as error:
            self._room.release()
            raise OSError(f"no thread is to be had: {error}") from error
        return found
