"""What apps, plugins and user code may reach: the egress proxy's ranges, and who goes through it."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from .kit_network import LOOPBACK as LOOPBACK_NAMES

# The proxy itself refuses loopback, link-local, multicast, private (RFC 1918, fc00::/7) and carrier-grade NAT ranges,
# and IPv6 that carries IPv4 (NAT64, 6to4, Teredo). These are the rest of IANA's special-purpose registries, and a
# cloud's own service that hides behind a public address.
DENIED = (
    "0.0.0.0/8",
    "168.63.129.16/32",  # Azure's host
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "240.0.0.0/4",
    "::/96",  # IPv4-compatible
    "64:ff9b:1::/48",
    "100::/64",
    "2001:db8::/32",
    "fec0::/10",
)
LOOPBACK = ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")


def range_problem(text: object) -> str:
    """Why a text is no range of addresses; empty when it is one, as 10.1.0.0/16 or 10.1.2.3."""
    try:
        ipaddress.ip_network(str(text))
    except ValueError as error:
        return str(error)
    return ""


def command(binary: str, port: int, allow: Iterable[str], proxies: Iterable[str] = ()) -> list[str]:
    """The proxy's command: on loopback, what a site opens before what is denied.

    ``proxies`` are the site's own (URLs, or empty): through them goes what is allowed, so they must be reached.
    """
    opened = [str(ipaddress.ip_network(entry)) for entry in allow]
    upstream = [f"{address}:{port}" for address, port in map(_address, proxies) if address]
    words = [binary, "--listen-ip", "127.0.0.1", "--listen-port", str(port), "--timeout", "10s"]
    for option, values in {"--deny-range": DENIED, "--allow-range": opened, "--allow-address": upstream}.items():
        words += [word for value in dict.fromkeys(values) for word in (option, value)]
    # Seen by whoever built the app, in the HTTP node's answer.
    return [*words, "--additional-error-message-on-deny", "The site opens ranges of addresses with egress_allow."]


def _address(url: str) -> tuple[str, int]:
    """Address (as the proxy's options want it) and port of a URL; no address where a name stands there."""
    parts = urlsplit(url)
    try:
        address = ipaddress.ip_address(parts.hostname or "")
    except ValueError:
        return "", 0
    return f"[{address}]" if address.version == 6 else str(address), parts.port or (
        443 if parts.scheme == "https" else 80
    )


def notices(allow: Iterable[str], proxies: Iterable[str] = ()) -> list[str]:
    """What people should know of the ranges that a site has opened, and of its proxies."""
    found = []
    opened = [ipaddress.ip_network(entry) for entry in allow]
    if opened:
        loopback = any(entry.version == own.version and entry.overlaps(own) for entry in opened for own in LOOPBACK)
        found.append(
            f"egress_allow - apps, plugins and code in workflows reach {', '.join(map(str, opened))}"
            + (", which holds every service that listens on this host alone." if loopback else ".")
        )
    named = dict.fromkeys(urlsplit(url).hostname for url in proxies if url and not _address(url)[0])
    found += [
        f"Egress goes through {host} - if that is a private address, egress_allow must have it, or apps reach nothing."
        for host in named
    ]
    return found


def plugin_network(network: Mapping[str, str], proxy: str, direct: Iterable[str]) -> dict[str, str]:
    """The plugins' environment: the site's ``network``, and the egress proxy ``proxy`` (or empty) if that has none.

    This host (where plugins fetch files) and the addresses ``direct`` are reached without it: the model's, and that of
    the daemon's bucket, as the daemon and its plugins share an environment.
    """
    found = dict(network)
    if not proxy or any(found.get(name) for name in ("http_proxy", "https_proxy")):
        return found
    for name in ("http_proxy", "https_proxy"):
        found |= {name: proxy, name.upper(): proxy}
    names = ",".join(dict.fromkeys((*LOOPBACK_NAMES, *filter(None, (urlsplit(url).hostname for url in direct)))))
    return found | {"no_proxy": names, "NO_PROXY": names}
