"""Compose mode's files with upstream's own, as the oldest and the newest Compose read and run them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils import kit_compose, kit_compose_engine, kit_files, kit_images, kit_network

from tests.compose import engine as parts
from tests.integration.conftest import REPO
from tests.unit.test_kit_compose import elsewhere, env_keys, settings, site

ROLE = REPO / "roles/dify_compose"
CA = "/etc/ssl/certs/ca-certificates.crt"


VERSIONS = [parts.OLDEST_COMPOSE, parts.COMPOSE]


@pytest.fixture(scope="module", autouse=True, params=VERSIONS, ids=[version for _, version in VERSIONS])
def compose(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compose of each version, in place of this machine's own."""
    home = tmp_path_factory.mktemp("docker")
    if not shutil.which(parts.DOCKER):
        pytest.skip("no Docker client here: apt-get install docker.io")
    parts.install_compose(home, request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_CONFIG", str(home / ".docker"))
        said = parts.docker("compose", "version", "--short")
        assert f"v{said.lstrip('v')}" == request.param[1]
        yield


def render(target: Path, values: dict[str, Any]) -> None:
    """The kit's override, as Ansible writes it."""
    play = {
        "hosts": "localhost",
        "gather_facts": False,
        "vars_files": [str(ROLE / "defaults/main.yml"), str(ROLE / "vars/main.yml")],
        "tasks": [{"ansible.builtin.template": {"src": str(REPO / "compose/override.yaml.j2"), "dest": str(target)}}],
    }
    book, extra = target.with_name("play.json"), target.with_name("values.json")
    book.write_text(json.dumps([play]))
    extra.write_text(json.dumps(values))
    environment = {**os.environ, "ANSIBLE_CONFIG": str(REPO / "deploy/ansible.cfg")}
    program = shutil.which("ansible-playbook") or str(REPO / ".venv/bin/ansible-playbook")
    argv = [program, "-i", "localhost,", "-c", "local", "-e", f"@{extra}", str(book)]
    subprocess.run(argv, check=True, env=environment, cwd=REPO / "deploy")


@pytest.fixture
def project(real: tuple[str, Path, Path], tmp_path: Path) -> kit_compose_engine.Project:
    """A site's files beside those of a release."""
    return files(real, tmp_path)


def files(real: tuple[str, Path, Path], tmp_path: Path, **other: Any) -> kit_compose_engine.Project:
    """The same with other values for the site."""
    version, dify, _ = real
    release = yaml.safe_load((REPO / f"deploy/releases/{version}.yml").read_text())
    agent = site()["agent"] | ({} if "agent_backend" in release["compose"]["services"] else {"url": ""})
    of = site(version, agent=agent, **other)
    upstream = tmp_path / f"releases/{version}/docker"
    shutil.copytree(dify / "docker", upstream)
    keys = [f"{tmp_path}/{number}.pem" for number in range(2)]
    directory = tmp_path / "etc/compose"
    directory.mkdir(parents=True)
    values = {
        "kit_home": str(tmp_path),
        "dify_compose_version": version,
        "dify_compose_release": release,
        "dify_compose_sizing": of["sizing"],
        "dify_compose_site": of,
        "dify_compose_ca_bundle": CA,
        "dify_compose_uv": f"{tmp_path}/uv-for-plugins",
        "dify_compose_trusted_keys": keys,
        "dify_compose_ports": {"api": 21201, "web": 21202, "plugin_daemon": 21203, "websocket": 21211},
    }
    render(directory / "override.yaml", values)
    (tmp_path / "settings.env").write_text(kit_files.render_env(settings(of)))
    known = {name for names in env_keys(version).values() for name in names}
    known |= set(kit_network.environment("/x", "http://p:1", "http://p:1"))
    allowed = [Path(CA), Path(values["dify_compose_uv"]), *map(Path, keys), *map(Path, of["roots"].values())]
    data = tmp_path / "var/compose"
    return kit_compose_engine.Project("kit", directory, upstream, data, tmp_path / "settings.env", known, allowed)


def test_the_whole_is_what_the_kit_promises(project: kit_compose_engine.Project) -> None:
    text, config = project.prepare()  # says what is wrong
    services = config["services"]
    assert "nginx" not in services
    # A dollar is written twice where Compose shows what it has read.
    assert services["api"]["environment"]["DB_PASSWORD"] == "pg'$$secret"
    assert services["db_postgres"]["environment"]["POSTGRES_PASSWORD"] == "pg'$$secret"
    published = {name: service["ports"] for name, service in services.items() if service.get("ports")}
    assert {name: [port["target"] for port in ports] for name, ports in published.items()} == {
        "api": [5001],
        "api_websocket": [5001],
        "plugin_daemon": [5002],
        "web": [3000],
    }
    for name in ("sandbox", "web"):
        secrets = {"DB_PASSWORD", "REDIS_PASSWORD", "SECRET_KEY", "PLUGIN_DAEMON_KEY"}
        assert not secrets & set(services[name]["environment"]), f"{name} knows what it need not"
    assert not (project.directory / ".env").exists(), "nothing is applied yet"
    assert "difyai123456" not in text


def test_servers_elsewhere_take_no_container(real: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, config = files(real, tmp_path, **elsewhere()).prepare()
    services = config["services"]
    assert not {"db_postgres", "pgvector", "redis"} & set(services)
    roots = {"/app/kit/postgres-roots.pem": "/etc/db-roots.pem", "/app/kit/redis-roots.pem": "/etc/redis-roots.pem"}
    for name in {"api", "api_websocket", "worker", "worker_beat", "plugin_daemon", "agent_backend"} & set(services):
        mounts = {mount["target"]: mount["source"] for mount in services[name]["volumes"]}
        assert mounts.items() >= roots.items(), f"{name} could not verify whom it talks to"
        assert not {"db_postgres", "redis"} & set(services[name].get("depends_on", {})) & set(services)
    daemon = services["plugin_daemon"]["environment"]
    assert (daemon["DB_HOST"], daemon["DB_SSL_MODE"], daemon["REDIS_HOST"]) == (
        *("db.example.com", "require", "redis.example.com"),
    )


def test_a_default_that_stays_is_named(project: kit_compose_engine.Project) -> None:
    lines = project.settings.read_text().splitlines(keepends=True)
    project.settings.write_text("".join(line for line in lines if not line.startswith("REDIS_PASSWORD=")))
    with pytest.raises(kit_compose.ComposeProblem) as failed:
        project.prepare()
    assert [problem.what.split()[0] for problem in failed.value.problems] == ["REDIS_PASSWORD"]


def test_what_compose_refuses_is_told(project: kit_compose_engine.Project) -> None:
    override = project.directory / "override.yaml"
    override.write_text(override.read_text().replace("mem_limit: 1g", "mem_limit: much"))
    with pytest.raises(kit_compose.ComposeProblem, match="Compose refuses the files"):
        project.prepare()


# --- On an engine -----------------------------------------------------------------------------------------------------

IMAGE = "kit-test/web:1"
UPSTREAM = """\
services:
  init_permissions:
    image: kit-test/web:1
    command: [sh, -c, 'touch /data/ready']
    volumes: [./volumes/data:/data]
  api:
    image: kit-test/web:1
    restart: always
    stop_grace_period: 1s
    command: [httpd, -f, -p, "5001", -h, /data]
    env_file: [./.env]
    environment: {LOG_LEVEL: "${LOG_LEVEL:-INFO}"}
    volumes: [./volumes/data:/data]
    depends_on:
      init_permissions: {condition: service_completed_successfully}
    ports: ["5001:5001"]
  pgvector:
    image: kit-test/web:1
    profiles: [pgvector]
    restart: always
    stop_grace_period: 1s
    command: [httpd, -f]
"""
OVERRIDE = """\
x-kit: &kit
  logging: {driver: json-file, options: {max-size: 1m}}
services:
  init_permissions:
    <<: *kit
    volumes: ["{data}/storage:/data"]
  api:
    <<: *kit
    volumes: ["{data}/storage:/data"]
    ports: !override ["127.0.0.1:21220:5001"]
"""


@pytest.fixture(scope="module")
def engine() -> Iterator[None]:
    """An engine, started where none runs, with an image that is made of this host's busybox."""
    busybox = shutil.which("busybox")
    if not busybox or b"statically linked" not in subprocess.run(["file", "-L", busybox], capture_output=True).stdout:
        pytest.skip("no static busybox to make an image of: apt-get install busybox-static file")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(parts.engine())
        except parts.Lacking as lacking:
            pytest.skip(f"{lacking}")
        with tempfile.TemporaryDirectory() as folder:
            binaries = Path(folder, "bin")
            binaries.mkdir()
            shutil.copy(busybox, binaries / "busybox")
            for name in ("sh", "httpd", "touch"):
                (binaries / name).symlink_to("busybox")
            Path(folder, "tmp").mkdir()
            tar = subprocess.run(["tar", "-C", folder, "-c", "."], check=True, capture_output=True).stdout
            change = ["--change", "ENV PATH=/bin"]
            subprocess.run(["docker", "import", *change, "-", IMAGE], input=tar, check=True, capture_output=True)
        yield
        kit_images.docker("image", "rm", IMAGE)


@pytest.fixture
def small(engine: None, tmp_path: Path) -> Iterator[kit_compose_engine.Project]:
    """A project of two services, one of which runs once."""
    upstream, directory = tmp_path / "docker", tmp_path / "etc"
    upstream.mkdir()
    directory.mkdir()
    (upstream / "docker-compose.yaml").write_text(UPSTREAM)
    (upstream / ".env.example").write_text("LOG_LEVEL=INFO\n")
    (directory / "override.yaml").write_text(OVERRIDE.replace("{data}", f"{tmp_path}/data"))
    (tmp_path / "settings.env").write_text("LOG_LEVEL='DEBUG'\n")
    made = kit_compose_engine.Project(
        f"kit-{os.getpid()}", directory, upstream, tmp_path / "data", tmp_path / "settings.env"
    )
    yield made
    made.compose("down", "--timeout", "1")


READY = [
    {"service": "api", "http": "http://127.0.0.1:21220/ready"},
    {"service": "api", "command": ["sh", "-c", "true"]},
]


def test_a_second_run_changes_nothing_and_a_lost_container_comes_back(small: kit_compose_engine.Project) -> None:
    text, config = small.prepare()
    assert small.missing_images(config) == []
    assert small.up(text, config) == ["api"]
    small.await_ready(config, READY, 60)
    began = small.containers()
    assert small.up(*small.prepare()) == []
    assert {name: row["ID"] for name, row in small.containers().items()} == {
        name: row["ID"] for name, row in began.items()
    }
    assert (small.directory / ".env").stat().st_mode & 0o777 == 0o600

    kit_images.docker("rm", "--force", small.containers()["api"]["ID"])
    assert small.up(*small.prepare()) == ["api"]
    small.await_ready(config, READY, 60)

    small.settings.write_text("LOG_LEVEL='WARNING'\n")
    assert small.up(*small.prepare(), check=True) == ["api"]
    assert small.up(*small.prepare()) == ["api"]
    small.await_ready(config, READY, 60)
    inspected = kit_images.docker("inspect", small.containers()["api"]["ID"]).stdout
    assert "LOG_LEVEL=WARNING" in json.loads(inspected)[0]["Config"]["Env"]
    assert small.down()
    assert not small.down()
    assert (small.data / "storage/ready").exists(), "data stays"


def test_a_service_that_the_site_no_longer_has_ends(small: kit_compose_engine.Project) -> None:
    override = small.directory / "override.yaml"
    before = override.read_text()
    override.write_text(before + "  pgvector:\n    <<: *kit\n    profiles: !reset []\n")
    assert small.up(*small.prepare()) == ["api", "pgvector"]
    override.write_text(before)
    text, config = small.prepare()
    assert "pgvector" not in config["services"]
    assert small.up(text, config, check=True)[-1] == "pgvector"
    assert small.up(text, config)[-1] == "pgvector"
    assert "pgvector" not in small.containers()
    assert small.up(text, config) == []


def test_who_does_not_answer_is_named(small: kit_compose_engine.Project) -> None:
    text, config = small.prepare()
    small.up(text, config)
    wrong = [{"service": "api", "http": "http://127.0.0.1:21220/no-such-page"}]
    with pytest.raises(kit_compose.ComposeProblem, match=r"api is not ready after 2 s: .* answers 404"):
        small.await_ready(config, wrong, 2)


def test_databases_that_have_lost_their_data_are_refused(small: kit_compose_engine.Project) -> None:
    _, config = small.prepare()
    folder = small.data / "postgres"
    (folder / "pgdata").mkdir(parents=True)
    config["services"]["db_postgres"] = {"volumes": [{"source": str(folder)}]}
    small.remember_data(config)
    small.check_data()
    shutil.rmtree(folder)
    with pytest.raises(kit_compose.ComposeProblem, match="had data at an earlier deploy, but none now"):
        small.check_data()


def test_an_image_that_is_not_to_be_had_is_named_with_its_remedies(small: kit_compose_engine.Project) -> None:
    override = small.directory / "override.yaml"
    override.write_text(override.read_text().replace("  api:\n", "  api:\n    image: registry.invalid/no/such:1\n"))
    _, config = small.prepare()
    missing = small.missing_images(config)
    assert missing == ["registry.invalid/no/such:1"]
    with pytest.raises(kit_compose.ComposeProblem, match=r"registry\.invalid/no/such:1 cannot be had") as failed:
        small.have_images(missing, {"source": "pull"})
    [problem] = failed.value.problems
    assert problem.remedy.count("  - ") == 3
