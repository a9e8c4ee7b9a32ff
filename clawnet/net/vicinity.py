"""What is around this node: its own network, watched, and its neighbours on it by mDNS.

When the machine has slept, or its addresses, carriers or routes change, nothing that was open can be trusted: every
link is asked for a sign of life at once, every pause before a dial ends, others are told the new addresses, and the
announcement is made anew. A look every NETWORK_WATCH_S finds this on all systems alike, for half a millisecond each.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.identity import multiaddr
from clawnet.net.addresses import is_dialable, own_network
from clawnet.net.dnsaddr import Announcement, write_txt
from clawnet.net.nearby import Nearby
from clawnet.wire.events import Listening, PeerDown, Stimulus

if TYPE_CHECKING:
    from clawnet.net.mdns import Responder

NO_MDNS: Final = "zeroconf is not installed here, so members on this network are found by their addresses alone"
NO_MDNS_REMEDY: Final = "pip install zeroconf, then `clawnet daemon restart`"
_INSTANCE_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz234567"
_INSTANCE_CHARS: Final = 40
Finding = dict[str, str]


def has_mdns() -> bool:
    """Whether mDNS's library is here."""
    return importlib.util.find_spec("zeroconf") is not None


class Moved(Protocol):
    """What is asked of the switch; its id may change with its key."""

    peer_id: str

    def addresses(self) -> list[str]: ...
    def network_changed(self) -> None: ...


