"""What the egress proxy is told, and who goes through it; tests/integration/test_egress.py asks the real one."""

from __future__ import annotations

import itertools

import pytest
from ansible.module_utils import kit_egress, kit_network

DIRECT = kit_network.environment("/ca.pem")


@pytest.mark.parametrize("text", ["10.0.0.0/8", "10.1.2.3", "fd00::/8", "::1"])
def test_ranges_and_addresses_may_be_opened(text: str) -> None:
    assert kit_egress.range_problem(text) == ""


@pytest.mark.parametrize("text", ["10.0.0.1/8", "10.0.0.0/33", "intranet", "10.0.0.0-10.0.0.9", None, "10.1"])
def test_what_is_no_range_is_named(text: object) -> None:
    assert str(text) in kit_egress.range_problem(text)


def test_the_command_listens_on_loopback_and_denies_before_it_allows() -> None:
    words = kit_egress.command("/b", 15, ["10.1.2.3", "10.9.0.0/16"])
    assert words[:5] == ["/b", "--listen-ip", "127.0.0.1", "--listen-port", "15"]
    pairs = list(itertools.pairwise(words))
    assert ("--allow-range", "10.1.2.3/32") in pairs
    assert ("--allow-range", "10.9.0.0/16") in pairs
    assert ("--deny-range", "168.63.129.16/32") in pairs


def test_a_proxy_of_the_site_is_reached_and_its_password_stays_out_of_the_command() -> None:
    words = kit_egress.command("/b", 15, [], ["http://me:secret@10.0.0.9:3128", "https://[fd00::9]", "", "http://p:1"])
    assert [words[i + 1] for i, word in enumerate(words) if word == "--allow-address"] == [
        "10.0.0.9:3128",
        "[fd00::9]:443",
    ]
    assert "secret" not in " ".join(words)


def test_what_is_open_is_said() -> None:
    assert kit_egress.notices([]) == []
    [line] = kit_egress.notices(["10.0.0.0/8"])
    assert "10.0.0.0/8" in line
    assert "this host" not in line
    assert "on this host" in kit_egress.notices(["127.0.0.1"])[0]
    assert "on this host" in kit_egress.notices(["::/0"])[0]
    [line] = kit_egress.notices([], ["http://u:p@proxy.corp:3128", "http://10.0.0.9:3128", ""])
    assert "proxy.corp" in line
    assert "u:p" not in line


def test_plugins_go_through_it_but_for_this_host_and_the_model() -> None:
    found = kit_egress.plugin_network(DIRECT, "http://127.0.0.1:15", ["https://gpu-box:8000/v1", ""])
    assert {found[name] for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")} == {
        "http://127.0.0.1:15"
    }
    assert found["no_proxy"] == found["NO_PROXY"] == "127.0.0.1,localhost,gpu-box"
    assert found["SSL_CERT_FILE"] == "/ca.pem"
    assert kit_egress.plugin_network(DIRECT, "p", ["http://[fd00::5]:1/v1"])["no_proxy"].endswith(",fd00::5")
    assert kit_egress.plugin_network(DIRECT, "p", ["http://127.0.0.1:1/v1"])["no_proxy"] == "127.0.0.1,localhost"
    both = kit_egress.plugin_network(DIRECT, "p", ["http://model:1/v1", "https://s3.example.com:9000"])
    assert both["no_proxy"].endswith(",model,s3.example.com")


def test_plugins_of_a_site_with_a_proxy_go_through_that_one() -> None:
    own = kit_network.environment("/ca.pem", https_proxy="http://proxy:3128", no_proxy="a,b")
    assert kit_egress.plugin_network(own, "http://127.0.0.1:15", ["http://x/v1"]) == own
    assert kit_egress.plugin_network(DIRECT, "", ["http://x/v1"]) == DIRECT
