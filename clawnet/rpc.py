"""The local protocol between commands and the daemon: newline-delimited JSON-RPC 2.0, its methods and its handshake.

The first call on a connection is `hello` with the caller's `rpc_version`; the daemon answers with its own version and
pid, or refuses with the reason. Answers come in any order; `id` tells to which call they belong. What streams comes as
notifications whose params are {"id": <call>, "value": ...}, before the call's one answer. Stdlib only: every command
imports this.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
from typing import Any, Final

from clawnet import limits
from clawnet.errors import ClawnetError, DataError, InternalError, UnreachableError, from_dict

RPC_VERSION: Final = 1
RPC_VERSION_OLDEST: Final = 1
"""The oldest version that is still served; older and newer callers get a sentence that says what to do."""

HELLO: Final = "hello"
OUTPUT: Final = "task.output"
STATE: Final = "task.state"
PLACE: Final = "task.place"
PROGRESS: Final = "task.progress"

METHODS: Final[dict[str, str]] = {
    "hello": "the handshake, first on every connection",
    "status": "the daemon as a process and as a node",
    "doctor": "what the daemon itself finds wrong",
    "config.reload": "read the configuration again",
    "daemon.stop": "drain and exit",
    "task.submit": "accept a task durably; {spec, retry_failed_before_ms, awaited, progress}",
    "task.check": "what is wrong with each of some tasks, accepting none; {specs}",
    "task.get": "one task; {task}",
    "task.list": "tasks, newest first; {limit, states, after}",
    "job.list": "what this node ran for others and has ended, newest first; {limit, after}",
    "task.bids": "the bids for a task; {task}",
    "task.why": "who was asked and why the winner won; {task}",
    "task.follow": "states and output as they come, then the final task; "
    "{task, output, from, stdout, stderr, attempt, so_far, progress}",
    "task.read": "a piece of a stored stream; {task, stream, offset, length}",
    "task.cancel": "cancel a task; {task, reason}",
    "task.save": "put a finished task's output files into a directory; {task, directory, umask, progress}",
    "task.approve": "release a task that was held; {task}",
    "peer.list": "the peers known",
    "peer.nearby": "who announces itself on the local network",
    "peer.show": "one peer; {peer}",
    "peer.connect": "dial a multiaddr; {address}",
    "peer.disconnect": "close the link to a peer; {peer}",
    "peer.ping": "round trips to a peer; {peer, count}",
    "peer.invite": "a token for a new member; {ring, expires_s, uses, credits, ephemeral}",
    "peer.join": "redeem a token; {token, leave}",
    "peer.remove": "end a membership, for the founder; {peer, machine}",
    "node.leave": "give back what is left and end a throw-away membership; the node then ends; {}",
    "peer.ban": "refuse a peer from now on; {peer}",
    "peer.unban": "admit it again; {peer}",
    "peer.reputation": "this node's own view of one or all peers; {peer}",
    "wallet.balance": "what may be spent, what is locked",
    "wallet.history": "the own chain, newest first, or its entries about one task; {limit, after, task}",
    "wallet.escrows": "open lines of ours and to us",
    "wallet.send": "send credits; {peer, amount, memo}",
    "wallet.export": "a page of a chain, decoded and as signed; {account, from, to}",
    "wallet.resume": "write a restored chain though not all peers have answered",
    "identity.rotate": "go on under a new key; the account, its balance and all that is open stay",
    "wallet.audit": "verify chains from their first entry; {peer}",
}

PAGES: Final = frozenset(
    ("task.list", "job.list", "task.get", "task.read", "wallet.history", "wallet.escrows", "wallet.export")
)
"""Methods whose answers may be large: a client has a few of them open at once."""

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
APPLICATION_ERROR: Final = -32000

_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


def request_line(call: int, method: str, params: dict[str, Any]) -> bytes:
    """One call as a line; raises DataError for text that is no Unicode (an argument of other bytes), or too long."""
    text = _encode({"jsonrpc": "2.0", "id": call, "method": method, "params": params})
    try:
        line = text.encode() + b"\n"
    except UnicodeEncodeError as error:
        around = error.object[max(0, error.start - 20) : error.end + 20].encode("utf-8", "backslashreplace").decode()
        raise DataError(f"arguments must be UTF-8; this is not: {around!r}") from error
    if len(line) > limits.RPC_LINE_BYTES_MAX:
        raise DataError(
            f"the request is {len(line)} bytes, over the limit of {limits.RPC_LINE_BYTES_MAX}",
            hint="hand large data over as files, with --input",
        )
    return line


def hello_line(version: str) -> bytes:
    """The handshake; call id 0 is its own."""
    return request_line(0, HELLO, {"rpc_version": RPC_VERSION, "version": version})


def parse_line(line: bytes) -> dict[str, Any]:
    """A line from the daemon as an object; raises UnreachableError when it is none (another program listens there)."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnreachableError("what answers on clawnet's socket does not speak its protocol") from error
    if not isinstance(value, dict):
        raise UnreachableError("what answers on clawnet's socket does not speak its protocol")
    return value


