"""Secrets stay where the service user alone reads them."""

import re

import pytest

from tests.hosts.kit_host import KitHost

# Secrets that a service may hold, by the name that it has in some environment file. One program with one
# configuration: the API, its workers and beat.
DIFY = {"SECRET_KEY", "DB_PASSWORD", "REDIS_PASSWORD", "PLUGIN_DAEMON_KEY", "INNER_API_KEY_FOR_PLUGIN"}
OWN = {
    **dict.fromkeys(["api", "websocket", "worker", "workflow-worker", "beat"], DIFY),
    "plugin-daemon": DIFY - {"SECRET_KEY"},
    "agent-backend": DIFY - {"SECRET_KEY", "DB_PASSWORD"} | {"DIFY_AGENT_SERVER_SECRET_KEY", "SHELLCTL_AUTH_TOKEN"},
    "agent-runtime": {"SHELLCTL_AUTH_TOKEN"},
    "inference": {"VLLM_API_KEY"},
}


def test_configuration_and_data_are_private(kit: KitHost) -> None:
    readable = kit.probe("modes")
    assert not readable, f"open to others: {readable}. Run `make deploy`; it sets folders to 0700 and files to 0600."


@pytest.mark.deep
def test_no_process_has_the_secrets_of_another(kit: KitHost) -> None:
    services = {name: program.pid for name, program in kit.supervised.items() if program.pid}
    answer = kit.probe("shown", services=services)
    names = answer["names"]
    for service, found in answer["found"].items():
        own = OWN.get(re.sub(r"-\d+$", "", service), set())
        strange = sorted(set(found) - {name for key in own for name in names.get(key, [])})
        assert not strange, f"{service} was started with {strange}, which it does not need. Run `make deploy`."


def test_no_secret_in_logs_or_arguments(kit: KitHost) -> None:
    # Only on this machine can the probe read the controller's file beside the host's own.
    answer = kit.probe(
        "leaks", secrets_file=kit.facts["secrets_file"] if kit.local and not kit.facts["become"] else None
    )
    assert answer["known"] >= 3, f"only {answer['known']} secrets found under {kit.home}/etc/env: nothing was compared"
    assert not answer["found"], (
        f"secrets can be read: {answer['found']}. Remove the file or end the process, and change that secret."
    )
