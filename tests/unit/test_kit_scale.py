"""Services of replicas, and the hosts of a model, as the roles get them."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError

from deploy import kit
from inference import scale

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
    found = kit_scale.nodes(hosts, ["one", "two"], ["two"], 17810)
    assert (found["one"]["rank"], found["two"]["rank"]) == (0, 1)
    assert found["two"]["master_address"] == "192.0.2.11"
    assert (found["two"]["tensor_parallel"], found["two"]["pipeline_parallel"]) == (4, 2)


@pytest.mark.parametrize(
    ("kit", "workers", "says"),
    [
        (["one", "two"], ["one", "two"], "there are 0"),
        (["one", "two", "three"], ["three"], r"there are 2 \(one, two\)"),
    ],
)
def test_a_problem_is_told_as_it_stands(kit: list[str], workers: list[str], says: str) -> None:
    with pytest.raises(AnsibleFilterError, match=says):
        kit_scale.nodes({name: facts("192.0.2.11") for name in kit}, kit, workers, 17810)


@pytest.mark.parametrize(
    ("backend", "first", "second"),
    [("mp", ["inference"], ["inference"]), ("ray", ["inference-ray", "inference"], ["inference-ray"])],
)
def test_services_of_nodes(backend: str, first: list[str], second: list[str]) -> None:
    hosts = {"one": facts("192.0.2.11"), "two": facts("192.0.2.12")}
    found = kit_scale.nodes(hosts, ["one", "two"], ["two"], 17810, backend=backend)
    engine = {"name": "inference", "command": ["serve"], "ready": {"command": ["ready"]}}
    services = {name: kit_scale.node_services(engine, node, "/v/bin/ray") for name, node in found.items()}
    assert [service["name"] for service in services["one"]] == first
    assert [service["name"] for service in services["two"]] == second
    assert services["one"][-1]["ready"] == {"command": ["ready"]}
    node = services["one"][-1]["command"][-1].removeprefix("--node=")
    assert scale.Node(**json.loads(node)).rank == 0
    assert "ready" not in services["two"][-1]


def test_how_a_worker_is_reached() -> None:
    variables = {"kit_user": "k", "kit_home": "/k", "kit_become": False, "inventory_hostname": "two"}
    assert kit_scale.worker(variables) == {
        "kit_user": "k",
        "kit_home": "/k",
        "become": False,
        "connection": "ssh",
        "address": "two",
        "ssh": [],
    }


def test_a_host_is_reached_as_ansible_reaches_it() -> None:
    variables = {
        "inventory_hostname": "one",
        "ansible_host": "192.0.2.11",
        "ansible_port": 2222,
        "ansible_user": "alice",
        "ansible_ssh_private_key_file": "~/.ssh/a key",
        "ansible_ssh_common_args": "-o ProxyJump=bob@gate -o 'UserKnownHostsFile=/a b'",
    }
    found = kit_scale.reached(variables)
    assert (found["connection"], found["address"]) == ("ssh", "192.0.2.11")
    options = ["-p", "2222", "-l", "alice", "-i", os.path.expanduser("~/.ssh/a key")]
    assert found["ssh"] == [*options, "-o", "ProxyJump=bob@gate", "-o", "UserKnownHostsFile=/a b"]
    command = kit.as_service_user(found | {"become": False}, ["kitctl", "logs", "a b"])
    assert command == ["ssh", "-t", *found["ssh"], "192.0.2.11", "kitctl logs 'a b'"]
    assert kit_scale.reached({"inventory_hostname": "here", "ansible_connection": "local"})["connection"] == "local"
