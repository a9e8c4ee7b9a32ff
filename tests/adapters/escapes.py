"""The ways out of a sandbox that are tried: scripts that say `escaped` where the way is open.

`outside` says how it is shown to be open without the sandbox: "host" as a run on the host (as whoever runs become),
"daemon" as a plain process of the daemon's user, "root" as a plain process of root's. Words in braces stand for what
the test has put there.
"""

from __future__ import annotations

import platform
from typing import Final, NamedTuple

_ARM: Final = platform.machine() == "aarch64"


class Escape(NamedTuple):
    """One way out."""

    script: str
    outside: str = "host"


def _call(x86_64: int, aarch64: int, arguments: str, before: str = "") -> str:
    """A system call through perl; it says so when the kernel takes it."""
    number = aarch64 if _ARM else x86_64
    return f"perl -e '{before} my $got = syscall({number}, {arguments}); print \"escaped\\n\" if $got >= 0'"


def _perl(text: str) -> str:
    return f"perl -e '{text}'"


_CONNECT: Final = (
    "perl -MSocket -e 'socket(S, {family}, SOCK_STREAM, 0) or die; connect(S, {address}) or die; print scalar <S>'"
)
_ATTACH: Final = "my $child = fork // die; if (!$child) { sleep 5; exit } "

ESCAPES: Final[dict[str, Escape]] = {
    # files
    "read a file of this machine": Escape(
        "cat {file}; cat /proc/1/root{file} /proc/self/root{file} /proc/*/root{file} /proc/self/cwd/../../../..{file}"
    ),
    "read it through a link": Escape("ln -s {public} way; cat way/file; ln {file} hard 2>&1 && cat hard"),
    "read a file that another user keeps to itself": Escape("cat {secret}", "root"),
    "read the passwords of this machine": Escape("grep -q ^root /etc/shadow && echo escaped", "root"),
    "read a key in clawnet's home": Escape("cat {home}/keys/node.key /proc/*/root{home}/keys/node.key", "daemon"),
    "talk to clawnet's own socket": Escape(
        _CONNECT.replace("{family}", "PF_UNIX").replace("{address}", 'sockaddr_un("{home}/run/clawnet.sock")'), "daemon"
    ),
    "find the daemon's environment": Escape(
        "cat /proc/{keeper}/environ /proc/*/environ | tr '\\0' '\\n' | grep -q ^{mark}= && echo escaped", "daemon"
    ),
    "find the daemon's open files": Escape(
        "ls -l /proc/*/fd /proc/self/fd | grep -q {leaked} && echo escaped", "daemon"
    ),
    "write outside its directory": Escape("echo x > {public}/drop/$$ && echo escaped"),
    "write to the programs": Escape(": > /usr/.clawnet-escape && rm /usr/.clawnet-escape && echo escaped", "root"),
    "write to the settings": Escape(": > /etc/.clawnet-escape && rm /etc/.clawnet-escape && echo escaped", "root"),
    "make a device": Escape("mknod {public}/drop/device c 1 3 || mknod device c 1 3 && echo escaped", "root"),
    "look at the devices": Escape("[ -d /sys/class ] && echo escaped"),
    "look at what runs on this machine": Escape("ls /run | grep -q . && echo escaped"),
    "open a file by its handle": Escape(
        _call(303, 264, "-100, $n, $h, $m, 0", 'my ($n, $h, $m) = ("/", pack("IIx128", 128, 0), pack("x8"));')
    ),
    # processes
    "see a process of this machine": Escape("ls /proc/{victim} > /dev/null && echo escaped"),
    "signal a process of this machine": Escape("kill -CONT {victim} && echo escaped"),
    "trace a process": Escape(_call(101, 117, "0x4206, $child, 0, 0", _ATTACH)),
    "be traced": Escape(_call(101, 117, "0, 0, 0, 0")),
    "read another process's memory": Escape(_call(310, 270, "$$, 0, 0, 0, 0, 0")),
    "gain privileges by a setuid program": Escape('[ "$({setuid} -u)" = 0 ] && echo escaped', "user"),
    # network
    "reach this machine's loopback": Escape(
        _CONNECT.replace("{family}", "PF_INET").replace("{address}", 'pack_sockaddr_in({port}, inet_aton("127.0.0.1"))')
    ),
    "reach another machine": Escape(
        _CONNECT.replace("{family}", "PF_INET").replace("{address}", 'pack_sockaddr_in({far_port}, inet_aton("{far}"))')
    ),
    "reach an abstract socket": Escape(
        _CONNECT.replace("{family}", "PF_UNIX").replace("{address}", 'pack("Sa*", 1, "\\0{abstract}")')
    ),
    "reach a socket by its path": Escape(
        _CONNECT.replace("{family}", "PF_UNIX").replace("{address}", 'sockaddr_un("{public}/socket")')
    ),
    "see the interfaces": Escape("grep -v -w lo /proc/net/dev | grep -q ': ' && echo escaped"),
    "open a raw socket": Escape(_perl("use Socket; print qq(escaped\\n) if socket(S, PF_INET, SOCK_RAW, 1)"), "root"),
    "open a packet socket": Escape(_perl("print qq(escaped\\n) if socket(S, 17, 3, 0x300)"), "root"),
    # namespaces and mounts
    "nest a user namespace": Escape("unshare -U true && echo escaped"),
    "nest one and mount in it": Escape("unshare -Urm sh -c 'mount -t tmpfs none /mnt' && echo escaped"),
    "nest one by clone": Escape(
        _perl(
            f"my $got = syscall({220 if _ARM else 56}, 0x10000011, 0, 0, 0, 0); exec qq(true) if $got == 0; "
            "print qq(escaped\\n) if $got > 0"
        )
    ),
    "enter another's namespace": Escape("nsenter -t $$ -u true && echo escaped", "root"),
    "mount": Escape(
        "mkdir -p {public}/at && mount -t tmpfs none {public}/at && umount {public}/at && echo escaped", "root"
    ),
    "mount by the newer calls": Escape(_call(430, 430, "$n, 0", 'my $n = "tmpfs";'), "root"),
    "chroot": Escape("chroot / true && echo escaped", "root"),
    "rename the machine": Escape('hostname "$(hostname)" && echo escaped', "root"),
    # the kernel
    "use the keyring": Escape(_call(250, 219, "0, -3, 0, 0")),
    "add a key": Escape(_call(248, 217, "$t, $n, $n, 1, -3", 'my ($t, $n) = ("user", "clawnet");')),
    "load a bpf map": Escape(_call(321, 280, "0, $a, 72", 'my $a = pack("LLLLx56", 2, 4, 4, 1);'), "root"),
    "watch by perf": Escape(_call(298, 241, "$a, 0, -1, -1, 0", 'my $a = pack("LLQx96", 1, 112, 0);'), "root"),
    "set up an io_uring": Escape(_call(425, 425, "8, $b", 'my $b = pack("x120");'), "root"),
    "handle page faults": Escape(_call(323, 282, "1"), "root"),
    "keep memory in files that count for nobody": Escape(_call(319, 279, "$n, 0", 'my $n = "x";')),
    "keep memory in shared segments": Escape(
        _perl("my $id = shmget(0, 4096, 0600); print qq(escaped\\n) if defined $id; shmctl($id, 0, 0)")
    ),
    "keep memory in semaphores": Escape(
        _perl("my $id = semget(0, 1, 0600); print qq(escaped\\n) if defined $id; semctl($id, 0, 0, 0)")
    ),
    "keep memory in message queues": Escape(
        _perl("my $id = msgget(0, 0600); print qq(escaped\\n) if defined $id; msgctl($id, 0, 0)")
    ),
    "look at the clock's tuning": Escape(_call(159, 171, "$b", 'my $b = pack("x208");')),
    "ask for another personality": Escape(_call(135, 92, "0xffffffff")),
    "read the kernel's log": Escape(_call(103, 116, "10, 0, 0"), "root"),
    "type into the terminal": Escape(
        "script -qec \"perl -e 'my \\$c = chr 120; print qq(escaped\\n) if ioctl(STDIN, 0x5412, \\$c)'\" /dev/null"
        " < /dev/null",
        "root",
    ),
}
