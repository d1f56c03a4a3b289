"""What runs in containers, asked of Docker: images, health, secrets, data, users, ports, and what comes back."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml
from docker.models.containers import Container
from module_utils import kit_compose

from tests.hosts.kit_host import PROBE, KitHost

pytestmark = pytest.mark.mode("compose")

RELEASES = Path(__file__).resolve().parents[2] / "deploy" / "releases"
LABEL = "com.docker.compose"
# Who may know what Dify keeps for itself, the rest has no business with it.
DIFY = {"api", "api_websocket", "worker", "worker_beat", "plugin_daemon", "agent_backend"}
# Whom the program in the container runs as; postgres' number differs between images.
USERS = {"api": 1001, "worker": 1001}


@functools.cache
def engine(host: KitHost) -> docker.DockerClient:
    """The host's engine; over SSH where the host is not this machine."""
    if host.local:
        return docker.from_env()
    # Not the SDK's own ssh://, which knows no options.
    there = host.run("docker", "context", "inspect", "--format", "{{.Endpoints.docker.Host}}").strip()
    here = Path(tempfile.mkdtemp(prefix="kit-docker-")) / "docker.sock"
    forward = ["-N", "-o", "ExitOnForwardFailure=yes", "-L", f"{here}:{there.removeprefix('unix://')}"]
    tunnel = subprocess.Popen(["ssh", *forward, *host.ssh], stdin=subprocess.DEVNULL)
    atexit.register(shutil.rmtree, here.parent)
    atexit.register(tunnel.terminate)
    end = time.monotonic() + 30
    while not here.exists():
        assert tunnel.poll() is None, f"ssh could not forward {there} of {host.name}"
        assert time.monotonic() < end, f"ssh does not forward {there} of {host.name}"
        time.sleep(0.1)
    return docker.DockerClient(f"unix://{here}")


def containers(kit: KitHost) -> dict[str, Container]:
    """Service -> its container."""
    label = f"{LABEL}.project={kit.facts['compose']['project']}"
    found = engine(kit).containers.list(all=True, filters={"label": label})
    return {container.labels[f"{LABEL}.service"]: container for container in found}


def environment(container: Container) -> dict[str, str]:
    """What it was started with."""
    return dict(entry.split("=", 1) for entry in container.attrs["Config"]["Env"] or [])


def inside(kit: KitHost, service: str, *command: str, **options: Any) -> str:
    """Run a command in a container; its output, or a failure with its words."""
    for _ in range(2):
        status, said = containers(kit)[service].exec_run(list(command), **options)
        assert isinstance(said, bytes)
        text = said.decode(errors="replace")
        # An engine of 20.10 loses what a quick command has said now and then, when the machine is busy.
        if status or text:
            break
    if status:
        pytest.fail(f"{service}: `{command[0]}` ended {status}: {text.strip()}", pytrace=False)
    return text.strip()


def test_containers_run_the_images_of_the_deploy(kit: KitHost) -> None:
    found = containers(kit)
    missing, strangers = set(kit.containers) - set(found), set(found) - set(kit.containers)
    assert not missing, f"no container for {sorted(missing)}. Run `make deploy`."
    assert not strangers, f"the project also has {sorted(strangers)}, which no deploy asked for. Run `make deploy`."
    for service, container in found.items():
        wanted = kit.containers[service]
        assert container.attrs["Config"]["Image"] == wanted, f"{service} runs another image. Run `make deploy`."
        newest = engine(kit).images.get(wanted).id
        assert container.attrs["Image"] == newest, f"{service} runs an older {wanted}. Run `make deploy`."


