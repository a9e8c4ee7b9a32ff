"""An OpenAI-compatible server for tests, on a real socket: it answers, or misbehaves in the way a test asks for."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LONG_S = 60.0


class AiServer:
    """`mode` is how the next requests are treated; `requests` are (path, authorization, body) of those that came.

    Modes of /chat/completions: answer, error200 (an error in a 200), garbage, html, huge, hang (never answers),
    drip (a byte now and then), gzip, redirect, empty, cut, old (wants max_completion_tokens), or a status as a number.
    `listing` is the mode of /models: list, hang, missing, or a status. `reply` makes the text of an answer.
    """

    def __init__(self, *models: str, token: str = "") -> None:
        self.models = list(models)
        self.token = token
        self.mode = "answer"
        self.listing = "list"
        self.reply = lambda text: f"an answer to {len(text)} characters"
        self.usage: dict[str, Any] | None = {"prompt_tokens": 100, "completion_tokens": 200, "total_tokens": 300}
        self.error: dict[str, Any] = {"message": "no", "type": "server_error"}
        self.headers: dict[str, str] = {}
        self.requests: list[tuple[str, str, dict[str, Any]]] = []
        self.connections: list[socket.socket] = []
        self.asked = threading.Event()
        self.hung_up = threading.Event()
        self.over = threading.Event()
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """Its address, without /v1."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def prompts(self) -> list[str]:
        """The texts it was asked."""
        return [body["messages"][0]["content"] for path, _, body in self.requests if path == "/v1/chat/completions"]

    def start(self) -> AiServer:
        """Listens, at the port it had before if it had one."""
        outer = self

        class Handler(_Handler):
            server_of = outer

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Clients that hang up are what these tests are about."""

        self.over.clear()
        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Nobody listens any longer; what hangs is let go."""
        self.over.set()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join(LONG_S)
            self._server = self._thread = None


@contextlib.contextmanager
def ai_server(*models: str, token: str = "") -> Iterator[AiServer]:
    """A running server for as long as the block lasts."""
    server = AiServer(*(models or ("tiny-1",)), token=token).start()
    try:
        yield server
    finally:
        server.stop()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: AiServer

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""

    def setup(self) -> None:
        super().setup()
        self.server_of.connections.append(self.connection)

    def _send(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in {**self.server_of.headers, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _json(self, status: int, value: Any, **headers: str) -> None:
        self._send(status, json.dumps(value).encode(), **headers)

    def _refused(self) -> bool:
        server = self.server_of
        given = self.headers.get("Authorization", "")
        if server.token and given != f"Bearer {server.token}":
            message = f"Incorrect API key provided: {given}"
            self._json(401, {"error": {"message": message, "code": "invalid_api_key"}})
            return True
        return False

    def do_GET(self) -> None:
        server = self.server_of
        server.requests.append((self.path, self.headers.get("Authorization", ""), {}))
        if server.listing == "hang":
            server.over.wait(LONG_S)
        elif server.listing == "missing" or self.path != "/v1/models":
            self._json(404, {"error": {"message": "not found"}})
        elif server.listing.isdigit():
            self._json(int(server.listing), {"error": server.error})
        elif not self._refused():
            self._json(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in server.models]})

    def do_POST(self) -> None:
        server = self.server_of
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        server.requests.append((self.path, self.headers.get("Authorization", ""), body))
        server.asked.set()
        if self.path != "/v1/chat/completions":
            self._json(404, {"error": {"message": "not found"}})
        elif not self._refused():
            self._answer(server.mode, body)

    def _answer(self, mode: str, body: dict[str, Any]) -> None:
        server = self.server_of
        if mode == "answer" or (mode == "old" and "max_tokens" not in body and "temperature" not in body):
            self._json(200, self._completion(server.reply(body["messages"][0]["content"]), body))
        elif mode == "old":
            wrong = "max_tokens" if "max_tokens" in body else "temperature"
            self._json(400, {"error": {"message": "no", "code": "unsupported_parameter", "param": wrong}})
        elif mode == "error200":
            self._json(200, {"error": server.error})
        elif mode == "garbage":
            self._send(200, b"\xff\xfe{]")
        elif mode == "deep":
            self._send(200, b"[" * 200_000)
        elif mode == "html":
            self._send(200, b"<html>login</html>", "text/html")
        elif mode == "empty":
            self._json(200, {"choices": [{"message": {"role": "assistant", "content": None}}]})
        elif mode == "gzip":
            self._send(200, b"\x1f\x8b", Content_Encoding="gzip")
        elif mode == "redirect":
            self._send(307, b"", Location=f"http://127.0.0.2:{server.port}/v1/chat/completions")
        elif mode == "huge":
            self._huge()
        elif mode == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
        elif mode in ("hang", "drip"):
            self._hang(drip=mode == "drip")
        else:
            self._json(int(mode), {"error": server.error})

    def _completion(self, text: str, body: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        value = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "model": body.get("model", "tiny-1"),
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        }
        return value if self.server_of.usage is None else {**value, "usage": self.server_of.usage}

    def _huge(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        block = b"x" * 65_536
        with contextlib.suppress(OSError):
            while not self.server_of.over.is_set():
                self.wfile.write(b"10000\r\n" + block + b"\r\n")
        self.server_of.hung_up.set()

    def _hang(self, *, drip: bool) -> None:
        """No answer until the client hangs up: reading then ends."""
        if drip:
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
        self.connection.settimeout(0.05)
        while not self.server_of.over.is_set():
            try:
                if drip:
                    self.wfile.write(b" ")
                if not self.connection.recv(1):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        self.server_of.hung_up.set()
        self.close_connection = True