class Vicinity:
    """See the module's first lines. Belongs to one event loop; `deliver` and `log` must not raise.

    `tag` is this node's own; `is_ours` tells whether a peer's shows that it is of the same mesh.
    """

    def __init__(
        self,
        switch: Moved,
        *,
        mdns: bool,
        clock: Callable[[], int],
        entropy: Callable[[int], bytes],
        tag: Callable[[], bytes],
        is_ours: Callable[[str, bytes], bool],
        deliver: Callable[[Stimulus], None],
        log: Callable[[str, str, dict[str, Any]], None],
    ) -> None:
        self._switch = switch
        self._mdns = mdns
        self._clock = clock
        self._tag = tag
        self._deliver = deliver
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._nearby = Nearby(lambda: switch.peer_id, deliver, is_ours, self._loop.time())
        self._instance = "".join(_INSTANCE_LETTERS[byte % 32] for byte in entropy(_INSTANCE_CHARS))
        self._mark: object = None
        self._addresses: list[str] = []
        self._told_tag = b""
        self._then_s = 0.0
        self._then_ms = 0
        self._timer: asyncio.TimerHandle | None = None
        self._responder: Responder | None = None
        self._announced: Announcement | None = None
        self._wanted: Announcement | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._stale = False
        self._problem = ""
        self._stopped = False

    def start(self) -> None:
        """Begins to look; the first announcement is under way when this returns."""
        self._mark = own_network().mark
        self._addresses, self._told_tag = self._switch.addresses(), self._tag()
        self._then_s, self._then_ms = self._loop.time(), self._clock()
        self._renew()
        self._timer = self._loop.call_later(limits.NETWORK_WATCH_S, self._look)

    async def stop(self) -> None:
        """Says goodbye to the neighbours."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        if self._renewing is not None:
            await asyncio.wait([self._renewing])
        if self._responder is not None:
            responder, self._responder = self._responder, None
            await responder.close()

    def heed(self, stimulus: Stimulus) -> None:
        """A neighbour whose link broke may have left the network without a word: it is asked."""
        if type(stimulus) is PeerDown and self._responder is not None:
            self._responder.ask(self._nearby.doubt(stimulus.peer, self._loop.time()))

    def tell_again(self) -> None:
        """A new node has to be told of the neighbours."""
        self._nearby.tell_again()

    def finding(self) -> Finding:
        """What `doctor` shows of mDNS."""
        level, remedy = "ok", ""
        if not self._mdns:
            text = "mDNS is off (network.enable_mdns): members on this network are found by their addresses alone"
        elif not has_mdns():
            level, text, remedy = "warn", NO_MDNS, NO_MDNS_REMEDY
        elif self._problem:
            level, text = "warn", f"no mDNS, so neighbours do not find this node: {self._problem}"
            remedy = "give it a network with multicast (a container: the host's), or `clawnet peer connect` by address"
        elif self._announced is None:
            text = "mDNS has nothing to announce: this node listens at no address that others could dial"
            remedy = "connect this machine to a network (it is noticed by itself), or clear node.listen_addrs"
        else:
            hosts = ", ".join(self._announced.hosts)
            text = f"announced by mDNS as {hosts}; neighbours heard: {len(self._nearby)}"
        return {"check": "mdns", "level": level, "message": text, "remedy": remedy}

    # --- the watch

    def _look(self) -> None:
        """One look at the clocks and the network, and the next one, whatever becomes of this."""
        self._timer = self._loop.call_later(limits.NETWORK_WATCH_S, self._look)
        now_s, now_ms = self._loop.time(), self._clock()
        passed_s = now_s - self._then_s
        late_s = max(passed_s - limits.NETWORK_WATCH_S, abs((now_ms - self._then_ms) / 1000 - passed_s))
        slept = late_s > limits.NETWORK_LATE_S
        self._then_s, self._then_ms = now_s, now_ms
        mark = own_network().mark
        if slept or mark != self._mark:
            self._mark = mark
            self._changed(f"the clocks jumped by {late_s:.0f} s" if slept else "addresses, carriers or routes changed")
        if self._tag() != self._told_tag:
            # The mesh has a new key: who showed the tag of the old one, and who of the new, is judged again.
            self._told_tag = self._tag()
            self._nearby.tell_again()
        self._heed_addresses()
        due = self._nearby.look(now_s)
        if self._responder is not None:
            self._responder.ask(due)
        self._renew()

    def _changed(self, why: str) -> None:
        self._log("info", "network.changed", {"why": why, "listen": " ".join(self._switch.addresses())})
        self._heed_addresses()
        self._switch.network_changed()
        self._nearby.doubt(None, self._loop.time())
        self._stale = True

    def _heed_addresses(self) -> None:
        addresses = self._switch.addresses()
        if addresses != self._addresses:
            self._addresses = addresses
            self._deliver(Listening(tuple(addresses)))

    # --- the announcement

    def _renew(self) -> None:
        """Announces again when what was announced is no longer so: after a change, and when the mesh's key is new."""
        if not self._mdns or self._stopped or self._renewing is not None or not has_mdns():
            return
        wanted = self._announcement()
        if wanted == self._wanted and not self._stale:
            return
        self._wanted, self._stale = wanted, False
        self._renewing = self._loop.create_task(self._announce(wanted))
        self._renewing.add_done_callback(self._renewed)

    def _announcement(self) -> Announcement | None:
        told = [where for where in map(multiaddr.parse, self._addresses) if is_dialable(where.host)]
        if not told:
            return None
        hosts = tuple(dict.fromkeys(where.host for where in told))
        return Announcement(self._instance, write_txt(map(str, told), self._told_tag), hosts, told[0].port)

    async def _announce(self, wanted: Announcement | None) -> None:
        # Its import takes a tenth of a second, in which the loop goes on.
        mdns = await asyncio.to_thread(importlib.import_module, "clawnet.net.mdns")
        if self._responder is not None:
            responder, self._responder = self._responder, None
            await responder.close()
        self._announced = None
        if wanted is None:
            return
        try:
            self._responder = await mdns.Responder.open(wanted, self._heard)
        except LinkError as problem:
            if not self._problem:
                self._log("warn", "mdns.unavailable", {"problem": problem.message})
            self._problem = problem.message
            return
        self._problem = ""
        self._announced = wanted
        self._log("info", "mdns.announced", {"hosts": " ".join(wanted.hosts)})

    def _renewed(self, task: asyncio.Task[None]) -> None:
        self._renewing = None
        if not task.cancelled() and (defect := task.exception()) is not None:
            context = {"message": "the announcement failed", "exception": defect, "task": task}
            self._loop.call_exception_handler(context)

    def _heard(self, name: str, text: bytes, held_s: float) -> None:
        now_s = self._loop.time()
        if held_s > 0:
            self._nearby.heard(name, text, held_s, now_s)
        else:
            self._nearby.gone(name, text, now_s)
