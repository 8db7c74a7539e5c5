"""Addresses and ports: the address of this node, and ports that no other process or job gets."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil

from eaopd_megatron.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

PORT_RANGE_VARIABLE, INTERFACE_VARIABLE = "EAOPD_PORTS", "EAOPD_INTERFACE"
_DEFAULT_PORT_RANGE = "15000-29999"  # below the kernel's range for outgoing connections
_JOB_STRIDE = 101  # between the first choices of neighbouring jobs, so that their ports lie apart


def node_address(environment: Mapping[str, str] = os.environ) -> str:
    """Return the address at which other nodes reach this one: that of $EAOPD_INTERFACE or of the node's name."""
    if interface := environment.get(INTERFACE_VARIABLE):
        addresses = psutil.net_if_addrs().get(interface)
        if addresses is None:
            available = ", ".join(sorted(psutil.net_if_addrs()))
            raise UserError(f"{INTERFACE_VARIABLE} is {interface}, which this node has not (it has {available})")
        if ipv4 := [one.address for one in addresses if one.family == socket.AF_INET]:
            return str(ipv4[0])
        raise UserError(f"{INTERFACE_VARIABLE} is {interface}, which has no IPv4 address")
    name = environment.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        return socket.gethostbyname(name)
    except OSError as error:
        raise UserError(
            f"the node's name {name} has no address ({error}): set {INTERFACE_VARIABLE} to its network"
        ) from None


def reserve_port() -> tuple[socket.socket, int]:
    """Reserve a free port of 127.0.0.1 for as long as the returned socket is open, for processes that bind it with
    SO_REUSEADDR, as servers do. A restarted server might otherwise find an outgoing connection on its port."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved, int(reserved.getsockname()[1])


def listening_store(address: str = "127.0.0.1", *, seconds: float = 300.0) -> TCPStore:
    """Start a TCP store at a free port of this address alone.

    The store takes no key, and torch's own lets it listen on all interfaces, whatever host it is given. Only for a name
    that means loopback here (Debian's hosts have theirs at 127.0.1.1) it listens on all. seconds: limit of one
    operation. Raises OSError if the address is none of this host.
    """
    from torch.distributed import TCPStore

    family, *_, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    host, everywhere = str(place[0]), address not in ("localhost", place[0]) and str(place[0]).startswith("127.")
    listener = socket.create_server(("" if everywhere else host, 0), family=family, backlog=1024)
    return TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
        master_listen_fd=listener.detach(),  # the store closes it
    )


class PortClaim:
    """A port that belongs to this process, and to the program that it becomes by exec, until that ends."""

    def __init__(self, port: int, claim: socket.socket) -> None:
        self.port, self._claim = port, claim

    def keep_across_exec(self) -> None:
        self._claim.set_inheritable(True)
        self._claim.detach()


def claim_port(address: str, *, first: int | None = None, seed: int = 0, wait_seconds: float = 20.0) -> PortClaim:
    """Claim a port of this node that nothing listens on and no other job has claimed. Raises UserError.

    first: this port and no other, waiting up to `wait_seconds` for its previous owner to end. seed: where the search
    through $EAOPD_PORTS begins.
    """
    if first is not None:
        deadline = time.monotonic() + wait_seconds
        while (claim := _try_port(address, first)) is None:
            if time.monotonic() > deadline:
                raise UserError(f"port {first} of {address} is taken by another process")
            time.sleep(0.2)
        return claim
    low, high = port_range()
    count = high - low + 1
    for i in range(count):
        if claim := _try_port(address, low + (seed * _JOB_STRIDE + i) % count):
            return claim
    raise UserError(f"every port of {PORT_RANGE_VARIABLE}={low}-{high} is taken on {address}: name others")


def port_range(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return the first and last port of $EAOPD_PORTS. Raises UserError."""
    text = environment.get(PORT_RANGE_VARIABLE) or _DEFAULT_PORT_RANGE
    with suppress(ValueError):
        low, high = (int(part) for part in text.split("-"))
        if 1024 <= low <= high < 65536:
            return low, high
    raise UserError(
        f"{PORT_RANGE_VARIABLE} is {text}; it must be two ports between 1024 and 65535, such as {_DEFAULT_PORT_RANGE}"
    )


def _try_port(address: str, port: int) -> PortClaim | None:
    # A name in Linux' abstract namespace belongs to one process of the host, whatever its user or container, and is
    # free again when that process ends.
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignores connections closed a minute ago
    try:
        claim.bind(f"\0eaopd-port-{port}")
        probe.bind((address, port))
        probe.listen(1)  # with SO_REUSEADDR, only this detects a listener on all addresses
    except OSError as error:
        claim.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"{address} is no address of this node: set {INTERFACE_VARIABLE} to its network") from None
        return None
    finally:
        probe.close()
    return PortClaim(port, claim)
