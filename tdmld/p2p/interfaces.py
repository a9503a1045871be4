"""The machine's own IP addresses, and where a listener can be reached on them."""

import ipaddress
from collections.abc import Sequence

import ifaddr

from tdmld.p2p.addresses import TcpAddress, format_address, parse_address


def interface_addresses(*, loopback: bool = False) -> tuple[str, ...]:
    """The IP addresses of this machine's interfaces; no link-local ones, and those of the machine
    itself only with `loopback`: then no others. Empty when the system does not tell.

    A few system calls; safe to call in the loop.
    """
    found: list[str] = []
    try:
        adapters = list(ifaddr.get_adapters())
    except OSError:
        return ()
    for adapter in adapters:
        for entry in adapter.ips:
            text = entry.ip if isinstance(entry.ip, str) else entry.ip[0]
            address = ipaddress.ip_address(text)
            if not address.is_link_local and address.is_loopback == loopback:
                found.append(text)
    return tuple(dict.fromkeys(found))


def is_global(host: str) -> bool:
    """Whether the Internet routes this IP address; False for what is no IP address."""
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return False


def expand(listening: Sequence[str], own: Sequence[str]) -> tuple[str, ...]:
    """The multiaddrs `listening` with 0.0.0.0 and :: replaced by the IP addresses `own` of that
    family; relayed ones stay as they are. AddressInvalid."""
    found: list[str] = []
    for text in listening:
        address = parse_address(text)
        if isinstance(address, TcpAddress) and address.host in ("0.0.0.0", "::"):
            six = address.host == "::"
            found += [format_address(ip, address.port) for ip in own if (":" in ip) == six]
        else:
            found.append(text)
    return tuple(dict.fromkeys(found))