def test_containers_are_well_and_come_back(kit: KitHost) -> None:
    for service, container in containers(kit).items():
        state = container.attrs["State"]
        if service in kit_compose.ONE_SHOT:
            assert (state["Status"], state["ExitCode"]) == ("exited", 0), f"{service}: {state}"
            continue
        assert state["Running"], f"{service} is {state['Status']} ({state['ExitCode']}). `make logs SERVICE={service}`"
        assert state.get("Health", {}).get("Status", "healthy") == "healthy", f"{service}: {state['Health']}"
        options = container.attrs["HostConfig"]
        assert options["RestartPolicy"]["Name"] == "always", f"{service} would not come back. Run `make deploy`."
        assert "max-size" in options["LogConfig"]["Config"], f"{service}'s log grows without limit. Run `make deploy`."


def test_no_container_has_a_secret_of_upstreams_or_of_others(kit: KitHost) -> None:
    docker_folder = f"{kit.home}/releases/{kit.facts['release']}/docker"
    shipped = kit_compose.default_secrets(kit_compose.parse_dotenv(kit.run("cat", f"{docker_folder}/.env.example")))
    text = kit.run("cat", f"{docker_folder}/docker-compose.yaml")
    shipped |= kit_compose.default_secrets(kit_compose.parse_defaults(text))
    assert shipped, f"{docker_folder} has no secrets of its own: nothing was compared"
    own = {value for name, value in environment(containers(kit)["api"]).items() if kit_compose.is_secret(name)}
    own = {value for value in own if len(value) >= 12}
    assert len(own) >= 5, "the API has no secrets: nothing was compared"
    for service, container in containers(kit).items():
        has = environment(container)
        config = container.attrs["Config"]
        words = [*(config["Cmd"] or []), *(config["Entrypoint"] or [])]
        words += (config.get("Healthcheck") or {}).get("Test", [])
        left = kit_compose.secrets_in({"environment": has, "command": words}, shipped)
        assert not left, f"{service} has what every copy of Dify comes with: {sorted(left)}. Run `make deploy`."
        assert not [name for name, value in has.items() if value in own and any(value in word for word in words)], (
            f"{service}'s command line has a secret, which every user of the host can read. Run `make deploy`."
        )
        if service not in DIFY:
            names = sorted(name for name, value in has.items() if value in own)
            allowed = {
                "db_postgres": ["POSTGRES_PASSWORD"],
                "pgvector": ["POSTGRES_PASSWORD"],
                "redis": ["REDISCLI_AUTH"],
                "sandbox": ["API_KEY"],
                "local_sandbox": ["SHELLCTL_AUTH_TOKEN"],
            }.get(service, [])
            assert set(names) <= set(allowed), f"{service} knows {names}. Run `make deploy`."


def test_both_sides_of_a_conversation_have_one_key(kit: KitHost) -> None:
    services = {name: {"environment": environment(container)} for name, container in containers(kit).items()}
    problems = kit_compose.check_pairs(services, kit.name)
    assert not problems, f"{[problem.what for problem in problems]}. Run `make deploy`."


def test_what_containers_write_lies_in_one_folder(kit: KitHost) -> None:
    data = kit.facts["compose"]["data"]
    written = set()
    for service, container in containers(kit).items():
        for mount in container.attrs["Mounts"]:
            if mount["Type"] == "bind" and mount["RW"]:
                folder = mount["Source"]
                assert folder.startswith(f"{data}/"), f"{service} writes to {folder}. Run `make deploy`."
                written.add(folder.removeprefix(f"{data}/"))
    databases = {"db_postgres": "postgres", "pgvector": "pgvector", "redis": "redis"}
    wanted = {"storage", "plugins"} | {databases[name] for name in databases.keys() & kit.containers.keys()}
    assert wanted <= written, f"only {sorted(written)} outlive their containers"


