"""Services of replicas, and the hosts of a model, as the roles get them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError

FILE = Path(__file__).resolve().parents[2] / "deploy/plugins/filter/kit_scale.py"
SPEC = importlib.util.spec_from_file_location("kit_scale", FILE)
assert SPEC
assert SPEC.loader
kit_scale = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kit_scale)


def facts(address: str) -> dict[str, Any]:
    link = {"active": True, "device": "eth0", "speed": 1000, "ipv4": {"address": address, "netmask": "255.255.255.0"}}
    return {"ansible_facts": {"interfaces": ["eth0"], "eth0": link}, "inference_gpus": 4}


def test_each_replica_is_a_service_of_its_own() -> None:
    service = {
        "name": "inference",
        "command": ["serve", "--port=@port@", "--replica=@replica@"],
        "ready": {"command": ["ready", "http://127.0.0.1:@port@/v1"]},
        "priority": 30,
    }
    first, second = kit_scale.replicas(service, "2", "17820")
    assert (first["name"], second["name"]) == ("inference-1", "inference-2")
    assert second == {
        "name": "inference-2",
        "command": ["serve", "--port=17821", "--replica=2/2"],
        "ready": {"command": ["ready", "http://127.0.0.1:17821/v1"]},
        "priority": 30,
    }


def test_ports_of_replicas() -> None:
    assert kit_scale.replica_ports(17820, 1, 17809) == {}
    assert list(kit_scale.replica_ports(17820, 2, 17809).values()) == [17820, 17821, 17809]


def test_nodes_by_host() -> None:
    hosts = {"one": facts("192.0.2.11"), "two": facts("192.0.2.12")}
    found = kit_scale.nodes(hosts, ["one", "two"], 17810)
    assert (found["one"]["rank"], found["two"]["rank"]) == (0, 1)
    assert found["two"]["master_address"] == "192.0.2.11"
    assert (found["two"]["tensor_parallel"], found["two"]["pipeline_parallel"]) == (4, 2)


def test_a_problem_is_told_as_it_stands() -> None:
    with pytest.raises(AnsibleFilterError, match="two hosts or more"):
        kit_scale.nodes({"one": facts("192.0.2.11")}, ["one"], 17810)
