"""A local network on this machine: hosts as network namespaces, cabled to one bridge, with real daemons on them.

The bridge has a namespace of its own, so nothing here touches the machine's network. There is no way out: what hosts
know of each other they know by their own interfaces and by multicast.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from pathlib import Path

from tests.cli.harness import PROGRAM, Node, Nodes

NETWORK = "10.77.0"
_numbers = itertools.count()


def possible() -> str:
    """Why no namespaces can be made here, or ""."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    return ""


def ip(*arguments: str) -> str:
    """Runs iproute2's `ip`."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


class Host:
    """One namespace with an interface `eth0` and its cable to the bridge."""

    def __init__(self, lan: Lan, number: int) -> None:
        self.namespace = f"{lan.namespace}-{number}"
        self.address = f"{NETWORK}.{number}"
        self._bridge = lan.namespace
        self._port = f"p{number}"
        ip("netns", "add", self.namespace)
        ip("-n", self.namespace, "link", "set", "lo", "up")
        ends = ("type", "veth", "peer", "name", self._port, "netns", self._bridge)
        ip("-n", self.namespace, "link", "add", "eth0", *ends)
        ip("-n", self._bridge, "link", "set", self._port, "master", "bridge", "up")
        ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.namespace, "link", "set", "eth0", "up")

    def move(self, number: int) -> None:
        """Another address in place of the one it has."""
        ip("-n", self.namespace, "addr", "del", f"{self.address}/24", "dev", "eth0")
        self.address = f"{NETWORK}.{number}"
        ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")

    def unplug(self) -> None:
        """Nothing leaves and nothing arrives; the host's own interface sees its carrier go."""
        ip("-n", self._bridge, "link", "set", self._port, "down")

    def block(self) -> None:
        """Nothing leaves and nothing arrives, and the host's own interface shows nothing of it."""
        ip("-n", self._bridge, "link", "set", self._port, "nomaster")

    def plug(self) -> None:
        """Takes `unplug` or `block` back."""
        ip("-n", self._bridge, "link", "set", self._port, "master", "bridge", "up")

    def remove(self) -> None:
        """The namespace and what is in it."""
        with contextlib.suppress(AssertionError):
            ip("netns", "del", self.namespace)


class Lan:
    """The bridge, its hosts and the nodes on them."""

    def __init__(self) -> None:
        self.namespace = f"cn{os.getpid()}x{next(_numbers)}"
        self.nodes = Nodes()
        self.hosts: dict[str, Host] = {}
        ip("netns", "add", self.namespace)
        ip("-n", self.namespace, "link", "add", "bridge", "type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
        ip("-n", self.namespace, "link", "set", "bridge", "up")

    def host(self, name: str, **environ: str) -> Node:
        """A new host with a node that is not started."""
        host = self.hosts[name] = Host(self, 10 + len(self.hosts))
        lan = {"CLAWNET_TCP_PORT": "4002", "CLAWNET_QUIC_PORT": "4001", "CLAWNET_NETWORK_ENABLE_MDNS": "true"}
        node = self.nodes(name, **{**lan, **environ})
        node.program = ("ip", "netns", "exec", host.namespace, *PROGRAM)
        return node

    def close(self) -> None:
        """Ends the daemons and removes the namespaces, also when a node complains."""
        try:
            self.nodes.close()
        finally:
            for host in self.hosts.values():
                host.remove()
            ip("netns", "del", self.namespace)


def namespaces() -> set[str]:
    """Those of this process that are left."""
    found = Path("/run/netns")
    return {path.name for path in found.glob(f"cn{os.getpid()}x*")} if found.is_dir() else set()
