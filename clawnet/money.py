"""Amounts: integers of micro-credits inside, decimal strings of credits outside. No float ever holds money."""

from __future__ import annotations

import re

from clawnet.errors import DataError

UCR_PER_CREDIT = 1_000_000
AMOUNT_UCR_MAX = 10**15

_CREDITS = re.compile(r"(\d{1,10})(?:\.(\d{1,6}))?\Z")


def parse_credits(text: str, *, what: str = "amount") -> int:
    """Micro-credits of a decimal string such as "10" or "0.25".

    Raises DataError for anything else: signs, exponents, more than six decimals, more than 10^9 credits.
    """
    match = _CREDITS.match(text.strip())
    if match is None:
        raise DataError(
            f"{what} {text!r} is not an amount of credits",
            hint="write credits with up to six decimals, such as 10 or 0.25",
        )
    amount_ucr = int(match[1]) * UCR_PER_CREDIT + int((match[2] or "").ljust(6, "0"))
    if amount_ucr > AMOUNT_UCR_MAX:
        raise DataError(f"{what} {text!r} is above the limit of {format_credits(AMOUNT_UCR_MAX)} credits")
    return amount_ucr


def format_credits(amount_ucr: int) -> str:
    """The shortest decimal string of an amount; negative amounts (a head in debt) keep their sign."""
    sign = "-" if amount_ucr < 0 else ""
    whole, part = divmod(abs(amount_ucr), UCR_PER_CREDIT)
    return f"{sign}{whole}" + (f".{part:06d}".rstrip("0") if part else "")


def round_up(amount_ucr: int, step_ucr: int) -> int:
    """The smallest multiple of `step_ucr` that is not below `amount_ucr`."""
    return -(-amount_ucr // step_ucr) * step_ucr
