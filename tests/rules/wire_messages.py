"""Hypothesis strategies for every wire struct, read off the structs' own types and bounds."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from clawnet.wire.hearsay import OpenOffer
from clawnet.wire.messages import PAYLOADS, JoinAnswer, JoinAsk, Message, PeerCard, Relayed

STRUCTS: tuple[type[Message], ...] = (*PAYLOADS.values(), JoinAsk, JoinAnswer, OpenOffer, PeerCard, Relayed)
_SHORT = 40


def _strategy(kind: inspect.Type) -> st.SearchStrategy[Any]:
    match kind:
        case inspect.IntType(ge=low, le=high):
            return st.integers(low, high)
        case inspect.FloatType(ge=low, le=high):
            return st.floats(low, high, allow_nan=False)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.StrType(max_length=longest):
            return st.text(max_size=min(longest or _SHORT, _SHORT))
        case inspect.BytesType(min_length=shortest, max_length=longest):
            shortest = shortest or 0
            return st.binary(min_size=shortest, max_size=max(shortest, min(longest or _SHORT, shortest + _SHORT)))
        case inspect.ListType(item_type=item, min_length=fewest, max_length=most):
            fewest = fewest or 0
            return st.lists(_strategy(item), min_size=fewest, max_size=max(fewest, min(most or 3, 3)))
        case inspect.StructType(cls=cls):
            return struct(cls)
        case inspect.UnionType(types=types):
            return st.one_of([_strategy(one) for one in types])
    raise AssertionError(f"no strategy for {kind}")


def struct(cls: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Any value of this struct that its bounds allow."""
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    return st.builds(cls, **{field.name: _strategy(field.type) for field in info.fields})


MESSAGES = {cls: struct(cls) for cls in STRUCTS}
"""A strategy for each struct."""

CONTROL = st.one_of([MESSAGES[cls] for cls in PAYLOADS.values()])
"""Any control message."""
