"""Who reaches the gateway, how encrypted, and which settings contradict each other."""

from __future__ import annotations

from typing import Any

import pytest
from ansible.module_utils import kit_gateway

VALUES: dict[str, Any] = {
    "gateway_bind": "127.0.0.1",
    "inference_bind": "127.0.0.1",
    "gateway_tls": "none",
    "gateway_tls_certificate": "",
    "gateway_tls_key": "",
    "gateway_trusted_proxies": [],
    "dify_public_url": "",
}
FILES = {"gateway_tls": "files", "gateway_tls_certificate": "/c.pem", "gateway_tls_key": "/k.pem"}
SITE: dict[str, Any] = {
    "bind": "127.0.0.1",
    "port": 17800,
    "tls": "none",
    "https_port": 17818,
    "public_url": "",
    "dify": True,
    "inference_bind": "127.0.0.1",
    "inference_port": 17807,
}


@pytest.mark.parametrize(
    ("bind", "expected"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("10.1.2.3", ["127.0.0.1", "10.1.2.3"]),
        ("0.0.0.0", ["0.0.0.0"]),
        ("::", ["::"]),
    ],
)
def test_the_hosts_own_services_always_reach_it(bind: str, expected: list[str]) -> None:
    assert kit_gateway.listen(bind) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gateway_bind": "fd00::5"},
        {"dify_public_url": "http://dify.example.com"},
        {"dify_public_url": "https://dify.example.com", "gateway_trusted_proxies": ["127.0.0.1/32"]},
        {**FILES, "dify_public_url": "https://10.1.2.3:17818"},
        {"gateway_tls": "acme", "dify_public_url": "https://dify.example.com"},
    ],
)
def test_settings_that_go_together(changes: dict[str, Any]) -> None:
    assert kit_gateway.check(VALUES | changes, {}) == []


@pytest.mark.parametrize(
    ("changes", "what", "remedy"),
    [
        ({"gateway_bind": "dify.example.com"}, "gateway_bind is 'dify.example.com', which is no address", "0.0.0.0"),
        ({"dify_public_url": "https://d.example"}, "https://, but nothing encrypts", "http://d.example"),
        (
            {**FILES, "gateway_tls": "none", "gateway_tls_key": ""},
            "is set, but gateway_tls is none",
            "files",
        ),
        (
            {**FILES, "dify_public_url": "http://d.example"},
            "is files, but dify_public_url is http",
            "https://d.example",
        ),
        ({**FILES}, "dify_public_url is empty", "https://"),
        ({**FILES, "gateway_tls_key": "", "dify_public_url": "https://d.example"}, "gateway_tls_key is empty", "PEM"),
        ({"gateway_tls": "acme", "dify_public_url": "https://10.1.2.3"}, "10.1.2.3 is an address", "name"),
    ],
)
def test_one_message_for_each_contradiction(changes: dict[str, Any], what: str, remedy: str) -> None:
    (found,) = kit_gateway.check(VALUES | changes, {})
    assert what in found.what
    assert remedy in found.remedy


def test_a_setting_of_difys_own_with_the_other_scheme() -> None:
    env = {"ENDPOINT_URL_TEMPLATE": "http://d.example/e/{hook_id}", "SENTRY_DSN": "http://other.example", "TOP_K": 3}
    (found,) = kit_gateway.check_env_schemes("https://d.example", env, "settings.yml")
    assert "ENDPOINT_URL_TEMPLATE is http://d.example" in found.what
    assert kit_gateway.check_env_schemes("", env, "settings.yml") == []


def test_nothing_is_said_where_nobody_else_reaches_anything() -> None:
    assert kit_gateway.exposure(SITE) == []


@pytest.mark.parametrize(
    ("bind", "who"),
    [
        ("0.0.0.0", "everybody who reaches this host"),
        ("10.1.2.3", "everybody in the network of 10.1.2.3"),
        ("8.8.8.8", "everybody on the internet"),
    ],
)
def test_what_becomes_reachable_is_named_with_by_whom(bind: str, who: str) -> None:
    (line,) = kit_gateway.exposure(SITE | {"bind": bind})
    assert who in line
    assert "console, apps, API" in line
    assert "port 17800, unencrypted" in line


def test_with_tls_the_ports_to_pass_on_are_named() -> None:
    site = SITE | {"bind": "0.0.0.0", "tls": "files", "public_url": "https://d.example"}
    reach, ports = kit_gateway.exposure(site)
    assert "port 17818 (TLS); port 17800 only sends browsers there" in reach
    assert "--dport 443 -j REDIRECT --to-ports 17818; iptables" in ports
    assert "--dport 80 -j REDIRECT --to-ports 17800" in ports
    assert len(kit_gateway.exposure(site | {"port": 80, "https_port": 443})) == 1


def test_an_authority_that_cannot_reach_the_gateway() -> None:
    lines = kit_gateway.exposure(SITE | {"tls": "acme", "public_url": "https://d.example"})
    assert "the certificate authority reaches this host only where" in lines[0]


def test_an_open_model_service_is_named() -> None:
    (line,) = kit_gateway.exposure(SITE | {"inference_bind": "10.1.2.3"})
    assert "inference_bind is 10.1.2.3: everybody in the network of 10.1.2.3" in line
    assert kit_gateway.exposure(SITE | {"inference_bind": ""}) == []
