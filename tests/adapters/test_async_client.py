"""The asyncio client where the other end is no daemon that it can use."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from clawnet.api_async import AsyncClient
from clawnet.errors import InternalError, UnreachableError
from clawnet.paths import Home, make_private_dir


@pytest.mark.skipif(sys.platform == "win32", reason="the socket is a Unix one")
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"result": {"rpc_version": 0}}, UnreachableError),
        ({"result": "another program"}, UnreachableError),
        ({"error": {"message": "refused"}}, InternalError),
    ],
    ids=["too old", "no daemon", "refused"],
)
def test_a_client_that_is_not_let_in_hangs_up(tmp_path: Path, answer: dict[str, Any], error: type[Exception]) -> None:
    home = Home(tmp_path / "home")
    make_private_dir(home.run_dir)

    async def body() -> None:
        ended = asyncio.get_running_loop().create_future()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(json.dumps({"id": 0, **answer}).encode() + b"\n")
            ended.set_result(await reader.read())
            writer.close()

        async with await asyncio.start_unix_server(serve, str(home.socket)):
            client = AsyncClient(home)
            with pytest.raises(error):
                await client.connect()
            assert await asyncio.wait_for(ended, 10) == b""

    asyncio.run(body())
