"""Host names and addresses."""

from __future__ import annotations

import ipaddress

# Of an IPv6 address so many bits are one client: a network that a provider gives to one line, a home or an office.
CLIENT_BITS = 64


def is_loopback(host: str) -> bool:
    """Whether the name or address is this machine's own: nothing sent there leaves it (RFC 6761, section 6.3)."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_address(host: str) -> bool:
    """Whether it is an IP address and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def client_network(address: str) -> str:
    """Whom an address is counted for: itself, or its /64; IPv4 inside of IPv6 is IPv4. What is no address stays."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, CLIENT_BITS), strict=False))
