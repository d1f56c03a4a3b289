"""What programs are told about proxies, certificates and mirrors."""

from __future__ import annotations

from types import SimpleNamespace

from ansible.module_utils import kit_network


def test_without_a_proxy_only_certificates() -> None:
    assert kit_network.environment("/ca.pem", no_proxy="example.com") == dict.fromkeys(kit_network.CA_NAMES, "/ca.pem")


def test_this_host_is_never_behind_the_proxy() -> None:
    env = kit_network.environment(
        "/ca.pem", "", "http://proxy:3128", "10.0.0.0/8, localhost", ["0.0.0.0", "10.1.2.3", ""]
    )
    assert env["HTTPS_PROXY"] == env["https_proxy"] == "http://proxy:3128"
    assert "HTTP_PROXY" not in env
    assert env["NO_PROXY"] == env["no_proxy"] == "10.0.0.0/8,localhost,127.0.0.1,10.1.2.3"
    assert kit_network.environment("/ca.pem", "", "http://proxy", "", ["::"])["no_proxy"].endswith(",::1")


def test_mirrors_reach_the_tools() -> None:
    env = kit_network.tools(
        {"pypi": "https://m/simple", "npm": "", "go": "https://g,direct", "git": "https://git.m/hub/"}
    )
    assert env == {
        "UV_DEFAULT_INDEX": "https://m/simple",
        "GOPROXY": "https://g,direct",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "url.https://git.m/hub/.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/",
    }
    assert kit_network.tools({}) == {}


def test_a_proxys_password_leaves_a_modules_results() -> None:
    environment = {"https_proxy": "http://me:word@proxy:3128", "HOME": "/home/me@host"}
    module = SimpleNamespace(no_log_values=set(), params={"environment": environment})
    assert kit_network.hide(module) == environment
    assert module.no_log_values == {"http://me:word@proxy:3128"}
