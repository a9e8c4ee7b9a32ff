"""The node's end of the line to a worker process: a socket, or two pipes where none can be handed over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import threading
from typing import Final

from clawnet import limits

_PIECES_MAX: Final = 8
"""Pieces that a thread has read and the loop has not taken: a worker writes no faster than the node reads."""


class WorkerPipes:
    """Standard input and output of a worker where no socket can be handed over: a thread reads."""

    def __init__(
        self, process: subprocess.Popen[bytes], worker: asyncio.Protocol, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._process = process
        self._worker = worker
        self._loop = loop
        self._room = threading.Semaphore(_PIECES_MAX)
        threading.Thread(target=self._read, name="clawnet-worker-pipe", daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        try:
            while data := os.read(descriptor, 256 * limits.KIB):
                self._room.acquire()
                self._loop.call_soon_threadsafe(self._received, data)
            self._loop.call_soon_threadsafe(self._worker.connection_lost, None)
        except (OSError, RuntimeError):
            return  # closed from this side, or the loop is gone

    def _received(self, data: bytes) -> None:
        self._room.release()
        self._worker.data_received(data)

    def write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except OSError:
            self._process.kill()  # its end is heard through the other pipe

    def close(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not flushed goes nowhere
                    pipe.close()


class WorkerSocket:
    """Our end of a worker's socket; unlike an asyncio transport it is made without awaiting."""

    def __init__(self, sock: socket.socket, worker: asyncio.Protocol, loop: asyncio.AbstractEventLoop) -> None:
        self._sock = sock
        self._worker = worker
        self._loop = loop
        self._unsent = bytearray()
        loop.add_reader(sock, self._on_readable)

    def _on_readable(self) -> None:
        try:
            data = self._sock.recv(256 * limits.KIB)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            self._worker.data_received(data)
        else:
            self.close()
            self._worker.connection_lost(None)

    def write(self, data: bytes) -> None:
        if self._sock.fileno() < 0:
            return
        if not self._unsent:
            try:
                data = data[self._sock.send(data) :]
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                return  # its end is heard by reading
            if not data:
                return
            self._loop.add_writer(self._sock, self._on_writable)
        self._unsent += data

    def _on_writable(self) -> None:
        try:
            del self._unsent[: self._sock.send(self._unsent)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._unsent.clear()
        if not self._unsent:
            self._loop.remove_writer(self._sock)

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
