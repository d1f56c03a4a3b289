"""A deployed host, for the checks in this folder."""

from __future__ import annotations

import functools
import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import testinfra

PROBE = Path(__file__).with_name("probe.py")


class Supervised(NamedTuple):
    """A program as supervisor sees it."""

    state: str
    pid: int | None
    line: str


class KitHost:
    """One host of the site: what the deploy says about it, and ways to ask it.

    >>> kit.ports["redis"], kit.probe("redis")
    """

    def __init__(self, name: str, facts: dict[str, Any]) -> None:
        self.name = name
        self.facts = facts
        self.home: str = facts["kit_home"]
        self.user: str = facts["kit_user"]
        self.services: list[str] = facts["services"]
        # Dify's, the plugin daemon's, the vectors'.
        self.databases: list[str] = facts.get("databases", ["dify", "dify_plugin", "dify_vector"])
        # Named like the services, and daemon's second one for plugin developers: only what this host runs.
        self.ports = {
            name.replace("_", "-"): int(port)
            for name, port in facts["ports"].items()
            if port and any(name.replace("_", "-").startswith(service) for service in self.services)
        }
        # Of what runs in containers: service -> image.
        self.containers: dict[str, str] = facts.get("compose", {}).get("images", {})
        # As this host itself reaches the gateway: the public address may not be routed from here.
        self.url = f"http://127.0.0.1:{self.ports['gateway']}"
        self.local: bool = facts["connection"] == "local"
        # What the engines do, for the summary.
        self.proved: dict[str, list[str]] = {}
        # For `ssh`: how Ansible reaches the host.
        self.ssh: list[str] = [*facts.get("ssh", []), facts["address"]]
        options = {} if self.local else {"ssh_extra_args": shlex.join(self.ssh[:-1])}
        self.host = testinfra.get_host("local://" if self.local else f"ssh://{facts['address']}", **options)

    def port(self, name: str) -> int:
        """Where something listens on loopback, a process of the kit's or a container of Dify's."""
        return int(self.facts["ports"][name.replace("-", "_")])

    def run(self, *command: str, as_service_user: bool = True) -> str:
        """Runs a command on the host, as the service user unless said; returns its output, fails with its words."""
        line = shlex.join(command)
        if self.facts["become"] and as_service_user:
            line = shlex.join(["su", "-s", "/bin/sh", self.user, "-c", line])
        result = self.host.run(line)
        if result.rc:
            pytest.fail(
                f"{self.name}: `{command[0]}` ended {result.rc}:\n{result.stdout}{result.stderr}".strip(), pytrace=False
            )
        return str(result.stdout)

    def probe(
        self, question: str, /, python: str = "runtime/venv/bin/python", as_service_user: bool = True, **arguments: Any
    ) -> Any:
        """The answer to a question of probe.py; `python` is relative to kit_home."""
        source = PROBE.read_text()
        parameters = json.dumps({"home": self.home, **arguments})
        # Whoever looks leaves nothing behind, no byte code either.
        command = [f"{self.home}/{python}", "-B", "-c", source, question, parameters]
        return json.loads(self.run(*command, as_service_user=as_service_user))

    def why(self, service: str) -> str:
        """Why an engine died, named from its log; empty for other services and unknown causes."""
        engines = self.facts.get("model_service", {})
        if service not in engines.get("engines", {}):
            return ""
        log, python = f"{self.home}/var/log/{service}.log", engines["python"]
        line = f"tail -c 1000000 {shlex.quote(log)} | {shlex.quote(python)} -m inference explain"
        cause = self.run("sh", "-c", line).splitlines()
        return f"{service}: {cause[0]}. Remedy: {cause[1]}" if len(cause) == 2 else ""

    @functools.cached_property
    def supervised(self) -> dict[str, Supervised]:
        """Every program that supervisor knows on this host."""
        # supervisorctl ends with 3 when any program doesn't run: that is for the tests to say.
        script = "runtime/venv/bin/supervisorctl -c etc/supervisord.conf status || [ $? = 3 ]"
        lines = self.run("sh", "-c", f"cd {shlex.quote(self.home)} && {{ {script}; }}").splitlines()
        found = {}
        for line in lines:
            name, state, *rest = line.split()
            found[name.rpartition(":")[2]] = Supervised(
                state, int(rest[1].rstrip(",")) if rest[:1] == ["pid"] else None, line
            )
        return found

    @functools.cached_property
    def supervisord(self) -> int:
        """The process that every service of the kit descends from."""
        return int(self.run("cat", f"{self.home}/var/run/supervisord.pid"))
