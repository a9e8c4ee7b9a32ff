"""Listening on a named pipe that its owner alone may open, from this machine alone.

asyncio's own start_serving_pipe makes pipes that Everyone may read and that accept clients over the network. Here the
pipe is made through ctypes with a security descriptor for the current user's SID and PIPE_REJECT_REMOTE_CLIENTS; the
rest is asyncio's proactor loop. Written against the Windows API's documentation; no test has run it on Windows yet.
"""

from __future__ import annotations

import asyncio
import ctypes
import sys
from asyncio import windows_events, windows_utils
from collections.abc import Callable
from ctypes import wintypes
from typing import Any

from clawnet.ipc.errors import cannot_listen, in_use

assert sys.platform == "win32", "this module is for Windows"

_PIPE_ACCESS_DUPLEX = 0x3
_FILE_FLAG_OVERLAPPED = 0x40000000
_FILE_FLAG_FIRST_PIPE_INSTANCE = 0x80000
_PIPE_REJECT_REMOTE_CLIENTS = 0x8
_UNLIMITED_INSTANCES = 255
_BUFFER_BYTES = 65536
_INVALID_HANDLE = ctypes.c_void_p(-1).value
_TOKEN_QUERY = 0x8
_TOKEN_USER = 1
_ERROR_ACCESS_DENIED = 5
_ERROR_PIPE_BUSY = 231

_kernel = ctypes.WinDLL("kernel32", use_last_error=True)
_advapi = ctypes.WinDLL("advapi32", use_last_error=True)
_kernel.CreateNamedPipeW.restype = wintypes.HANDLE
_kernel.CreateNamedPipeW.argtypes = [wintypes.LPCWSTR, *[wintypes.DWORD] * 6, ctypes.c_void_p]
_kernel.GetCurrentProcess.restype = wintypes.HANDLE
_kernel.CloseHandle.argtypes = [wintypes.HANDLE]
_kernel.LocalFree.argtypes = [ctypes.c_void_p]
_advapi.OpenProcessToken.argtypes = [wintypes.HANDLE, wintypes.DWORD, ctypes.POINTER(wintypes.HANDLE)]
_advapi.GetTokenInformation.argtypes = [
    wintypes.HANDLE,
    ctypes.c_int,
    ctypes.c_void_p,
    wintypes.DWORD,
    ctypes.POINTER(wintypes.DWORD),
]
_advapi.ConvertSidToStringSidW.argtypes = [ctypes.c_void_p, ctypes.POINTER(wintypes.LPWSTR)]
_advapi.ConvertStringSecurityDescriptorToSecurityDescriptorW.argtypes = [
    wintypes.LPCWSTR,
    wintypes.DWORD,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
]


class _SecurityAttributes(ctypes.Structure):
    _fields_ = [
        ("length", wintypes.DWORD),
        ("descriptor", ctypes.c_void_p),
        ("inherit", wintypes.BOOL),
    ]


def _check(ok: Any) -> None:
    if not ok:
        raise ctypes.WinError(ctypes.get_last_error())


def _user_sid() -> str:
    """The current user's SID as text."""
    token = wintypes.HANDLE()
    _check(_advapi.OpenProcessToken(_kernel.GetCurrentProcess(), _TOKEN_QUERY, ctypes.byref(token)))
    try:
        size = wintypes.DWORD()
        _advapi.GetTokenInformation(token, _TOKEN_USER, None, 0, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        _check(_advapi.GetTokenInformation(token, _TOKEN_USER, buffer, size, ctypes.byref(size)))
        # TOKEN_USER begins with a pointer to the SID.
        sid = ctypes.cast(buffer, ctypes.POINTER(ctypes.c_void_p))[0]
        text = wintypes.LPWSTR()
        _check(_advapi.ConvertSidToStringSidW(sid, ctypes.byref(text)))
        try:
            return str(text.value)
        finally:
            _kernel.LocalFree(ctypes.cast(text, ctypes.c_void_p))
    finally:
        _kernel.CloseHandle(token)


def _create(address: str, *, first: bool) -> int:
    """One instance of the pipe: duplex, overlapped, this user only, this machine only."""
    descriptor = ctypes.c_void_p()
    # D:P - an access list that inherits nothing; one entry: all access for this user.
    sddl = f"D:P(A;;GA;;;{_user_sid()})"
    convert = _advapi.ConvertStringSecurityDescriptorToSecurityDescriptorW
    _check(convert(sddl, 1, ctypes.byref(descriptor), None))
    try:
        attributes = _SecurityAttributes(ctypes.sizeof(_SecurityAttributes), descriptor, False)
        handle = _kernel.CreateNamedPipeW(
            address,
            _PIPE_ACCESS_DUPLEX | _FILE_FLAG_OVERLAPPED | (_FILE_FLAG_FIRST_PIPE_INSTANCE if first else 0),
            _PIPE_REJECT_REMOTE_CLIENTS,
            _UNLIMITED_INSTANCES,
            _BUFFER_BYTES,
            _BUFFER_BYTES,
            0,
            ctypes.byref(attributes),
        )
        if handle in (None, _INVALID_HANDLE):
            raise ctypes.WinError(ctypes.get_last_error())
        return int(handle)
    finally:
        _kernel.LocalFree(descriptor)


class PipeListener:
    """Always one free instance of the pipe; a connected one becomes a transport."""

    def __init__(
        self, loop: windows_events.ProactorEventLoop, address: str, accept: Callable[[], asyncio.Protocol]
    ) -> None:
        self._loop: Any = loop
        self._address = address
        self._accept = accept
        self._closed = False
        self._free: Any = None
        self._wait(first=True)

    def _wait(self, *, first: bool) -> None:
        self._free = windows_utils.PipeHandle(_create(self._address, first=first))
        # asyncio offers the overlapped ConnectNamedPipe only here, as its own start_serving_pipe uses it.
        waiting = self._loop._proactor.accept_pipe(self._free)
        waiting.add_done_callback(self._connected)

    def _connected(self, waiting: asyncio.Future[Any]) -> None:
        pipe, self._free = self._free, None
        if self._closed or waiting.cancelled() or waiting.exception() is not None:
            pipe.close()
            if self._closed:
                return
        else:
            self._loop._make_duplex_pipe_transport(pipe, self._accept(), extra={"addr": self._address})
        self._wait(first=False)

    def close(self) -> None:
        self._closed = True
        if self._free is not None:
            self._free.close()


def listen(loop: Any, address: str, accept: Callable[[], asyncio.Protocol]) -> PipeListener:
    """Listens on the pipe; raises ConfigError when another daemon has it."""
    try:
        return PipeListener(loop, address, accept)
    except OSError as error:
        if getattr(error, "winerror", 0) in (_ERROR_ACCESS_DENIED, _ERROR_PIPE_BUSY):
            raise in_use(address) from error
        raise cannot_listen(address, error) from error
