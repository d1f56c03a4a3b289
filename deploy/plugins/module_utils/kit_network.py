"""The way out: what tools and services are told about proxies, root certificates and mirrors."""

from __future__ import annotations

import ssl
import urllib.request
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

Env = dict[str, str]

#: This very host; no proxy is asked for it, whatever a site says. ::1 only where something listens there: plugins with
#: an httpx before 0.25 fail at every request when the list has an IPv6 address.
LOOPBACK = ("127.0.0.1", "localhost")
#: By what each family of programs is told where the root certificates are: OpenSSL, Go, uv and httpx; requests; curl;
#: Node; git; pip; boto; gRPC.
CA_NAMES = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
    "PIP_CERT",
    "AWS_CA_BUNDLE",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
)


def certificates(bundle: str) -> Env:
    """Root certificates for every kind of program; ``bundle`` is a PEM file on the host."""
    return dict.fromkeys(CA_NAMES, bundle)


def environment(
    bundle: str, http_proxy: str = "", https_proxy: str = "", no_proxy: str = "", own: Iterable[str] = ()
) -> Env:
    """Certificates and proxies; ``no_proxy`` is the site's comma-separated list, ``own`` addresses of this host.

    Both spellings of each name, as programs read one or the other; a proxy's address may hold a password.
    """
    env = certificates(bundle)
    for name, address in (("http_proxy", http_proxy), ("https_proxy", https_proxy)):
        if address:
            env |= {name: address, name.upper(): address}
    if http_proxy or https_proxy:
        named = [part.strip() for part in no_proxy.split(",")]
        direct = [*named, *LOOPBACK, *({"0.0.0.0": "", "::": "::1"}.get(address, address) for address in own)]
        value = ",".join(dict.fromkeys(filter(None, direct)))
        env |= {"no_proxy": value, "NO_PROXY": value}
    return env


def tools(mirror: dict[str, str]) -> Env:
    """What uv, npm, Go and git are told about mirrors: kind (pypi, npm, go, git) -> address, empty for the tool's own.

    git's stands for https://github.com/; a user's own, longer ``insteadOf`` wins over it.
    """
    env: Env = {}
    for kind, name in (("pypi", "UV_DEFAULT_INDEX"), ("npm", "NPM_CONFIG_REGISTRY"), ("go", "GOPROXY")):
        if mirror.get(kind):
            env[name] = mirror[kind]
    if mirror.get("git"):
        env |= {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{mirror['git'].rstrip('/')}/.insteadOf",
            "GIT_CONFIG_VALUE_0": "https://github.com/",
        }
    return env


def hide(module: Any) -> Env:
    """A module's parameter ``environment`` as text; addresses in it that hold a password leave its results.

    A task's own ``environment:`` would show them to every user of the host, on the command line that starts the module.
    """
    env = {str(key): str(value) for key, value in (module.params["environment"] or {}).items()}
    module.no_log_values.update(value for value in env.values() if "://" in value and "@" in value)
    return env


def proxied(url: str, env: Mapping[str, str]) -> dict[str, str]:
    """The proxies (by scheme) by which an address is reached as an environment says; none for its exceptions."""
    host = urlsplit(url).hostname or ""
    excluded = [name.strip() for name in env.get("no_proxy", "").split(",") if name.strip()]
    if any(host == name or host.endswith("." + name.lstrip(".")) for name in excluded):
        return {}
    return {scheme: address for scheme in ("http", "https") if (address := env.get(f"{scheme}_proxy"))}


def opener(url: str, env: Mapping[str, str]) -> urllib.request.OpenerDirector:
    """Opens this address the way that an environment says: its proxies, its exceptions, its certificates.

    :raises OSError: the certificates cannot be read.
    """
    context = ssl.create_default_context(cafile=env.get("SSL_CERT_FILE") or None)
    made = urllib.request.build_opener(
        urllib.request.ProxyHandler(proxied(url, env)), urllib.request.HTTPSHandler(context=context)
    )
    made.addheaders = [("User-Agent", "dify-kit")]
    return made
