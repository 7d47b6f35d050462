"""Networks in plugins' settings, and whether an address is in one."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any

from pydantic import BeforeValidator

__all__ = ["Network", "within"]


def _network(value: Any) -> Any:
    try:
        return ipaddress.ip_network(value)
    except ValueError as exc:
        raise ValueError(f"{exc}; write it like 192.0.2.0/24, 192.0.2.7 or 2001:db8::/32") from exc


Network = Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)]


def within(address: str, networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    """An IPv4 address that comes as IPv6 (`::ffff:192.0.2.1`) is the IPv4 address. What is none is in no network."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return any(ip.version == network.version and ip in network for network in networks)
