"""Hosts made of network namespaces: each has a loopback and one interface to the other, and whoever runs in it sees nothing else."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

PREFIX = "skywork"


def missing() -> list[str]:
    """What is needed and not here, in words; empty where hosts can be made."""
    if shutil.which("ip") is None:
        return ["the program ip (package iproute2)"]
    if os.geteuid() != 0:
        return ["root"]
    name = f"{PREFIX}-try-{os.getpid()}"
    answer = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return [f"the right to make a network namespace ({answer.stderr.strip()})"]
    _ip("netns", "del", name)
    return []


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Host:
    """One host of a pair.

    Args:
        name: of its namespace, and of its interface.
        address: of that interface.
    """

    def __init__(self, name: str, address: str):
        self.name, self.address, self.interface = name, address, f"{name[-9:]}-v"

    def command(self, *words: str) -> list[str]:
        """The words that run a command there."""
        return ["ip", "netns", "exec", self.name, *words]

    def cut_off(self) -> None:
        """Pull the cable: what is sent is lost, and nobody is told."""
        _ip("-n", self.name, "link", "set", self.interface, "down")

    def plug_in(self) -> None:
        _ip("-n", self.name, "link", "set", self.interface, "up")


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with one cable; gone with all that is theirs at the end."""
    first, second = (Host(f"{PREFIX}{os.getpid()}{letter}", f"10.77.0.{number}") for letter, number in (("a", 1), ("b", 2)))
    made = []
    try:
        for host in (first, second):
            _ip("netns", "add", host.name)
            made.append(host)
        _ip("link", "add", first.interface, "netns", first.name, "type", "veth", "peer", "name", second.interface, "netns", second.name)
        for host in (first, second):
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.name, "link", "set", "lo", "up")
            host.plug_in()
        yield first, second
    finally:
        for host in made:
            _ip("netns", "del", host.name)
