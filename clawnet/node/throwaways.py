"""Throw-away memberships (CI runners): their leases at the inviter, and a runner's own leaving with its change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from clawnet import limits
from clawnet.errors import BusyError, ClawnetError, NotPermittedError
from clawnet.identity.revocations import Revocation, sign_revocation
from clawnet.money import format_credits
from clawnet.node.context import Context

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms


class Lease(Struct, array_like=True):
    """A throw-away member that this node let in. `chain` are the owner certificates from the founder to it."""

    account: bytes
    owner: bytes
    chain: list[bytes]
    since_ms: int


class _Leaving(Struct):
    call: int
    until_ms: int
    bound_ucr: int = 0
    returned_ucr: int = 0
    sent: bool = False


class Throwaways:
    """Whoever is not seen for THROWAWAY_LEASE_MS by the node that invited it is a member no longer."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._leases: dict[bytes, Lease] = {}
        self._seen_ms: dict[bytes, int] = {}
        self._leaving: _Leaving | None = None
        self._left = False

    # --- the inviter's part

    def load(self, body: bytes) -> None:
        """Takes in a stored lease; its time begins anew, as nobody could be seen while this node did not run."""
        lease = msgspec.msgpack.decode(body, type=Lease)
        self._leases[lease.account] = lease
        self._seen_ms[lease.account] = self._ctx.now

    def check_room(self, uses: int) -> None:
        """Raises NotPermittedError when so many more could not be watched over."""
        if len(self._leases) + uses > limits.THROWAWAYS_MAX:
            raise NotPermittedError(
                f"{len(self._leases)} throw-away members are in this mesh by this node already, "
                f"and it watches over {limits.THROWAWAYS_MAX} at most",
                hint="wait until some have left, or lower --uses",
            )

    def admitted(self, account: bytes, owner: bytes, chain: list[bytes]) -> None:
        """An invite with --ephemeral was redeemed."""
        self.check_room(1)
        lease = Lease(account, owner, chain, self._ctx.now)
        self._leases[account] = lease
        self._seen_ms[account] = self._ctx.now
        self._ctx.put("leases", account, msgspec.msgpack.encode(lease))

    def holds(self, account: bytes) -> bool:
        """Whether this is a throw-away member of ours."""
        return account in self._leases

    def ended(self, account: bytes) -> None:
        """Its membership is over, however that came."""
        if self._leases.pop(account, None) is not None:
            self._seen_ms.pop(account, None)
            self._ctx.delete("leases", account)

    def keep_up(self) -> None:
        """Every minute: leases run out."""
        ctx, key = self._ctx, self._ctx.ports.owner
        over: list[bytes] = []
        for lease in list(self._leases.values()):
            if (self._rooms.members.peer_of(lease.account) or "") in ctx.links:
                self._seen_ms[lease.account] = ctx.now
            elif key is not None and ctx.now - self._seen_ms[lease.account] >= limits.THROWAWAY_LEASE_MS:
                mesh = self._rooms.members.facts.mesh
                chain = tuple(lease.chain)
                body = Revocation(mesh, key.public, "owner", lease.owner, ctx.now, "lease", (), chain)
                over.append(sign_revocation(body, key))
                self.ended(lease.account)
        if over:
            self._rooms.removals.publish(over)

    # --- the runner's part

    @property
    def busy(self) -> bool:
        """Whether this node is about to leave: until it has, it does not end."""
        return self._leaving is not None

    def leave(self, call: int, params: dict[str, Any]) -> None:
        """No new work; what is left of the credits goes back to the inviter; then the membership ends."""
        ctx, facts = self._ctx, self._rooms.members.facts
        if not facts.lease_s:
            raise NotPermittedError(
                "this node is no throw-away member (peer invite --ephemeral), so stopping does not end its membership",
                hint="clawnet daemon stop; the founder's clawnet peer remove ends a membership",
            )
        if self._leaving is not None:
            raise BusyError("this node is leaving already", hint="wait until it has ended")
        drain_ms = ctx.config.millis("daemon.drain_timeout") + limits.DRAIN_SETTLE_MS
        self._leaving = _Leaving(call, ctx.now + drain_ms)
        ctx.wake(("leave",), self._leaving.until_ms)
        self._rooms.draining.begin()

    def pump(self) -> None:
        """At the end of a turn: the next step of leaving, when the one before is done or has had its time."""
        leaving, ctx, rooms = self._leaving, self._ctx, self._rooms
        if leaving is None:
            return
        due = ctx.now >= leaving.until_ms
        if not leaving.sent:
            if (rooms.jobs.running or rooms.draining.owed()) and not due:
                return
            self._give_back(leaving)
            leaving.sent = True
            leaving.until_ms = ctx.now + limits.LEAVE_WAIT_MS
            ctx.wake(("leave",), leaving.until_ms)
            due = False
        inviter = rooms.members.facts.inviter
        if leaving.returned_ucr and rooms.outbox.owed(inviter) and ctx.connected(inviter) and not due:
            return
        self._leaving = None
        self._part(leaving, accepted=not rooms.outbox.owed(inviter))

    def _give_back(self, leaving: _Leaving) -> None:
        ctx, books = self._ctx, self._rooms.books
        inviter = self._rooms.members.facts.inviter
        leaving.bound_ucr = sum(line.left_ucr for line in books.book.open_lines(ctx.account))
        available_ucr = books.available()
        if available_ucr <= 0 or not ctx.connected(inviter):
            return
        try:
            books.send(self._rooms.members.account_of(inviter), available_ucr, books.memo_hash("left the mesh"))
            leaving.returned_ucr = available_ucr
        except ClawnetError as error:
            ctx.log("warn", "leave.nothing_returned", reason=error.message)

    def _part(self, leaving: _Leaving, *, accepted: bool) -> None:
        ctx, rooms = self._ctx, self._rooms
        facts, key = rooms.members.facts, ctx.ports.owner
        told = len(ctx.links)
        if key is not None and not rooms.removals.own:
            chain = tuple(facts.certificates[:-1])
            body = Revocation(facts.mesh, key.public, "owner", key.public, ctx.now, "left", (), chain)
            rooms.removals.publish([sign_revocation(body, key)])
        left_ucr = max(0, rooms.books.available())
        ctx.reply(
            leaving.call,
            {
                "inviter": rooms.members.party(facts.inviter),
                "returned": format_credits(leaving.returned_ucr),
                "accepted": accepted and leaving.returned_ucr > 0,
                "kept": format_credits(left_ucr),
                "bound": format_credits(leaving.bound_ucr),
                "told": told,
            },
        )
