"""Lock of a dataset of a Longbow, which itself lets several writers write."""

from __future__ import annotations

import ipaddress
import socket

from fletcher.net.address import FlightAddress
from fletcher.stores.lock_errors import lock_errors
from fletcher.util.locks import NameLock


def lock_dataset(address: FlightAddress, dataset: str) -> NameLock:
    """Lock a dataset of a store for writing, among the processes of this machine.

    Two writers would not know of each other's rows, and would store a row of the same upload twice.
    Names of the host that resolve to the same IP address are the same store.

    Raises:
        StoreUnavailableError: Another writer holds the lock, or it cannot be taken.
    """
    with lock_errors(dataset, where=" of this machine"):
        return NameLock(f"{host} {address.port} {dataset}" for host in _hosts(address))


def _hosts(address: FlightAddress) -> set[str]:
    """IP addresses of a store's host; all of the loopback interface are one."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError:  # the connection names the problem
        return {address.host}
    hosts = {str(one[4][0]).partition("%")[0] for one in found}
    return {"loopback" if ipaddress.ip_address(one).is_loopback else one for one in hosts}
