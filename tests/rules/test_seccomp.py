"""The system call filter, run by a small interpreter of classic BPF over every call number, for both architectures."""

from __future__ import annotations

import errno
import struct

import pytest

from clawnet.execution import seccomp

ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000


def _run(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    padded = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("<IIQ6Q", number, architecture, 0, *padded)
    code = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    accumulator = at = 0
    while True:
        operation, if_true, if_false, value = code[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif operation == 0x06:
            return value
        else:
            holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[operation]
            at += if_true if holds else if_false


@pytest.mark.parametrize("name", ["x86_64", "aarch64"])
def test_exactly_the_listed_calls_are_refused(name: str) -> None:
    program, architecture = seccomp.build(name), seccomp.AUDIT_ARCH[name]
    assert program is not None
    column = list(seccomp.AUDIT_ARCH).index(name)
    eperm = {numbers[column] for numbers in seccomp._REFUSED.values()}
    enosys = {numbers[column] for numbers in seccomp._ABSENT.values()}
    for number in range(600):
        expected = ALLOW
        if number in eperm:
            expected = ERRNO | errno.EPERM
        elif number in enosys:
            expected = ERRNO | errno.ENOSYS
        family = 1 if number == seccomp._SOCKET[column] else 0
        assert _run(program, architecture, number, family) == expected, number


@pytest.mark.parametrize("name", ["x86_64", "aarch64"])
def test_arguments_decide_where_they_must(name: str) -> None:
    program, architecture = seccomp.build(name), seccomp.AUDIT_ARCH[name]
    assert program is not None
    column = list(seccomp.AUDIT_ARCH).index(name)
    for numbers in seccomp._FLAGS_FIRST.values():
        for bit in (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
            assert _run(program, architecture, numbers[column], bit | 17) == ERRNO | errno.EPERM
        assert _run(program, architecture, numbers[column], 0x3D0F00) == ALLOW, "threads"
    ioctl, socket = seccomp._IOCTL[column], seccomp._SOCKET[column]
    assert _run(program, architecture, ioctl, 0, 0x5412) == ERRNO | errno.EPERM
    assert _run(program, architecture, ioctl, 0, 0x541C) == ERRNO | errno.EPERM
    assert _run(program, architecture, ioctl, 0, 0x5401) == ALLOW
    for family in range(50):
        wanted = ALLOW if family in seccomp._FAMILIES else ERRNO | errno.EAFNOSUPPORT
        assert _run(program, architecture, socket, family) == wanted


def test_other_architectures_and_x32_are_killed() -> None:
    program = seccomp.build("x86_64")
    assert program is not None
    assert _run(program, 0x40000003, 1) == KILL
    for number in (0x40000000, 0x40000001, 0xFFFFFFFF):
        assert _run(program, seccomp.AUDIT_ARCH["x86_64"], number) == KILL
    assert seccomp.build("riscv64") is None


def test_no_jump_is_too_long() -> None:
    for name in seccomp.AUDIT_ARCH:
        program = seccomp.build(name)
        assert program is not None
        assert len(program) // 8 < 4096
