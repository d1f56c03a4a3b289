"""Which processes a site runs and what each is told: the wiring and dify_source's variables, rendered by Ansible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils import kit_dify
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import filter_loader, init_plugin_loader
from ansible.template import Templar, trust_as_template

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    *(f"roles/{role}/defaults/main.yml" for role in ("dify_source", "plugin_daemon", "sandbox", "egress")),
    *(f"roles/{role}/vars/main.yml" for role in ("dify_source", "sandbox", "egress")),
    "deploy/group_vars/all.yml",
]
init_plugin_loader([])
filter_loader.add_directory(str(ROOT / "deploy/plugins/filter"))
FULL = {"api", "websocket", "worker", "workflow-worker", "beat", "web", "agent-backend", "agent-runtime"}


def site(
    cores: int = 2,
    memory_mb: int = 24_000,
    lacks: str = "",
    sandbox: bool = False,
    without: tuple[str, ...] = (),
    **settings: Any,
) -> Any:
    """Renders a variable of a site: ``site()("dify_source_services")``."""
    loader = DataLoader()
    variables: dict[str, Any] = {}
    for name in FILES:
        variables |= loader.load_from_file(str(ROOT / name), trusted_as_template=True) or {}
    release = settings.get("dify_release", variables["dify_release"])
    for variable, path in (
        ("dify_source_release", f"{release}.yml"),
        ("dify_source_env_keys", f"env-keys/{release}.yml"),
    ):
        variables[variable] = yaml.safe_load((ROOT / "deploy/releases" / path).read_text())
    variables |= {
        "ansible_facts": {
            "processor_nproc": cores,
            "memtotal_mb": memory_mb,
            "user_uid": 1,
            "user_id": "u",
            "user_dir": "/u",
        },
        "playbook_dir": str(ROOT / "deploy"),
        "inference_endpoint": "external",
        "preflight_host": {"agent_runtime_lacks": lacks, "sandbox": {"run": sandbox}},
        "kit_secret_agent_runtime_token": "token",
        **settings,
    }
    for name in without:
        del variables[name]
    templar = Templar(loader, variables)
    return lambda name: templar.template(trust_as_template("{{ " + name + " }}"))


def services(**given: Any) -> dict[str, dict[str, Any]]:
    return {service["name"]: service for service in site(**given)("dify_source_services")}


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, FULL),
        ({"memory_mb": 8_000}, FULL - {"websocket", "workflow-worker"}),
        ({"lacks": "tmux is not installed."}, FULL - {"agent-runtime"}),
        ({"dify_source_agent_runtime": "never"}, FULL - {"agent-runtime"}),
        ({"dify_source_agent": False}, FULL - {"agent-backend", "agent-runtime"}),
        ({"dify_release": "1.14.2"}, FULL - {"agent-backend", "agent-runtime"}),
        ({"cores": 32, "memory_mb": 256_000}, FULL | {"workflow-worker-2", "workflow-worker-3", "workflow-worker-4"}),
    ],
)
def test_what_a_site_runs_and_what_it_stops(given: dict[str, Any], names: set[str]) -> None:
    render = site(**given)
    assert {service["name"] for service in render("dify_source_services")} == names
    unwanted = set(render("dify_source_services_unwanted"))
    assert unwanted == (FULL | {"sandbox"} | set(kit_dify.RUNNERS)) - names
    assert set(render("kit_host_services")) >= names
    assert (set(render("dify_source_spec.parts")) & FULL) - {"api", "web"} == names & {"agent-backend", "agent-runtime"}


def test_code_of_workflows_runs_where_the_host_can() -> None:
    here, elsewhere = (
        site(sandbox=True, kit_secret_sandbox="key"),
        site(sandbox_mode="external", sandbox_url="http://box:1"),
    )
    assert {"egress", "sandbox"} <= set(here("kit_host_services"))
    assert "sandbox" not in here("dify_source_services_unwanted")
    assert {"egress", "sandbox"} <= set(here("dify_source_spec.parts"))
    assert here("dify_source_site.sandbox_url") == "http://127.0.0.1:17816"
    assert elsewhere("dify_source_site.sandbox_url") == "http://box:1"
    assert "sandbox" not in {*elsewhere("kit_host_services"), *elsewhere("dify_source_spec.parts")}


@pytest.mark.parametrize("cores", [1, 2, 8, 64])
@pytest.mark.parametrize("memory_mb", [8_000, 64_000])
def test_what_the_processes_are_told_fits_into_what_postgresql_is_told(cores: int, memory_mb: int) -> None:
    render = site(cores=cores, memory_mb=memory_mb)
    opened = 0
    for service in render("dify_source_services"):
        if service["env_file"] == "etc/env/api.env":
            workers = (
                service["command"][service["command"].index("--workers") + 1]
                if "--workers" in service["command"]
                else 1
            )
            pool = [int(value) for name, value in service["environment"].items() if name.startswith("SQLALCHEMY_")]
            opened += int(workers) * sum(pool)
    assert opened > 0
    limits = render("postgres_connection_limits")
    opened += int(limits["dify_vector"]) + kit_dify.DAEMON_POOL
    assert opened + 20 < int(render("postgres_max_connections"))


def test_the_preflight_knows_the_connections_before_a_role_has_said_its_defaults() -> None:
    names = ("dify_source_layout", "dify_source_api_workers", "dify_source_api_connections", "dify_source_worker_tasks")
    assert site(without=names)("postgres_max_connections") == site()("postgres_max_connections")


def test_a_limit_belongs_to_the_vectors_whatever_their_database_is_called() -> None:
    assert set(site(postgres_databases=["a", "b", "c"])("postgres_connection_limits")) == {"c"}


def test_servers_elsewhere_are_no_services_here() -> None:
    elsewhere = site(postgres_source="external", redis_source="external")("kit_host_services")
    assert set(site()("kit_host_services")) - set(elsewhere) == {"postgres", "redis"}


@pytest.mark.parametrize(
    ("settings", "direct"),
    [
        ({}, "127.0.0.1,localhost,model"),
        ({"dify_storage": "s3", "dify_s3": {"endpoint": "https://s3.lan:9"}}, "127.0.0.1,localhost,model,s3.lan"),
        (
            {"dify_storage": "s3", "dify_s3": {"region": "eu-1"}},
            "127.0.0.1,localhost,model,s3.eu-1.amazonaws.com",
        ),
    ],
)
def test_the_daemon_reaches_its_bucket_past_the_egress_proxy(settings: dict[str, Any], direct: str) -> None:
    network = site(provider_endpoint="http://model:1/v1", **settings)("plugin_daemon_network")
    assert network["no_proxy"] == direct
    assert network["http_proxy"] == "http://127.0.0.1:17815"


def test_every_queue_is_named_in_one_workers_command() -> None:
    found = services(cores=32, memory_mb=256_000)
    consumed = {name: found[name]["command"][-1].split(",") for name in found if "worker" in name}
    assert set(consumed.pop("worker")).isdisjoint(kit_dify.WORKFLOW_QUEUES)
    assert all(set(queues) == kit_dify.WORKFLOW_QUEUES for queues in consumed.values())
    # Celery tells workers of one host apart by nothing else.
    assert "workflow-worker-2@%h" in found["workflow-worker-2"]["command"]


def test_a_shared_secret_or_port_is_not_on_a_command_line() -> None:
    found = services()
    assert not [name for name, service in found.items() if "token" in service["command"]]
    listening = [
        str(word).rpartition(":")[2] for s in found.values() for word in s["command"] if "127.0.0.1:" in str(word)
    ]
    assert len(set(listening)) == len(listening) == 3


@pytest.mark.parametrize(("layout", "port"), [("full", 17811), ("lean", 17801)])
def test_sockets_go_where_they_are_answered(layout: str, port: int) -> None:
    assert site(dify_source_layout=layout)("gateway_websocket") == f"127.0.0.1:{port}"


def test_the_summary_says_what_is_off_and_why() -> None:
    assert "agents (Agent v2) can't run commands: tmux is not installed." in str(
        site(lacks="tmux is not installed.")("dify_source_notices")
    )
    assert "Lean layout" in str(site(memory_mb=8_000)("dify_source_notices"))
    assert not [note for note in site()("dify_source_notices") if "Agent v2" in note or "Lean" in note]
