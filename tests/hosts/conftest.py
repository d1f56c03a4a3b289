"""Checks of deployed hosts: `make check`, and the quick ones at the end of every `make deploy`.

What a site's hosts run stands in `deploy/inventories/<site>/site.json`, written by the deploy. Each test runs once for
every host that runs what it looks at.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.kit_host import KitHost

ROOT = Path(__file__).resolve().parents[2]
SITE_FILE = pytest.StashKey[Path]()
LEFT_OUT = pytest.StashKey[dict[str, list[str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--site", help="a site's folder or its site.json (default: deploy/inventories/local)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "service(name): runs for the hosts that run this service")
    config.addinivalue_line("markers", "dify: runs for the hosts that have Dify, from source or in containers")
    config.addinivalue_line("markers", "mode(name): runs for the hosts with this dify_mode, or with another than !name")
    config.addinivalue_line("markers", "sees: runs for the hosts whose model sees images")
    site = Path(config.getoption("--site") or ROOT / "deploy" / "inventories" / "local")
    file = site / "site.json" if site.is_dir() else site
    if not file.is_file():
        raise pytest.UsageError(f"{file} is missing: it is written when a deploy ends. Run `make deploy` first.")
    config.stash[SITE_FILE] = file
    config.stash[LEFT_OUT] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kit" not in metafunc.fixturenames:
        return
    config = metafunc.config
    hosts = known_hosts(config.stash[SITE_FILE])
    needed = [mark.args[0] for mark in metafunc.definition.iter_markers("service")]
    fit = [host for host in hosts if set(needed) <= set(host.services)]
    for host in hosts:
        if host not in fit:
            missing = ", ".join(sorted(set(needed) - set(host.services)))
            why = f"{host.name} runs no {missing} (dify_mode: {host.facts['dify_mode']})"
            config.stash[LEFT_OUT].setdefault(why, []).append(metafunc.definition.name)
    modes = {mark.args[0] for mark in metafunc.definition.iter_markers("mode")}
    modes |= {"!skip"} if any(metafunc.definition.iter_markers("dify")) else set()
    for host in list(fit):
        mode = host.facts["dify_mode"]
        if not all(mode != wanted[1:] if wanted.startswith("!") else mode == wanted for wanted in modes):
            fit.remove(host)
            why = f"{host.name}'s dify_mode is {mode}"
            config.stash[LEFT_OUT].setdefault(why, []).append(metafunc.definition.name)
    if any(metafunc.definition.iter_markers("sees")):
        for host in [host for host in fit if not host.facts.get("images")]:
            fit.remove(host)
            why = f"{host.name}'s model {host.facts['model']} does not see images"
            config.stash[LEFT_OUT].setdefault(why, []).append(metafunc.definition.name)
    # A test that no host fits is left out by name in the summary, not skipped once for each host.
    metafunc.parametrize("kit", fit, ids=[host.name for host in fit], scope="session")


@functools.cache
def known_hosts(file: Path) -> list[KitHost]:
    """The hosts of the site; one object each for the whole session, so that what it remembers is asked once."""
    return [KitHost(name, facts) for name, facts in json.loads(file.read_text())["hosts"].items()]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    empty = [
        item
        for item in items
        if any(mark.name == "skip" and "empty parameter set" in str(mark.kwargs) for mark in item.own_markers)
    ]
    if empty:
        config.hook.pytest_deselected(items=empty)
        items[:] = [item for item in items if item not in empty]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for host in known_hosts(config.stash[SITE_FILE]):
        for engine, lines in host.proved.items():
            terminalreporter.write_line(f"{host.name}, {engine}: {'; '.join(lines)}")
    for why, tests in config.stash[LEFT_OUT].items():
        terminalreporter.write_line(f"Left out, because {why}: {', '.join(tests)}")
