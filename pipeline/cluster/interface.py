"""Finds the network interface on which this machine's workers meet those of other machines, and tells gloo.

Left alone, gloo looks up this machine's own name, which may mean 127.0.1.1 (as Debian and Ubuntu set it up) or nothing;
workers on other machines then connect to themselves.
"""

from __future__ import annotations

import contextlib
import os
import socket

VARIABLE = "GLOO_SOCKET_IFNAME"
HINT = f"if the machines have several networks, set {VARIABLE} on each to the interface of the one that they share"
ELSEWHERE = "192.0.2.1"  # an address of no machine (RFC 5737); the way there is the way out


def take_rays() -> None:
    """The interface with the address by which Ray knows this machine. Called in a worker of Ray's."""
    import ray.util

    take(ray.util.get_node_ip_address())


def take_torchruns() -> None:
    """The interface that leads to the first process, where torchrun started processes on several machines."""
    if int(os.environ["WORLD_SIZE"]) > int(os.environ.get("LOCAL_WORLD_SIZE", "0")):
        take(address_towards(os.environ.get("MASTER_ADDR", ""), ELSEWHERE))


def take(address: str) -> None:
    """The interface with this address, unless the environment names one."""
    if name := interface_of(address):
        os.environ.setdefault(VARIABLE, name)


def interface_of(address: str) -> str:
    """The name of this machine's interface with that address; "" where none has it."""
    import psutil

    found = psutil.net_if_addrs().items()
    return next((name for name, entries in found if any(entry.address == address for entry in entries)), "")


def address_towards(*peers: str) -> str:
    """This machine's IPv4 address on the way to the first of these that lies outside it; "" where no way is known.
    Nothing is sent."""
    for peer in peers:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, 9))
            address: str = probe.getsockname()[0]
            if not address.startswith("127."):
                return address
    return ""
