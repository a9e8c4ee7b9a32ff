"""Multicast DNS by zeroconf: this node's announcement, and the TXT records of all that announce `_p2p._udp.local`.

Imported only where zeroconf is. What zeroconf takes in from anybody it bounds itself (its cache, its packets).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from zeroconf import DNSOutgoing, DNSQuestion, DNSText, Error, IPVersion, RecordUpdate, RecordUpdateListener, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.net.dnsaddr import Announcement

SERVICE: Final = "_p2p._udp.local."
_TYPE_TXT: Final = 16
_CLASS_IN: Final = 1
_QUERY: Final = 0
_NAME_BYTES_MAX: Final = 253
_PART_BYTES_MAX: Final = 63


class Records(RecordUpdateListener):
    """Hands on what becomes of TXT records of the service: (instance, text, seconds it holds; 0: no longer)."""

    def __init__(self, on_text: Callable[[str, bytes, float], None]) -> None:
        self._on_text = on_text

    def async_update_records(self, zc: Zeroconf, now: float, records: list[RecordUpdate]) -> None:
        """New, refreshed and expired records alike."""
        for update in records:
            record = update.new
            name = record.name.lower()
            if isinstance(record, DNSText) and name.endswith(SERVICE) and _can_be_asked(name):
                held = 0.0 if record.is_expired(now) else float(record.ttl)
                self._on_text(name, record.text, held)


class Responder:
    """One announcement and one browser, over the interfaces of the announcement's hosts."""

    def __init__(self, base: AsyncZeroconf, browser: AsyncServiceBrowser, told: asyncio.Future[object]) -> None:
        self._base = base
        self._browser = browser
        self._told = told

    @classmethod
    async def open(cls, announcement: Announcement, on_text: Callable[[str, bytes, float], None]) -> Responder:
        """Announces and listens; raises LinkError when this machine has no multicast."""
        logging.getLogger("zeroconf").setLevel(logging.CRITICAL)
        base = await _open(announcement.hosts)
        records = Records(on_text)
        info = AsyncServiceInfo(
            SERVICE,
            f"{announcement.instance}.{SERVICE}",
            port=announcement.port,
            properties=announcement.text,
            server=f"{announcement.instance[:32]}.local.",
            parsed_addresses=list(announcement.hosts),
            host_ttl=limits.MDNS_TTL_S,
            other_ttl=limits.MDNS_TTL_S,
        )
        base.zeroconf.async_add_listener(records, None)
        browser = AsyncServiceBrowser(base.zeroconf, SERVICE, handlers=[_heed_nothing])
        try:
            told = asyncio.ensure_future(await base.async_register_service(info, cooperating_responders=True))
        except (Error, OSError) as error:
            await base.async_close()
            raise LinkError(f"the announcement failed: {_said(error)}") from error
        told.add_done_callback(lambda done: done.cancelled() or done.exception())
        return cls(base, browser, told)

    def ask(self, names: Iterable[str]) -> None:
        """Asks on every interface for the TXT records of these instances."""
        names = list(names)
        if not names or self._base.zeroconf.done:
            return
        out = DNSOutgoing(_QUERY)
        for name in names:
            out.add_question(DNSQuestion(name, _TYPE_TXT, _CLASS_IN))
        with contextlib.suppress(Error):  # what anybody announces must not end who asks for it
            self._base.zeroconf.async_send(out)

    async def close(self) -> None:
        """Says goodbye, as far as the network still lets it."""
        self._told.cancel()
        await self._browser.async_cancel()
        await self._base.async_close()


async def _open(hosts: Sequence[str]) -> AsyncZeroconf:
    """Sockets on the interfaces of these addresses; IPv4 alone where IPv6 has no multicast."""
    problem = "no address to announce"
    ip4 = [host for host in hosts if ":" not in host]
    for interfaces in dict.fromkeys((tuple(hosts), tuple(ip4))):
        if not interfaces:
            continue
        mixed = any(":" in host for host in interfaces)
        version = IPVersion.V4Only if not mixed else IPVersion.All if ip4 else IPVersion.V6Only
        base: AsyncZeroconf | None = None
        try:
            base = AsyncZeroconf(interfaces=list(interfaces), ip_version=version)
            await base.zeroconf.async_wait_for_start()
        except (Error, OSError, RuntimeError) as error:
            problem = _said(error)
            if base is not None:
                await base.async_close()
        else:
            return base
    raise LinkError(f"multicast cannot be used: {problem}")


def _can_be_asked(name: str) -> bool:
    """Whether a name that was heard fits into a question: one that is no UTF-8 grows where it is read."""
    return len(name.encode()) <= _NAME_BYTES_MAX and all(
        len(part.encode()) <= _PART_BYTES_MAX for part in name.split(".")
    )


def _said(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) else ""
    return text or str(error) or type(error).__name__


def _heed_nothing(**_: object) -> None:
    """The browser asks; what comes is read from the records."""