def test_services_run_as_their_users_who_own_their_files(kit: KitHost) -> None:
    for service, uid in USERS.items():
        assert inside(kit, service, "id", "-u") == str(uid), f"{service} runs as another user. Run `make deploy`."
        others = inside(kit, service, "find", "/app/api/storage", "!", "-user", str(uid), "-print", "-quit")
        assert not others, f"{service} may not write {others}. Run `make deploy`, which gives it back."
    programs = {"db_postgres": "postgres", "pgvector": "postgres", "redis": "redis-server"}
    for service in programs.keys() & kit.containers.keys():
        program = programs[service]
        processes = containers(kit)[service].top(ps_args="-eo pid,uid,comm")["Processes"]
        uids = {int(row[1]) for row in processes if row[2].startswith(program[:15])}
        assert uids, f"{service} has no {program}, only {processes}"
        assert 0 not in uids, f"{service} runs as root"


def test_only_this_host_reaches_the_containers(kit: KitHost) -> None:
    published = {}
    for service, container in containers(kit).items():
        for bindings in container.attrs["NetworkSettings"]["Ports"].values():
            for binding in bindings or []:
                assert binding["HostIp"] == "127.0.0.1", f"{service} is reached at {binding}, past the gateway"
                published[service] = int(binding["HostPort"])
    wanted = {"api": kit.port("api"), "web": kit.port("web"), "plugin_daemon": kit.port("plugin_daemon")}
    if "api_websocket" in kit.containers:
        wanted["api_websocket"] = kit.port("websocket")
    assert published == wanted, f"published are {published}, the gateway asks {wanted}. Run `make deploy`."


def api(kit: KitHost, question: str, **arguments: Any) -> Any:
    """The answer to a question of probe.py that the API's own Python is asked."""
    words = ["-B", "-c", PROBE.read_text(), question, json.dumps({"home": "", **arguments})]
    return json.loads(inside(kit, "api", "python", *words).splitlines()[-1])


def test_dify_finds_its_files_in_the_bucket(kit: KitHost) -> None:
    if kit.facts.get("storage", "fs") == "s3":
        keys = api(kit, "bucket")
        assert keys, "the bucket does not hold the workspace's key pair: stored credentials could not be read"


@pytest.mark.deep
def test_dify_finds_what_is_near_a_vector(kit: KitHost) -> None:
    answer = api(kit, "vectors")
    assert answer["kind"] == kit.facts.get("vector_store", "pgvector")
    assert answer["found"] == ["red"], f"{answer['kind']} has {answer['found']} next to it: knowledge is not found"


# With what Dify is told, wherever the servers are.
SQL = """
import os, psycopg2, sys
database, sql = sys.argv[1:]
told = {name: os.environ[f"DB_{name.upper()}"] for name in ("host", "port", "password")}
cursor = psycopg2.connect(**told, user=os.environ["DB_USERNAME"], dbname=database, connect_timeout=10).cursor()
cursor.execute(sql)
print(*cursor.fetchone())
"""
PING = """
import os, redis
told = {name: os.environ[f"REDIS_{name.upper()}"] for name in ("host", "port", "password")}
if os.environ["REDIS_USE_SSL"] == "true":
    told |= {"ssl": True, "ssl_ca_certs": os.environ["REDIS_SSL_CA_CERTS"]}
print(redis.Redis(**told, username=os.environ["REDIS_USERNAME"] or None, socket_timeout=10).ping())
"""


def test_stores_answer_those_who_know_the_password(kit: KitHost) -> None:
    def ask(database: str, sql: str) -> str:
        return inside(kit, "api", "python", "-c", SQL, database, sql)

    env = environment(containers(kit)["api"])
    version = ask(env["DB_DATABASE"], "SELECT max(version_num) FROM alembic_version")
    assert version != "None", "Dify's database has no schema. `make logs SERVICE=api`"
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
    assert int(ask(env["DB_PLUGIN_DATABASE"], tables)) > 5, "the plugin daemon's database has no tables"
    if "pgvector" in kit.containers:
        sql = "SELECT name FROM pg_available_extensions WHERE name = 'vector'"
        psql = f'PGPASSWORD="$POSTGRES_PASSWORD" psql -h 127.0.0.1 -U postgres -d "$POSTGRES_DB" -tAc "{sql}"'
        assert inside(kit, "pgvector", "sh", "-c", psql) == "vector", "the vectors' database has no pgvector"
    if env.get("PGSSLMODE", "disable") != "disable":
        encrypted = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        assert ask(env["DB_DATABASE"], encrypted) == "True", "PostgreSQL is spoken to in the clear"
    assert inside(kit, "api", "python", "-c", PING) == "True"


