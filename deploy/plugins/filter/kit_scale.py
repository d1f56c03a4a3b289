"""Filters for more than one engine: the services of replicas, and each host's part of a model across hosts."""

from __future__ import annotations

import dataclasses
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
    names: Sequence[str],
    master_port: int,
    interface: str = "",
    pipeline_parallel: int = 0,
    backend: str = "mp",
) -> dict[str, dict[str, Any]]:
    """``hostvars | kit_nodes(names, ...)``: each host's part by its name, as ``python -m inference serve`` reads it.

    The hosts' facts must have been gathered with the subset `network`. ``inference_gpus`` of a host counts its GPUs.
    """
    parts = [
        scale.Host(name, int(hosts[name].get("inference_gpus") or 0), scale.interfaces(hosts[name]["ansible_facts"]))
        for name in names
    ]
    try:
        found = scale.nodes(
            parts, int(master_port), interface=interface, pipeline_parallel=int(pipeline_parallel), backend=backend
        )
    except Problem as problem:
        raise AnsibleFilterError(str(problem)) from None
    return {node.host: dataclasses.asdict(node) for node in found}


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
            "kit_target": target,
        }