def error_object(error: ClawnetError, code: int = APPLICATION_ERROR) -> dict[str, Any]:
    """A JSON-RPC error that carries the whole ClawnetError."""
    return {"code": code, "message": error.message, "data": error.as_dict()}


def error_to_exception(error: Any) -> ClawnetError:
    """The inverse, for whatever a daemon sent."""
    if isinstance(error, dict):
        data = error.get("data")
        if isinstance(data, dict) and "code" in data:
            return from_dict(data)
        return InternalError(str(error.get("message", "unknown error")))
    return InternalError("the daemon answered with a malformed error")


def check_caller(params: dict[str, Any]) -> ClawnetError | None:
    """The daemon's half of the handshake: why this caller cannot be served, or None."""
    theirs = params.get("rpc_version")
    if isinstance(theirs, bool) or not isinstance(theirs, int):
        return DataError("the first call must be hello with an integer rpc_version")
    if theirs > RPC_VERSION:
        return UnreachableError(
            f"the running daemon is older than this command (it speaks version {RPC_VERSION} of the local protocol, "
            f"the command version {theirs})",
            hint="run `clawnet daemon restart` so that the installed version takes over",
            rpc_version=RPC_VERSION,
        )
    if theirs < RPC_VERSION_OLDEST:
        return UnreachableError(
            f"this command is older than the running daemon (the daemon speaks versions {RPC_VERSION_OLDEST} to "
            f"{RPC_VERSION} of the local protocol, the command version {theirs})",
            hint="use the clawnet that started the daemon, or upgrade this one",
            rpc_version=RPC_VERSION,
        )
    return None


def check_daemon(hello: Any) -> None:
    """The command's half: raises UnreachableError when the daemon's answer to hello names a version we do not speak."""
    theirs = hello.get("rpc_version") if isinstance(hello, dict) else None
    if not isinstance(theirs, int):
        raise UnreachableError("what answers on clawnet's socket does not speak its protocol")
    if theirs < RPC_VERSION_OLDEST:
        raise UnreachableError(
            f"the running daemon is older than this command (local protocol {theirs} against {RPC_VERSION})",
            hint="run `clawnet daemon restart` so that the installed version takes over",
        )


def peer_of(connection: socket.socket) -> tuple[int | None, int | None]:
    """(uid, pid) of the process at the other end of a Unix socket, as far as the system tells."""
    if sys.platform in ("linux", "android"):
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _ = struct.unpack("3i", raw)
        return uid, pid
    if sys.platform == "darwin":
        # struct xucred: version, uid, ...; LOCAL_PEERCRED is 1 and LOCAL_PEERPID 2 at level SOL_LOCAL (0).
        uid = struct.unpack("2I", connection.getsockopt(0, 1, 76)[:8])[1]
        pid = struct.unpack("i", connection.getsockopt(0, 2, 4))[0]
        return uid, pid
    return None, None