def test_the_containers_redis_wants_a_password_and_survives_a_crash(kit: KitHost) -> None:
    if "redis" not in kit.containers:
        pytest.skip("redis_source is external: that server is not the kit's to judge")
    stranger = inside(kit, "redis", "env", "-u", "REDISCLI_AUTH", "redis-cli", "ping")
    assert "NOAUTH" in stranger, f"Redis answers without a password: {stranger}"
    assert "aof_enabled:1" in inside(kit, "redis", "redis-cli", "info", "persistence"), "a crash loses queued work"


@pytest.mark.service("inference")
def test_the_plugin_daemon_reaches_the_model_service(kit: KitHost) -> None:
    script = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=10).status)"
    health = kit.facts["endpoint"].removesuffix("/v1") + "/health"
    assert inside(kit, "plugin_daemon", "python3", "-c", script, health) == "200"


@pytest.mark.deep
def test_every_queue_is_consumed_by_the_worker(kit: KitHost) -> None:
    said = inside(kit, "worker", "celery", "-A", "celery_healthcheck.celery", "inspect", "active_queues", "--json")
    consumed = {queue["name"] for queues in json.loads(said.splitlines()[-1]).values() for queue in queues}
    release = yaml.safe_load((RELEASES / f"{kit.facts['release']}.yml").read_text())
    assert set(release["celery"]["queues"]) <= consumed, f"the worker consumes {sorted(consumed)} only"


# As Dify asks. Without a network, which Dify never says, upstream's 0.2.15 kills most runs on a busy host: its own Go
# runtime polls (epoll_pwait) when the filter that forbids it stands already, and it says "operation not permitted".
CODE = """
import json, os, urllib.request
body = json.dumps({"language": "python3", "code": "print(6 * 7)", "preload": "", "enable_network": True}).encode()
url = os.environ["CODE_EXECUTION_ENDPOINT"] + "/v1/sandbox/run"
headers = {"X-Api-Key": os.environ["CODE_EXECUTION_API_KEY"], "Content-Type": "application/json"}
print(urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30).read().decode())
"""


@pytest.mark.deep
def test_code_of_workflows_runs_in_the_sandbox(kit: KitHost) -> None:
    answer = json.loads(inside(kit, "api", "python", "-c", CODE).splitlines()[-1])
    assert answer["data"]["stdout"].strip() == "42", f"the sandbox said {answer}. `make logs SERVICE=sandbox`"


@pytest.mark.deep
def test_a_killed_plugin_daemon_comes_back(kit: KitHost) -> None:
    before = containers(kit)["plugin_daemon"]
    starts, metrics = before.attrs["RestartCount"], f"http://127.0.0.1:{kit.port('plugin_daemon')}/metrics/"
    # Not the container's first process, which the kernel protects from its own kind.
    kill = 'for p in /proc/[0-9]*; do [ "$(readlink $p/exe)" = /app/main ] && kill -9 ${p#/proc/}; done'
    before.exec_run(["sh", "-c", kill])
    end = time.monotonic() + 120
    while time.monotonic() < end:
        now = containers(kit)["plugin_daemon"]
        if now.attrs["RestartCount"] > starts and kit.probe("figures", url=metrics):
            break
        time.sleep(1)
    else:
        pytest.fail(f"it did not come back within two minutes: {now.attrs['State']}", pytrace=False)
    assert now.id == before.id, "another container took its place"
