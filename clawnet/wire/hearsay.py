"""What an offer that is passed on says: the body of a relayed statement of kind MARKET_TASK_ANNOUNCE."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from clawnet.wire.messages import Address, Message, Offer, Statement, Word


class OpenOffer(Message, frozen=True):
    """An offer to members that its author does not know: a direct one's content, and how the author is reached.

    `ring` own: for the author's other machines alone. `certificates` make the author known to whoever never met it.
    """

    offer: Offer
    ring: Word
    addresses: Annotated[list[Address], Meta(max_length=16)]
    certificates: Annotated[list[Statement], Meta(max_length=3)]
