"""What statements say that are passed on for others: the bodies of Relayed of kinds that have no other."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from clawnet.wire.messages import Address, Message, Offer, Rotations, Statement, Word


class OpenOffer(Message, frozen=True):
    """An offer to members that its author does not know: a direct one's content, and how the author is reached.

    `ring` own: for the author's other machines alone. `certificates` make the author known to whoever never met it.
    """

    offer: Offer
    ring: Word
    addresses: Annotated[list[Address], Meta(max_length=16)]
    certificates: Annotated[list[Statement], Meta(max_length=3)]
    rotations: Rotations = []  # noqa: RUF012 - msgspec copies it


class Rotated(Message, frozen=True):
    """Kind MEMBERSHIP: all rotate entries of the author's account up to the one that gave the author's key up."""

    rotations: Rotations
