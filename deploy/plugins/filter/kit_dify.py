"""Filters for the roles dify_source and plugin_daemon: what Dify is built from and told; see module_utils."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ansible.module_utils
import yaml
from ansible.errors import AnsibleFilterError

# Ansible finds the kit's module_utils for modules only; a filter is imported as it is.
ansible.module_utils.__path__.append(str(Path(__file__).parents[1] / "module_utils"))
from ansible.module_utils import kit_build, kit_dify, kit_mirrors_file, kit_network


def environment(make: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A filter around one of ``kit_dify``'s environments."""

    def kit_env(site: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return make(site)
        except kit_dify.SettingsProblem as problem:
            raise AnsibleFilterError(str(problem)) from None

    return kit_env


def sizing(
    cores: int, memory_mb: int, layout: str = "auto", workers: int = 0, connections: int = 0, tasks: int = 0
) -> dict[str, Any]:
    """``cores | kit_dify_sizing(memory_mb)``: see ``kit_dify.size``."""
    found = kit_dify.size(int(cores), int(memory_mb), layout, int(workers), int(connections), int(tasks))
    return dataclasses.asdict(found)


def named(name: str, service: Mapping[str, Any]) -> dict[str, Any]:
    """``names | map('kit_named', service)``: a service under several names, ``{name}`` in its command."""
    return {**service, "name": name, "command": [word.replace("{name}", name) for word in service["command"]]}


def build_jobs(
    spec: dict[str, Any], program: list[str], environment: dict[str, str], memory_mb: int
) -> list[dict[str, Any]]:
    """``spec | kit_build_jobs(program, environment, memory_mb)``: see ``kit_build.jobs``."""
    return list(kit_build.jobs(kit_build.Spec.load(spec), program, environment, int(memory_mb)))


def plugin_parts(plugins: list[dict[str, Any]], cache: str) -> list[dict[str, Any]]:
    """``dify_plugins | kit_plugin_parts(kit_cache)``: what preflight must know of those that the host has to fetch."""
    return [
        {
            "name": f"plugin {plugin['id']}",
            "present": [f"{cache}/provider-plugin/{plugin['id'].replace('/', '-')}-{plugin['version']}-marketplace.id"],
            "sources": ["Dify's marketplace"],
        }
        for plugin in plugins
        if "id" in plugin
    ]


def limits(upload_mb: int, env: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``dify_source_upload_mb | kit_limits(dify_source_env)``: see ``kit_dify.limits``."""
    return dataclasses.asdict(kit_dify.limits(int(upload_mb), env))


def network_env(
    bundle: str, http: str = "", https: str = "", direct: str = "", own: Sequence[str] = ()
) -> dict[str, str]:
    """``kit_ca_bundle | kit_network_env(kit_http_proxy, ...)``: see ``kit_network.environment``."""
    return dict(kit_network.environment(bundle, http, https, direct, own))


def mirrors_used(named: Mapping[str, str], mode: str, path: str, host: str) -> dict[str, str]:
    """``{kind: address} | kit_mirrors_used(kit_mirrors, file, host)``: see ``kit_mirrors_file.used``."""
    known = yaml.safe_load((Path(__file__).parents[2] / "mirrors.yml").read_text()) if mode == "auto" else {}
    sources = {kind: one["source"] for kind, one in known.items()}
    return dict(kit_mirrors_file.used(named, mode, path, host, sources))


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "kit_api_env": environment(kit_dify.api_env),
            "kit_web_env": environment(kit_dify.web_env),
            "kit_agent_env": environment(kit_dify.agent_env),
            "kit_daemon_env": environment(kit_dify.daemon_env),
            "kit_dify_sizing": sizing,
            "kit_split_queues": kit_dify.split_queues,
            "kit_named": named,
            "kit_build_jobs": build_jobs,
            "kit_plugin_parts": plugin_parts,
            "kit_limits": limits,
            "kit_network_env": network_env,
            "kit_certificates_env": kit_network.certificates,
            "kit_tools_env": kit_network.tools,
            "kit_mirrors_used": mirrors_used,
        }
