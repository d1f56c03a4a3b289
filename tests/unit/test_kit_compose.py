"""Compose mode's files: what .env says, what is refused, and what Compose would run."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils import kit_compose, kit_dify, kit_docker, kit_images, kit_network

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SIZING = kit_dify.size(4, 16000)


def site(version: str = "1.16.0", **other: Any) -> dict[str, Any]:
    """``dify_compose_site`` as the role has it."""
    return {
        "home": "/h",
        "network": {},
        "egress_url": "http://127.0.0.1:1",
        "sandbox_url": "http://127.0.0.1:2",
        "sandbox_key": "sandbox-secret",
        "egress_allow": [],
        "external": [],
        "roots": {},
        "pgvector": True,
        "public_url": "https://dify.example.com",
        "internal_files_url": "http://127.0.0.1:3",
        "api_url": "http://127.0.0.1:4",
        "web_port": 5,
        "postgres": {"host": "127.0.0.1", "port": 6, "user": "dify", "password": "pg'$secret", "database": "dify"}
        | {"vector_database": "dify_vector", "sslmode": "disable", "sslrootcert": ""},
        "redis": {"host": "127.0.0.1", "port": 7, "username": "", "password": "redis-secret", "tls": False}
        | {"ca_file": ""},
        "storage": {"kind": "fs"},
        "vector": {"kind": "pgvector", "url": "", "api_key": ""},
        "secret_key": "session-secret",
        "plugin_daemon_url": "http://127.0.0.1:8",
        "plugin_daemon_key": "daemon-secret",
        "plugin_package_mb": 300,
        "plugin_daemon_debug_port": 9,
        "inner_api_key": "inner-secret",
        "agent": {"url": "http://127.0.0.1:10", "key": "agent-secret", "runtime_url": "", "runtime_token": "run-secret"}
        | {"runtime_homes": "/agent/home"},
        "sizing": vars(SIZING),
        "request_timeout": 900,
        "upload_mb": 0,
        "mail": {},
        "mail_password": "",
        "marketplace": False,
        "env": {},
        "env_keys": env_keys(version),
    } | other


def elsewhere() -> dict[str, Any]:
    """What makes a site of one whose PostgreSQL, Redis and files are elsewhere, with TLS."""
    postgres = {"host": "db.example.com", "port": 5433, "sslmode": "verify-full", "sslrootcert": "/etc/db-roots.pem"}
    redis = {"host": "redis.example.com", "port": 6380, "username": "dify", "tls": True}
    return {
        "external": ["postgres", "redis"],
        "roots": {"postgres": "/etc/db-roots.pem", "redis": "/etc/redis-roots.pem"},
        "pgvector": False,
        "postgres": site()["postgres"] | postgres,
        "redis": site()["redis"] | redis | {"ca_file": "/etc/redis-roots.pem"},
        "storage": {"kind": "s3", "endpoint": "https://s3.example.com", "region": "us-east-1", "bucket": "dify"}
        | {"access_key": "s3-key", "secret_key": "s3-secret", "address_style": "path"},
    }


def daemon(of: dict[str, Any]) -> dict[str, Any]:
    """``plugin_daemon_site`` beside it."""
    common = [
        *("home", "network", "inner_api_key", "redis", "storage", "request_timeout", "plugin_package_mb", "env_keys"),
    ]
    return {name: of[name] for name in common} | {
        "postgres": of["postgres"] | {"database": "dify_plugin"},
        "pypi_index": "",
        "limits": {"line": 64},
        "port": 8,
        "debug_port": 9,
        "key": of["plugin_daemon_key"],
        "api_url": of["api_url"],
        "python": "/python",
        "uv": "/uv",
        "require_signatures": True,
        "trusted_keys": [],
        "env": {},
    }


def env_keys(version: str) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = yaml.safe_load((DEPLOY / f"releases/env-keys/{version}.yml").read_text())
    return keys


def settings(of: dict[str, Any]) -> dict[str, Any]:
    network = kit_network.environment("/etc/ssl/certs/ca-certificates.crt", "http://p:1")
    found: dict[str, Any] = kit_compose.settings(kit_compose.inside(of, daemon(of), network, "vector-secret", 2))
    return found


@pytest.mark.parametrize("version", ["1.14.2", "1.16.0"])
def test_every_setting_is_one_that_the_release_reads(version: str) -> None:
    known = {name for names in env_keys(version).values() for name in names}
    agent = site()["agent"] | ({} if version == "1.16.0" else {"url": ""})
    network = set(kit_network.environment("/x", "http://p:1", "http://p:1"))
    found = set(settings(site(version, agent=agent)))
    assert found - known - network == {"MAX_INVOCATION_TIMEOUT", "MAX_REQUEST_TIMEOUT"}
    found = set(settings(site(version, agent=agent, **elsewhere())))
    assert found - known - network == kit_compose.LIBRARIES


def test_containers_are_told_of_containers() -> None:
    env = settings(site())
    told = {name: str(value) for name, value in env.items() if "127.0.0.1" in str(value)}
    assert set(told) == {"NO_PROXY", "no_proxy", "PLUGIN_REMOTE_INSTALL_HOST"}
    assert env["DB_HOST"] == "db_postgres"
    assert env["DB_PORT"] == 5432
    assert env["CELERY_BROKER_URL"] == "redis://:redis-secret@redis:6379/1"
    assert env["PLUGIN_DIFY_INNER_API_URL"] == "http://api:5001"
    assert set(kit_compose.NEAR) <= set(str(env["NO_PROXY"]).split(","))


def test_the_daemon_is_told_under_the_names_that_count() -> None:
    env = settings(site())
    assert env["PLUGIN_PYTHON_ENV_INIT_TIMEOUT"] == 600
    assert "PYTHON_ENV_INIT_TIMEOUT" not in env, "upstream's Compose file would override it"
    assert env["DB_PLUGIN_DATABASE"] == "dify_plugin"
    assert env["DB_DATABASE"] == "dify"
    assert env["THIRD_PARTY_SIGNATURE_VERIFICATION_PUBLIC_KEYS"] == "/app/keys/0.pem,/app/keys/1.pem"


def test_services_follow_the_site() -> None:
    assert kit_compose.profiles(site()) == ["postgresql", "pgvector", "collaboration"]
    qdrant = {"kind": "qdrant", "url": "http://q", "api_key": "k"}
    lean = site(sizing=vars(kit_dify.size(2, 6000)), vector=qdrant, pgvector=False)
    assert kit_compose.profiles(lean) == ["postgresql"]
    assert settings(lean)["QDRANT_API_KEY"] == "k"


def test_vectors_of_before_are_found_in_their_container() -> None:
    later = site(vector={"kind": "qdrant", "url": "http://q", "api_key": "k"})
    assert "pgvector" in kit_compose.profiles(later)
    env = settings(later)
    assert (env["VECTOR_STORE"], env["PGVECTOR_HOST"]) == ("qdrant", "pgvector")
    assert env["PGVECTOR_PASSWORD"] == "vector-secret"


def test_servers_elsewhere_are_told_as_they_are() -> None:
    of = site(**elsewhere())
    assert kit_compose.profiles(of) == ["collaboration"]
    env = settings(of)
    assert (env["DB_HOST"], env["DB_PORT"], env["DB_SSL_MODE"]) == ("db.example.com", 5433, "require")
    assert (env["PGSSLMODE"], env["PGSSLROOTCERT"]) == ("verify-full", "/app/kit/postgres-roots.pem")
    assert (env["PGVECTOR_HOST"], env["PGVECTOR_DATABASE"]) == ("db.example.com", "dify_vector")
    assert (env["REDIS_USE_SSL"], env["REDIS_SSL_CA_CERTS"]) == (True, "/app/kit/redis-roots.pem")
    address = "rediss://dify:redis-secret@redis.example.com:6380/2?ssl_cert_reqs=required"
    assert env["DIFY_AGENT_REDIS_URL"] == f"{address}&ssl_ca_certs=/app/kit/redis-roots.pem"


def test_a_vector_store_of_the_site_keeps_its_key() -> None:
    env = settings(site(vector={"kind": "weaviate", "url": "http://w", "api_key": "weaviate-key"}))
    assert env["WEAVIATE_API_KEY"] == "weaviate-key"
    assert env["WEAVIATE_AUTHENTICATION_APIKEY_ALLOWED_KEYS"] == ""


def test_an_example_is_read_as_compose_reads_it() -> None:
    text = "# A=1\nB=\nC='x # y'\nD=a=b  # why\n\nE=\"q\"\nlower=1\n"
    assert kit_compose.parse_dotenv(text) == {"B": "", "C": "x # y", "D": "a=b", "E": "q"}


def test_default_secrets_are_found() -> None:
    values = {
        "DB_PASSWORD": "difyai123456",
        "CELERY_BROKER_URL": "redis://:difyai123456@redis:6379/1",
        "SECRET_KEY": "",
        "RESET_PASSWORD_TOKEN_EXPIRY_MINUTES": "5",
        "DIFY_AGENT_REDIS_URL": "redis://redis/1",
        "CELERY_TOKEN": "12",
    }
    assert kit_compose.default_secrets(values) == {"DB_PASSWORD": "difyai123456", "CELERY_BROKER_URL": "difyai123456"}


def test_unknown_names_and_secrets_that_stay_are_problems() -> None:
    example = {"DB_PASSWORD": "difyai123456", "NEW_API_KEY": "everybody-knows", "LOG_LEVEL": "INFO"}
    secrets = kit_compose.default_secrets(example)
    env, problems = kit_compose.merge(example, {"DB_PASSWORD": "own", "LOG_LEVLE": "DEBUG"}, example, secrets, "f")
    assert [problem.what for problem in problems] == [
        "LOG_LEVLE is read by nothing of this release; did you mean LOG_LEVEL?",
        "NEW_API_KEY has the value that every copy of Dify comes with.",
    ]
    assert env["DB_PASSWORD"] == "own"
    assert env["LOG_LEVEL"] == "INFO"


def test_a_line_break_is_refused() -> None:
    with pytest.raises(ValueError, match="A has a line break"):
        kit_compose.render_dotenv({"A": "x\ny"})


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """Two services as `docker compose config` shows them, without fault."""
    (tmp_path / "up").mkdir()
    (tmp_path / "up/shipped").touch()
    logging = {"driver": "json-file", "options": {"max-size": "10m"}}
    mounts = [
        {"type": "bind", "source": f"{tmp_path}/data/api", "target": "/data"},
        {"type": "bind", "source": f"{tmp_path}/up/shipped", "target": "/conf", "read_only": True},
        {"type": "bind", "source": "/ca.pem", "target": "/ca", "read_only": True},
    ]
    keys = {"PLUGIN_DAEMON_KEY": "k", "INNER_API_KEY_FOR_PLUGIN": "i", "PLUGIN_MAX_PACKAGE_SIZE": "1"}
    its = {"SERVER_KEY": "k", "DIFY_INNER_API_KEY": "i", "MAX_PLUGIN_PACKAGE_SIZE": "1"}
    ports = [{"host_ip": "127.0.0.1", "published": "5", "target": 5001}]
    return {
        "services": {
            "api": {"image": "a/b:1", "logging": logging, "volumes": mounts, "environment": keys, "ports": ports},
            "plugin_daemon": {"image": "c@sha256:1", "logging": logging, "environment": its, "command": ["run"]},
        }
    }


def checked(config: dict[str, Any], tmp_path: Path) -> list[str]:
    secrets = {"DB_PASSWORD": "difyai123456", "TIDB_KEY": "dify"}
    found = kit_compose.check_config(config, secrets, tmp_path / "up", tmp_path / "data", [Path("/ca.pem")])
    return [f"{problem.where}: {problem.what}" for problem in found]


def test_a_sound_configuration_passes(config: dict[str, Any], tmp_path: Path) -> None:
    assert checked(config, tmp_path) == []


@pytest.mark.parametrize(
    ("service", "change", "what"),
    [
        ("api", {"image": "nginx:latest"}, "is another one tomorrow"),
        ("api", {"image": "registry:5000/nginx"}, "is another one tomorrow"),
        ("api", {"logging": {"driver": "json-file"}}, "log would grow"),
        ("api", {"ports": [{"published": "5003"}]}, "Port 5003 would be open"),
        ("api", {"volumes": [{"type": "bind", "source": "/elsewhere", "target": "/t"}]}, "outside the data folder"),
        ("api", {"environment": {"DB_PASSWORD": "difyai123456"}}, "that of DB_PASSWORD"),
        ("plugin_daemon", {"command": ["--requirepass", "difyai123456"]}, "that of DB_PASSWORD"),
        ("plugin_daemon", {"healthcheck": {"test": ["x -a difyai123456 ping"]}}, "that of DB_PASSWORD"),
        ("plugin_daemon", {"environment": {"SERVER_KEY": "other"}}, "would refuse each other"),
    ],
)
def test_what_the_kit_promises_is_checked(
    config: dict[str, Any], tmp_path: Path, service: str, change: dict[str, Any], what: str
) -> None:
    changed = copy.deepcopy(config)
    changed["services"][service] |= change
    assert any(what in line for line in checked(changed, tmp_path)), checked(changed, tmp_path)


def test_upstreams_files_are_read_only_and_there(config: dict[str, Any], tmp_path: Path) -> None:
    mount = config["services"]["api"]["volumes"][1]
    assert any("/conf" in line for line in checked(_with(config, mount, read_only=False), tmp_path))
    assert any("/conf" in line for line in checked(_with(config, mount, source=f"{tmp_path}/up/gone"), tmp_path))


def _with(config: dict[str, Any], mount: dict[str, Any], **change: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    changed["services"]["api"]["volumes"][1] = mount | change
    return changed


@pytest.mark.parametrize(
    ("image", "there"),
    [
        ("redis:6-alpine", "r.example.com/m/library/redis:6-alpine"),
        ("langgenius/dify-api:1.16.0", "r.example.com/m/langgenius/dify-api:1.16.0"),
        ("quay.io/coreos/etcd:v3", "r.example.com/m/coreos/etcd:v3"),
        ("localhost:5000/x:1", "r.example.com/m/x:1"),
    ],
)
def test_names_in_a_mirror(image: str, there: str) -> None:
    assert kit_compose.mirrored(image, "r.example.com/m") == there
    assert kit_compose.mirrored(image, "") == image


def answering(engine: tuple[int, str, str], compose: tuple[int, str, str]) -> Any:
    def run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        code, out, error = compose if argv[1] == "compose" else engine
        return subprocess.CompletedProcess(list(argv), code, out, error)

    return run


@pytest.mark.parametrize(
    ("engine", "compose", "what"),
    [
        ((0, "20.10.24+dfsg1\n", ""), (0, "2.24.4\n", ""), []),
        ((0, "28.2.2\n", ""), (0, "v5.5.1\n", ""), []),
        ((0, "19.03.8\n", ""), (0, "2.24.4\n", ""), ["Docker Engine is 19.03.8"]),
        ((0, "28.0.0\n", ""), (0, "2.24.3\n", ""), ["Docker Compose is 2.24.3"]),
        ((0, "28.0.0\n", ""), (1, "", "docker: 'compose' is not a docker command."), ["has no Compose plugin"]),
        ((1, "", "permission denied while trying to connect"), (0, "2.40.3", ""), ["kit may not use Docker"]),
        ((1, "", "Cannot connect to the Docker daemon"), (0, "2.40.3", ""), ["engine does not answer"]),
    ],
)
def test_engine_and_compose_are_asked(
    engine: tuple[int, str, str], compose: tuple[int, str, str], what: list[str]
) -> None:
    found = kit_docker.check_engine(answering(engine, compose), "kit")
    assert len(found) == len(what)
    assert all(text in problem.what for text, problem in zip(what, found, strict=True))
    assert all(problem.remedy for problem in found)


@pytest.mark.parametrize(
    ("client", "buildx", "problems"), [("20.10.24+dfsg1", 1, 0), ("28.2.2", 1, 1), ("28.2.2", 0, 0), ("v23.0.0", 1, 1)]
)
def test_who_builds_images_needs_buildx(client: str, buildx: int, problems: int) -> None:
    def run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        code, out = {"version": (0, client), "compose": (0, "5.5.1"), "buildx": (buildx, "")}[argv[1]]
        return subprocess.CompletedProcess(list(argv), code, out, "")

    found = kit_docker.check_engine(run, "kit", builds=True)
    assert len(found) == problems
    assert not kit_docker.check_engine(run, "kit")
    if found:
        assert client in found[0].what
        assert "docker-buildx-plugin" in found[0].remedy


def test_a_host_without_docker_is_told_so() -> None:
    def run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        raise FileNotFoundError(argv[0])

    assert kit_docker.check_engine(run, "kit")[0].what == "Docker is not installed."


def test_an_image_that_cannot_be_had_has_three_remedies() -> None:
    text = kit_images.remedies("redis:6-alpine", "no such host")
    assert text.startswith("The image redis:6-alpine cannot be had: no such host")
    assert text.count("\n  - ") == 3


def test_each_image_is_a_job() -> None:
    names = ["langgenius/dify-api:1.16.0", "langgenius/dify-web:1.16.0", "redis:6-alpine"]

    def after(source: str) -> list[list[str]]:
        return [job["after"] for job in kit_images.jobs(names, ["p"], {}, "/m", source)]

    assert after("pull") == [[], [], []]
    assert after("build") == [["docker"], ["web"], []]
    first = "image-langgenius-dify-api-1.16.0"
    assert after("archive") == [[], [first], [first]], "the archive is loaded once"


def test_upstreams_recipe_is_built_on_the_sites_base() -> None:
    recipe = """FROM python:3.12-slim-bookworm AS base
RUN \\
    apt-get update \\
    && mkdir -p /etc/apt/keyrings \\
    && curl x \\
        > /etc/apt/sources.list.d/nodesource.list \\
    && apt-get update \\
    && apt-get install -y \\
        nodejs=${NODE_PACKAGE_VERSION} \\
        expat libldap-2.5-0=2.5.13+dfsg-5 perl

RUN python -c "import tiktoken; tiktoken.encoding_for_model('gpt2')" \\
    && chown -R dify:dify ${TIKTOKEN_CACHE_DIR}
"""
    made = kit_images.api_recipe(recipe, "registry.example.com/python:3.12")
    assert made.startswith("FROM registry.example.com/python:3.12 AS base\n")
    assert "nodejs" not in made
    assert "nodesource" not in made
    assert "expat libldap-2.5-0 perl" in made
    assert "RUN mkdir -p ${TIKTOKEN_CACHE_DIR} \\\n    && chown" in made
    with pytest.raises(kit_images.ImageError, match="upstream has changed it"):
        kit_images.api_recipe("FROM scratch\n", "x")
