"""Filters for more than one engine: the services of replicas, and each host's part of a model across hosts."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError

# The kit's package for the model service lies beside deploy/; a filter is imported as it is.
sys.path.append(str(Path(__file__).parents[3]))
from inference import scale
from inference.problem import Problem


def replicas(service: Mapping[str, Any], count: int, first_port: int) -> list[Any]:
    """``service | kit_replicas(count, first_port)``: entries of kit_services for engines side by side.

    Named ``<name>-1`` and so on. In every text @replica@ becomes ``1/2`` and so on, @index@ its first number, and
    @port@ the engine's port.
    """

    def fill(value: Any, index: int) -> Any:
        if isinstance(value, Mapping):
            return {key: fill(item, index) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [fill(item, index) for item in value]
        if isinstance(value, str):
            port = int(first_port) + index - 1
            value = value.replace("@replica@", f"{index}/{int(count)}")
            return value.replace("@index@", str(index)).replace("@port@", str(port))
        return value

    return [{**fill(service, index), "name": f"{service['name']}-{index}"} for index in range(1, int(count) + 1)]


def replica_ports(first_port: int, count: int, metrics_port: int) -> dict[str, int]:
    """``port | kit_replica_ports(count, metrics_port)``: what only several engines listen on, named for messages."""
    if int(count) < 2:
        return {}
    ports = {f"inference_replica_port + {index}": int(first_port) + index for index in range(int(count))}
    return {**ports, "inference_router_metrics_port": int(metrics_port)}


def nodes(
    hosts: Mapping[str, Mapping[str, Any]],
    kit: Sequence[str],
    workers: Sequence[str],
    master_port: int,
    interface: str = "",
    pipeline_parallel: int = 0,
    backend: str = "mp",
) -> dict[str, dict[str, Any]]:
    """``hostvars | kit_nodes(kit, workers, ...)``: each host's part by its name, for ``inference serve --node``.

    The hosts' facts must have been gathered with the subset `network`. ``inference_gpus`` of a host counts its GPUs.
    """
    try:
        if len(first := [name for name in kit if name not in workers]) != 1:
            raise Problem(
                f"The hosts of `inference_workers` serve the model of one host of `kit`, there are {len(first)} "
                f"({', '.join(first)}). Remedy: a site of its own for each model."
            )
        parts = [
            scale.Host(
                name, int(hosts[name].get("inference_gpus") or 0), scale.interfaces(hosts[name]["ansible_facts"])
            )
            for name in [*first, *workers]
        ]
        found = scale.nodes(
            parts, int(master_port), interface=interface, pipeline_parallel=int(pipeline_parallel), backend=backend
        )
    except Problem as problem:
        raise AnsibleFilterError(str(problem)) from None
    return {node.host: dataclasses.asdict(node) for node in found}


def node_services(engine: Mapping[str, Any], node: Mapping[str, Any], ray: str) -> list[dict[str, Any]]:
    """``engine | kit_node_services(node, ray)``: what runs on one of a model's hosts, entries of kit_services.

    ``ray`` is the path of Ray's command. Only the node of rank 0 has an API to be asked whether it is ready.
    """
    here = scale.Node(**node)
    services = []
    if here.backend == "ray":
        ready = {"tcp": here.master_port} if here.rank == 0 else None
        service = {"name": "inference-ray", "command": scale.ray_command(here, ray), "priority": 29}
        services.append(service | ({"ready": ready} if ready else {}))
    if scale.runs_engine(here):
        service = {**engine, "command": [*engine["command"], f"--node={json.dumps(node)}"]}
        if here.rank:
            del service["ready"]
        services.append(service)
    return services


def worker(variables: Mapping[str, Any]) -> dict[str, Any]:
    """``hostvars[name] | kit_worker``: what `make status` and its like need of a host that only calculates."""
    known = {name: variables[name] for name in ("kit_user", "kit_home")}
    return {**known, **reached(variables), "become": bool(variables["kit_become"])}


def reached(variables: Mapping[str, Any]) -> dict[str, Any]:
    """``hostvars[name] | kit_reached``: how Ansible reaches a host, for ``ssh`` itself: its options and the address."""
    options: list[str] = []
    for option, *names in (
        ("-p", "ansible_port", "ansible_ssh_port"),
        ("-l", "ansible_user", "ansible_ssh_user"),
        ("-i", "ansible_ssh_private_key_file", "ansible_private_key_file"),
    ):
        if value := next((str(variables[name]) for name in names if variables.get(name)), ""):
            options += [option, os.path.expanduser(value)]
    for name in ("ansible_ssh_common_args", "ansible_ssh_extra_args"):
        options += shlex.split(str(variables.get(name) or ""))
    return {
        "connection": "local" if variables.get("ansible_connection") == "local" else "ssh",
        "address": variables.get("ansible_host") or variables["inventory_hostname"],
        "ssh": options,
    }


def target(port: int, job: str, bind: str = "127.0.0.1", path: str = "/metrics") -> dict[str, Any]:
    """``port | kit_target(job)``: a target of Prometheus as the site's record notes it."""
    return {"job": job, "port": int(port), "bind": bind, "path": path}


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """The filters by their names in templates."""
        return {
            "kit_replicas": replicas,
            "kit_replica_ports": replica_ports,
            "kit_nodes": nodes,
            "kit_node_services": node_services,
            "kit_worker": worker,
            "kit_reached": reached,
            "kit_target": target,
        }
