"""Who reaches the gateway, how encrypted, and whether the site's settings about that go together."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from .kit_report import Problem

#: Every address of the host, and nobody's but its own.
ANY, LOOPBACK = ("0.0.0.0", "::"), ("127.0.0.1", "::1")


def listen(bind: str) -> list[str]:
    """The addresses to listen on for a bind setting: 127.0.0.1 always, as the host's own services come that way."""
    return [bind] if bind in ANY else list(dict.fromkeys(["127.0.0.1", bind]))


def who(bind: str) -> str:
    """Who reaches a listener at this address; empty: this host alone."""
    address = ipaddress.ip_address(bind)
    if address.is_loopback:
        return ""
    if bind in ANY:
        return "everybody who reaches this host"
    return "everybody on the internet" if address.is_global else f"everybody in the network of {bind}"


def port_of(url: str) -> int:
    """The port that browsers come to."""
    parts = urlsplit(url)
    return parts.port or {"http": 80, "https": 443}[parts.scheme]


def forward(outside: int, inside: int) -> str:
    """How an administrator lets a port below 1024 reach an ordinary user's."""
    return f"iptables -t nat -A PREROUTING -p tcp --dport {outside} -j REDIRECT --to-ports {inside}"


def exposure(site: Mapping[str, Any]) -> list[str]:
    """A line for each listener that others than this host reach: which, by whom, how guarded. See gateway_site."""
    lines, tls = [], site["tls"] != "none"
    reached = who(site["bind"])
    if reached:
        what = "Dify - console, apps, API, plugins' endpoints -" if site["dify"] else "the gateway's page"
        line = f"gateway_bind is {site['bind']}: {reached} reaches {what} at port "
        if tls:
            line += f"{site['https_port']} (TLS); port {site['port']} only sends browsers there."
        else:
            line += f"{site['port']}, unencrypted: passwords and answers can be read on the way. gateway_tls encrypts."
        lines.append(line)
    if tls and site["tls"] == "acme" and not reached:
        lines.append(
            f"gateway_tls is acme, but gateway_bind is {site['bind']}: the certificate authority reaches this host "
            "only where a proxy of yours passes ports 80 and 443 on."
        )
    # Browsers come to the public URL's port, and to 80 for the redirect; both are below what an ordinary user may have.
    if tls:
        pairs = {port_of(site["public_url"]): site["https_port"]} | ({80: site["port"]} if site["port"] != 80 else {})
        ways = [forward(outside, inside) for outside, inside in pairs.items() if outside != inside]
        if ways:
            lines.append("Ports to forward, once, as root (unless you did, or a router does): " + "; ".join(ways))
    if site["inference_bind"] and (reached := who(site["inference_bind"])):
        lines.append(
            f"inference_bind is {site['inference_bind']}: {reached} reaches the model service at port "
            f"{site['inference_port']}, unencrypted; its key is all that guards it."
        )
    return lines


def check(values: Mapping[str, Any], where: Mapping[str, str]) -> list[Problem]:
    """The gateway's address, its encryption and the public URL go together.

    ``values`` as a host sees them, ``where`` the places of those that the site sets.
    """
    problems: list[Problem] = []

    def problem(name: str, what: str, remedy: str) -> None:
        problems.append(Problem(what, where.get(name, name), remedy))

    for name in ("gateway_bind", "inference_bind"):
        try:
            ipaddress.ip_address(values[name])
        except ValueError:
            what = f"{name} is {values[name]!r}, which is no address."
            problem(name, what, "write an address of the host, 127.0.0.1 for itself alone, or 0.0.0.0 for all.")
    mode, url = values["gateway_tls"], urlsplit(values["dify_public_url"])
    if mode == "none":
        if url.scheme == "https" and not values["gateway_trusted_proxies"]:
            problem(
                "dify_public_url",
                "dify_public_url is https://, but nothing encrypts: gateway_tls is none and no proxy is named; "
                "browsers would not send the login's cookies back.",
                "one of these:\n"
                "- gateway_tls: files, with gateway_tls_certificate and gateway_tls_key; or gateway_tls: acme\n"
                "- gateway_trusted_proxies: [127.0.0.1/32], or where else your proxy is that has the certificate\n"
                f"- dify_public_url: http://{url.netloc}",
            )
        for name in ("gateway_tls_certificate", "gateway_tls_key"):
            if values[name]:
                problem(name, f"{name} is set, but gateway_tls is none.", "set gateway_tls: files, or delete the line.")
        return problems
    if url.scheme != "https":
        what = f"gateway_tls is {mode}, but dify_public_url is {values['dify_public_url'] or 'empty'}."
        host = url.netloc or "dify.example.com"
        problem("dify_public_url", what, f"write dify_public_url: https://{host}, as browsers are to find it.")
        return problems
    if mode == "files":
        for name in ("gateway_tls_certificate", "gateway_tls_key"):
            if not values[name]:
                remedy = f"set {name} to the path of the PEM file on this machine."
                problem("gateway_tls", f"gateway_tls is files, but {name} is empty.", remedy)
        return problems
    host = url.hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        remedy = "give the host a name, or use a certificate of your own (gateway_tls: files)."
        problem("dify_public_url", f"gateway_tls is acme, but {host} is an address, not a host name.", remedy)
    return problems


def check_env_schemes(public_url: str, env: Mapping[str, Any], where: str) -> list[Problem]:
    """No setting of Dify's own names the site by the other scheme: browsers block that as mixed content."""
    public = urlsplit(public_url)
    other = {"http": ("https", "wss"), "https": ("http", "ws")}.get(public.scheme, ())
    problems = []
    for key, value in env.items():
        parts = urlsplit(str(value))
        if parts.scheme in other and parts.hostname == public.hostname:
            what = f"dify_source_env.{key} is {value}, but dify_public_url is {public_url}: browsers block the mixture."
            remedy = "use the scheme of dify_public_url (ws:// goes with http://, wss:// with https://)."
            problems.append(Problem(what, where, remedy))
    return problems
