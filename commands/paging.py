"""Lists that come in pages: as many items as were asked for, or all of them."""

from __future__ import annotations

from typing import Any

from clawnet.api import Client

PAGE = 500


def first(client: Client, method: str, params: dict[str, Any], limit: int) -> dict[str, Any]:
    """The first `limit` items of a list, with what continues it when there are more."""
    items: list[Any] = []
    after = None
    while len(items) < limit:
        page = client.call(method, {**params, "limit": min(PAGE, limit - len(items)), **_from(after)})
        items += page["items"]
        after = page["next"]
        if not after:
            break
    return {"items": items, "next": after}


def everything(client: Client, method: str, params: dict[str, Any]) -> dict[str, Any]:
    """The whole list."""
    items: list[Any] = []
    after = None
    while True:
        page = client.call(method, {**params, "limit": PAGE, **_from(after)})
        items += page["items"]
        after = page["next"]
        if not after:
            return {"items": items, "next": None}


def _from(after: str | None) -> dict[str, str]:
    return {"after": after} if after else {}
