"""Giving and taking membership: tokens, their redemption, the first credits of a newcomer, and joining elsewhere."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import msgspec

from clawnet import limits
from clawnet.errors import ClawnetError, DataError, FundsError, NotPermittedError, UnreachableError
from clawnet.identity import invite as tokens
from clawnet.identity.certificates import certify_node, certify_owner
from clawnet.identity.keys import public_of, verify
from clawnet.identity.membership import verify_keys
from clawnet.ledger.entries import EntryKind
from clawnet.mesh.roster import InviteRecord, clean_name, join_bytes, secret_hash
from clawnet.money import format_credits, parse_credits
from clawnet.node.context import Context
from clawnet.node.params import integer, number
from clawnet.wire.events import Adopt, JoinAnswered, JoinAsked, JoinReply, JoinSend
from clawnet.wire.messages import JoinAnswer, JoinAsk, JoinPeer

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

OPEN_INVITES_MAX = 1_000
USES_MAX = 10_000
EXPIRES_S_MAX = 366 * 86_400


class Invites:
    """Invites that this node gave, and the join it is trying."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._records: dict[bytes, InviteRecord] = {}

    def load(self, body: bytes) -> None:
        """Takes in a stored invite."""
        record = msgspec.msgpack.decode(body, type=InviteRecord)
        self._records[record.secret_hash] = record

    def _save(self, record: InviteRecord) -> None:
        self._ctx.put("invites", record.invite, msgspec.msgpack.encode(record))

    # --- giving

    def invite(self, call: int, params: dict[str, Any]) -> None:
        """Answers with a one-line token."""
        ctx, members = self._ctx, self._rooms.members
        facts = members.facts
        if ctx.ports.owner is None:
            holder = members.name_of(ctx.ids.inner(facts.inviter)) if facts.inviter else "another machine of yours"
            raise NotPermittedError(
                f"the owner key is not on this machine, so it cannot invite; {holder} holds it",
                hint=f"run clawnet peer invite on {holder}",
            )
        ring = str(params.get("ring") or "member")
        if ring not in ("own", "member"):
            raise DataError(f"there is no ring {ring!r} to invite into", hint="--ring own or --ring member")
        if ring == "member" and not facts.founded and not self._may_invite():
            raise NotPermittedError(
                "only the founder of this mesh may invite members (mesh.members_may_invite is off)",
                hint="ask the founder for a token, or invite a machine of your own with --ring own",
            )
        uses = integer(params, "uses", 1)
        if not 1 <= uses <= USES_MAX or (ring == "own" and uses != 1):
            raise DataError(f"--uses {uses} is not possible", hint="own invites are single-use; members: 1 to 10000")
        asked = params.get("credits")
        credits_ucr = -1 if asked is None else parse_credits(str(asked), what="--credits")
        ephemeral = bool(params.get("ephemeral"))
        if ephemeral and ring == "own":
            raise DataError("a throw-away membership is one of ring member", hint="leave out --ring own")
        if ephemeral:
            self._rooms.throwaways.check_room(uses)
        self._check_credits(ring, credits_ucr, uses, ephemeral=ephemeral)
        self._forget_expired()
        expires_ms = ctx.now + int(number(params, "expires_s", 3_600.0, 1, EXPIRES_S_MAX) * 1000)
        if not self._rooms.cards.addresses:
            raise NotPermittedError("this node listens nowhere, so nobody could redeem an invite")
        secret = ctx.entropy(16)
        record = InviteRecord(ctx.entropy(16), secret_hash(secret), ring, expires_ms, uses, credits_ucr, ctx.now)
        record.credential, record.ephemeral = ctx.credential, ephemeral
        self._records[record.secret_hash] = record
        self._save(record)
        listening = tuple(self._rooms.cards.addresses[:8])
        token = tokens.Invite(facts.mesh, ctx.wire_me, listening, secret, ring, expires_ms).encode()
        given = self._gift_ucr(record)
        ctx.reply(
            call,
            {
                "token": token,
                "ring": ring,
                "expires_at": self._rooms.views.time(expires_ms),
                "uses": uses,
                "credits": format_credits(given),
                "mesh": facts.mesh.hex(),
                "ephemeral": ephemeral,
            },
        )

    def _may_invite(self) -> bool:
        facts = self._rooms.members.facts
        membership = verify_keys(
            facts.charter, facts.mesh, facts.certificates, self._rooms.successions.keys_of(self._ctx.me)
        )
        return membership.may_invite

    def _check_credits(self, ring: str, credits_ucr: int, uses: int, *, ephemeral: bool) -> None:
        books = self._rooms.books
        if self._grants(ring, ephemeral=ephemeral):
            if credits_ucr > books.terms.grant_max_ucr:
                most = format_credits(books.terms.grant_max_ucr)
                raise DataError(f"--credits is above what this mesh's charter lets one grant be ({most})")
        elif credits_ucr > 0 and credits_ucr * uses > books.available():
            raise FundsError(
                f"the invite promises {format_credits(credits_ucr * uses)} credits, "
                f"{format_credits(books.available())} are available",
                hint="lower --credits or --uses",
            )
        elif credits_ucr > 0:
            self._rooms.spending.check_payment(self._ctx.credential, credits_ucr * uses)

    def void(self) -> int:
        """This node's key changes: tokens name the old one, so none can be redeemed any longer. How many there were."""
        for record in self._records.values():
            self._ctx.delete("invites", record.invite)
        count = sum(one.uses_left > 0 and one.expires_ms > self._ctx.now for one in self._records.values())
        self._records.clear()
        return count

    def _forget_expired(self) -> None:
        for key, record in list(self._records.items()):
            if record.expires_ms + limits.MESSAGE_AGE_MS < self._ctx.now:
                del self._records[key]
                self._ctx.delete("invites", record.invite)
        if len(self._records) >= OPEN_INVITES_MAX:
            raise NotPermittedError(f"{OPEN_INVITES_MAX} invites are open already", hint="wait until some expire")

    def _grants(self, ring: str, *, ephemeral: bool) -> bool:
        """Whether the first credits are newly issued; else they are a payment. Throw-away members are never granted."""
        return self._ctx.account in self._rooms.books.terms.issuers and ring == "member" and not ephemeral

    def forget_redeemer(self, account: bytes) -> None:
        """Who is out must not come back by the uses that are left of the token it holds."""
        for record in self._records.values():
            if account in record.redeemed and record.uses_left:
                record.uses_left = 0
                self._save(record)

    def _gift_ucr(self, record: InviteRecord) -> int:
        """What one redemption brings: the mesh's grant or --credits (issuer, ring member), else a payment if asked."""
        if self._grants(record.ring, ephemeral=record.ephemeral) and record.credits_ucr < 0:
            return self._ctx.config.amount_ucr("mesh.member_grant")
        return max(0, record.credits_ucr)

    def asked(self, event: JoinAsked) -> None:
        """Somebody redeems a token of ours: certificates, first credits and addresses, or the reason why not."""
        try:
            self._rooms.writes.once_checked(("join", event.call), lambda: self._answer(event))
        except ClawnetError as error:
            self._ctx.out.append(JoinReply(event.call, JoinAnswer(refusal=error.message)))

    def _answer(self, event: JoinAsked) -> None:
        try:
            answer = self._redeem(event.ask)
        except ClawnetError as error:
            self._ctx.log("security", "join.refused", peer=event.peer, address=event.address, reason=error.message)
            self._ctx.count("joins_total", "refused")
            answer = JoinAnswer(refusal=error.message)
        self._ctx.out.append(JoinReply(event.call, answer))

    def _redeem(self, ask: JoinAsk) -> JoinAnswer:
        ctx, members = self._ctx, self._rooms.members
        facts = members.facts
        record = self._records.get(secret_hash(ask.secret))
        if ask.mesh != facts.mesh or record is None:
            raise NotPermittedError("no such invite")
        again = _bond(ask) in record.redeemed
        if record.expires_ms < ctx.now:
            raise NotPermittedError("the invite has expired")
        if record.uses_left <= 0 and not again:
            raise NotPermittedError("the invite has been used")
        body = join_bytes(ask.mesh, ask.secret, ask.node_key, ask.owner_key, ask.name, ask.time_ms)
        if not (verify(ask.node_key, body, ask.node_proof) and verify(ask.owner_key, body, ask.owner_proof)):
            raise NotPermittedError("the joiner does not prove that it holds its keys")
        self._rooms.removals.check_joiner(ask.node_key, ask.owner_key)
        owner = ctx.ports.owner
        if owner is None:
            raise NotPermittedError("the inviter's owner key is on another machine")
        if self._rooms.removals.own:
            raise NotPermittedError("the inviter is no member any longer")
        if record.ring == "own":
            chain = [
                *facts.certificates[:-1],
                certify_node(owner, facts.mesh, ask.node_key, issued_ms=ctx.now, inviter=ctx.wire_me),
            ]
        else:
            may_invite = facts.founded and ctx.config.flag("mesh.members_may_invite") and not record.ephemeral
            certificate = certify_owner(
                owner, facts.mesh, ask.owner_key, may_invite=may_invite, issued_ms=ctx.now, inviter=ctx.wire_me
            )
            chain = [*facts.certificates[:-1], certificate]
        if not again:
            if record.ephemeral:
                self._rooms.throwaways.check_room(1)
            self._first_credits(record, ask)
            if record.ephemeral:
                self._rooms.throwaways.admitted(ask.node_key, ask.owner_key, chain)
            record.uses_left -= 1
            record.redeemed += [ask.node_key, _bond(ask)]
            self._save(record)
            ctx.log("info", "join.admitted", name=clean_name(ask.name), ring=record.ring)
            ctx.count("joins_total", "admitted")
        others = [
            JoinPeer(ctx.ids.outer(other.peer), other.shown[: limits.NAME_CHARS_MAX], other.addresses[:16])
            for other in members.records.values()
            if other.peer in ctx.links and other.addresses
        ]
        peers = [JoinPeer(ctx.wire_me, members.name, self._rooms.cards.addresses[:16]), *others[:63]]
        lease_s = limits.THROWAWAY_LEASE_MS // 1000 if record.ephemeral else 0
        mesh_key = b"" if record.ephemeral else facts.mesh_key
        return JoinAnswer(
            "", record.ring, facts.charter_bytes, chain, mesh_key, ctx.wire_me, peers, lease_s, self._gift_ucr(record)
        )

    def _first_credits(self, record: InviteRecord, ask: JoinAsk) -> None:
        books = self._rooms.books
        gift_ucr = self._gift_ucr(record)
        if gift_ucr <= 0:
            return
        if self._grants(record.ring, ephemeral=record.ephemeral):
            books.grant(ask.node_key, gift_ucr, record.invite)
        else:
            self._rooms.spending.check_payment(record.credential, gift_ucr)
            books.send(ask.node_key, gift_ucr, bytes(32))
            self._rooms.spending.payment(record.credential, gift_ucr)

    # --- joining elsewhere

    def join(self, call: int, params: dict[str, Any]) -> None:
        """Redeems somebody's token; the answer comes over the join stream."""
        ctx = self._ctx
        invite = tokens.decode(str(params.get("token", "")))
        if invite.mesh == self._rooms.members.facts.mesh:
            raise NotPermittedError("this node is a member of that mesh already")
        if invite.expires_ms < ctx.now:
            raise NotPermittedError("the invite has expired", hint="ask for a new token")
        if not params.get("leave") and not self._untouched():
            raise NotPermittedError(
                "this home belongs to a mesh in which it has a history",
                hint="--leave archives that database and joins; or use another --home",
            )
        if ctx.ports.owner is None:
            raise NotPermittedError("this machine's owner key is elsewhere, so it cannot join another mesh on its own")
        secret, name, owner = invite.secret, self._rooms.members.name, ctx.ports.owner
        node_key = public_of(ctx.wire_me)
        body = join_bytes(invite.mesh, secret, node_key, owner.public, name, ctx.now)
        proofs = ctx.ports.sign(body), owner.sign(body)
        ask = JoinAsk(invite.mesh, secret, node_key, owner.public, name, ctx.now, *proofs)
        ctx.out.append(JoinSend(call, invite.inviter, tuple(invite.addresses), ask))

    def _untouched(self) -> bool:
        """True while the chain holds only what init wrote, and no other peer was ever admitted."""
        books = self._rooms.books
        kinds = {EntryKind.GENESIS, EntryKind.GRANT, EntryKind.CLAIM}
        head = books.book.head(self._ctx.account)
        return (head is None or head[0] <= len(kinds) - 1) and not self._rooms.members.records and not self._records

    def answered(self, event: JoinAnswered) -> None:
        """Admitted: the daemon writes the membership and starts anew as a member. Refused: the reason."""
        ctx = self._ctx
        if event.answer is None:
            error = UnreachableError(
                f"the inviter cannot be reached: {event.error}",
                hint="only the inviter redeems its token, so its daemon must run and be reachable",
            )
            ctx.fail(event.call, error)
            return
        answer = event.answer
        if answer.refusal:
            ctx.fail(
                event.call, NotPermittedError(f"the inviter refused: {answer.refusal}", hint="ask for a new token")
            )
            return
        party = {"peer_id": event.inviter, "name": answer.peers[0].name if answer.peers else "", "ring": answer.ring}
        value = {
            "ring": answer.ring,
            "inviter": party,
            "peers": len(answer.peers),
            "granted": format_credits(answer.credits_ucr),
        }
        ctx.out.append(Adopt(event.call, answer, value))


def _bond(ask: JoinAsk) -> bytes:
    """This node with this owner: a lost answer is repeated to both of them alone, else one token would make owners."""
    return hashlib.sha256(b"clawnet/redeemed/1" + ask.node_key + ask.owner_key).digest()
