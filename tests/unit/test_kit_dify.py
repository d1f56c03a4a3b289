"""What Dify's processes are told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils import kit_dify, kit_network

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
ENV_KEYS: dict[str, list[str]] = yaml.safe_load((DEPLOY / "releases/env-keys/1.16.0.yml").read_text())
POSTGRES = {
    "host": "127.0.0.1",
    "port": 5,
    "user": "dify",
    "password": "pg-secret",
    "database": "dify",
    "vector_database": "v",
    "sslmode": "disable",
    "sslrootcert": "/ca.pem",
}
REDIS = {
    "host": "127.0.0.1",
    "port": 6,
    "username": "",
    "password": "re/dis@secret",
    "tls": False,
    "ca_file": "/redis-ca.pem",
}
S3 = {
    "kind": "s3",
    "endpoint": "https://s3.example.com",
    "region": "eu-1",
    "bucket": "b",
    "access_key": "id",
    "secret_key": "s3-secret",
    "address_style": "path",
}
AGENT = {
    "url": "http://127.0.0.1:7",
    "key": "agent-secret",
    "runtime_url": "http://127.0.0.1:8",
    "runtime_token": "runtime-secret",
    "runtime_homes": "/agent/home",
}
COMMON: dict[str, Any] = {
    "home": "/h",
    "network": kit_network.environment("/ca.pem"),
    "postgres": POSTGRES,
    "redis": REDIS,
    "storage": {"kind": "fs"},
    "vector": {"kind": "pgvector", "url": "", "api_key": ""},
    "inner_api_key": "inner-secret",
    "request_timeout": 900,
    "plugin_package_mb": 300,
    "env": {},
    "env_keys": ENV_KEYS,
    "api_url": "http://127.0.0.1:1",
}


def dify(**changes: Any) -> dict[str, Any]:
    own = {
        "public_url": "",
        "egress_url": "http://127.0.0.1:15",
        "sandbox_url": "",
        "sandbox_key": "sandbox-secret",
        "internal_files_url": "http://127.0.0.1:0",
        "web_port": 2,
        "secret_key": "secret-key",
        "plugin_daemon_url": "http://127.0.0.1:3",
        "plugin_daemon_key": "daemon-secret",
        "plugin_daemon_debug_port": 4,
        "sizing": dataclasses.asdict(kit_dify.size(2, 24_000)),
        "agent": AGENT,
        "marketplace": False,
        "upload_mb": 0,
        "mail": {},
        "mail_password": "",
    }
    return COMMON | own | changes


def daemon(**changes: Any) -> dict[str, Any]:
    own = {
        "pypi_index": "",
        "limits": dataclasses.asdict(kit_dify.limits(0)),
        "port": 3,
        "debug_port": 4,
        "key": "daemon-secret",
        "python": "/h/python",
        "uv": "/h/uv",
        "require_signatures": True,
        "trusted_keys": ["/h/site.public.pem", "/other.pem"],
    }
    return COMMON | own | changes


# --- Pairs that must match ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_api", "of_daemon"),
    [
        ("PLUGIN_DAEMON_KEY", "SERVER_KEY"),
        ("INNER_API_KEY_FOR_PLUGIN", "DIFY_INNER_API_KEY"),
        ("PLUGIN_DAEMON_TIMEOUT", "PLUGIN_MAX_EXECUTION_TIMEOUT"),
        ("PLUGIN_MAX_PACKAGE_SIZE", "MAX_PLUGIN_PACKAGE_SIZE"),
        ("PLUGIN_REMOTE_INSTALL_PORT", "PLUGIN_REMOTE_INSTALLING_PORT"),
    ],
)
def test_api_and_daemon_agree(of_api: str, of_daemon: str) -> None:
    assert kit_dify.api_env(dify())[of_api] == kit_dify.daemon_env(daemon())[of_daemon]


def test_one_timeout_reaches_browser_plugin_and_the_call_of_the_model() -> None:
    assert kit_dify.web_env(dify())["TEXT_GENERATION_TIMEOUT_MS"] == 900_000
    env = kit_dify.daemon_env(daemon())
    assert env["DIFY_BACKWARDS_INVOCATION_READ_TIMEOUT"] == 900_000
    # Read by plugins, which inherit the daemon's environment (dify_plugin/config/config.py).
    assert env["MAX_REQUEST_TIMEOUT"] == env["MAX_INVOCATION_TIMEOUT"] == 900


@pytest.mark.parametrize(
    ("upload_mb", "env", "body", "line"),
    [
        (0, {}, 100, 64),
        (0, {"UPLOAD_VIDEO_FILE_SIZE_LIMIT": "300"}, 300, 64),
        (20, {}, 20, 64),
        (200, {}, 200, 274),
        (20, {"UPLOAD_IMAGE_FILE_SIZE_LIMIT": 90}, 90, 128),
    ],
)
def test_one_limit_for_gateway_api_and_daemon(upload_mb: int, env: dict[str, Any], body: int, line: int) -> None:
    found = kit_dify.limits(upload_mb, env)
    assert (found.body, found.line) == (body, line)
    api = kit_dify.api_env(dify(upload_mb=upload_mb, env=env))
    for name in kit_dify.UPLOAD_LIMITS:
        assert api.get(name, 0) == env.get(name, upload_mb)
        assert int(api.get(name, kit_dify.UPLOAD_LIMITS[name])) <= body
    its = kit_dify.daemon_env(daemon(limits=dataclasses.asdict(found)))
    assert api["PLUGIN_MAX_PACKAGE_SIZE"] == its["MAX_PLUGIN_PACKAGE_SIZE"] == 300 << 20  # a variable of its own
    assert its["PLUGIN_STDIO_MAX_BUFFER_SIZE"] == line << 20


@pytest.mark.parametrize(
    ("security", "port", "expected"),
    [(None, None, (587, True, True)), ("tls", None, (465, True, False)), ("none", 2525, (2525, False, False))],
)
def test_mail(security: str | None, port: int | None, expected: tuple[int, bool, bool]) -> None:
    mail = {"server": "smtp.example.com", "from": "Dify <dify@example.com>", "security": security, "port": port}
    env = kit_dify.api_env(dify(mail={key: value for key, value in mail.items() if value}, mail_password="word"))
    assert (env["MAIL_TYPE"], env["MAIL_DEFAULT_SEND_FROM"]) == ("smtp", "Dify <dify@example.com>")
    assert (env["SMTP_PORT"], env["SMTP_USE_TLS"], env["SMTP_OPPORTUNISTIC_TLS"]) == expected
    assert "MAIL_TYPE" not in kit_dify.api_env(dify())


@pytest.mark.parametrize("layout", ["full", "lean"])
def test_people_edit_together_where_sockets_have_their_own_process(layout: str) -> None:
    site = dify(sizing=dataclasses.asdict(kit_dify.size(2, 24_000, layout)))
    assert kit_dify.api_env(site)["ENABLE_COLLABORATION_MODE"] is (layout == "full")
    assert kit_dify.web_env(site)["NEXT_PUBLIC_ENABLE_COLLABORATION_MODE"] is (layout == "full")


# Of the libraries beneath: libpq, AWS', and whatever verifies certificates.
LIBRARIES = {"PGSSLMODE", "PGSSLROOTCERT", "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"}
LIBRARIES |= set(kit_network.CA_NAMES)
ELSEWHERE: dict[str, Any] = {
    "postgres": {**POSTGRES, "host": "db.example.com", "sslmode": "verify-full"},
    "redis": {**REDIS, "host": "redis.example.com", "username": "dify", "tls": True},
    "storage": S3,
}


@pytest.mark.parametrize("make", [kit_dify.api_env, kit_dify.web_env])
@pytest.mark.parametrize("kind", ["pgvector", "qdrant", "weaviate"])
@pytest.mark.parametrize("parts", [{}, ELSEWHERE])
def test_every_setting_of_dify_is_one_that_the_release_reads(make: Any, kind: str, parts: Any) -> None:
    known = {key for keys in ENV_KEYS.values() for key in keys} | LIBRARIES
    system = {"FLASK_APP", "PYTHONDONTWRITEBYTECODE", "TIKTOKEN_CACHE_DIR"}
    system |= {"NODE_ENV", "HOSTNAME", "SCARF_NO_ANALYTICS", "CREATORS_PLATFORM_FEATURES_ENABLED"}
    site = dify(**parts, vector={"kind": kind, "url": "https://v", "api_key": "k"})
    assert set(make(site)) - known - system == set()


@pytest.mark.parametrize("parts", [{}, ELSEWHERE])
def test_every_setting_of_the_daemon_is_one_that_it_reads(parts: Any) -> None:
    # Plugins read two of them.
    system = {"GIN_MODE", "MAX_REQUEST_TIMEOUT", "MAX_INVOCATION_TIMEOUT"} | LIBRARIES
    env = kit_dify.daemon_env(daemon(pypi_index="https://mirror/simple", **parts))
    assert set(env) - set(ENV_KEYS["plugin_daemon"]) - system == set()


# --- Secrets and addresses ------------------------------------------------------------------------------------------


def test_the_web_server_knows_no_secret() -> None:
    assert not [key for key, value in kit_dify.web_env(dify()).items() if "secret" in str(value)]


def test_a_password_is_escaped_in_an_address() -> None:
    assert kit_dify.api_env(dify())["CELERY_BROKER_URL"] == "redis://:re%2Fdis%40secret@127.0.0.1:6/1"


def test_servers_elsewhere_are_told_to_both_with_tls() -> None:
    api, plugins = kit_dify.api_env(dify(**ELSEWHERE)), kit_dify.daemon_env(daemon(**ELSEWHERE))
    for env in (api, plugins):
        assert (env["DB_HOST"], env["PGSSLROOTCERT"]) == ("db.example.com", "/ca.pem")
        assert (env["REDIS_USERNAME"], env["REDIS_USE_SSL"]) == ("dify", True)
        assert (env["REDIS_SSL_CERT_REQS"], env["REDIS_SSL_CA_CERTS"]) == ("CERT_REQUIRED", "/redis-ca.pem")
        assert env["AWS_CA_BUNDLE"] == "/ca.pem"
    assert api["PGSSLMODE"] == "verify-full"
    assert api["CELERY_BROKER_URL"] == "rediss://dify:re%2Fdis%40secret@redis.example.com:6/1"
    assert api["EVENT_BUS_REDIS_URL"].endswith("/0?ssl_cert_reqs=required&ssl_ca_certs=/redis-ca.pem")
    assert (api["STORAGE_TYPE"], api["S3_BUCKET_NAME"], api["S3_ADDRESS_STYLE"]) == ("s3", "b", "path")
    assert plugins["DB_SSL_MODE"] == "require"
    assert (plugins["PLUGIN_STORAGE_TYPE"], plugins["PLUGIN_STORAGE_OSS_BUCKET"]) == ("aws_s3", "b")
    assert plugins["S3_USE_PATH_STYLE"] is True


def test_old_knowledge_is_found_when_new_goes_elsewhere() -> None:
    env = kit_dify.api_env(dify(vector={"kind": "qdrant", "url": "http://q:6333", "api_key": ""}))
    assert (env["VECTOR_STORE"], env["QDRANT_URL"], env["PGVECTOR_DATABASE"]) == ("qdrant", "http://q:6333", "v")
    assert env["QDRANT_API_KEY"] is None


def test_a_site_may_choose_what_only_dify_knows() -> None:
    env = kit_dify.api_env(dify(env={"VECTOR_STORE": "milvus", "STORAGE_TYPE": "azure-blob"}))
    assert (env["VECTOR_STORE"], env["STORAGE_TYPE"]) == ("milvus", "azure-blob")


def test_without_a_public_url_every_address_is_relative_but_those_of_this_host() -> None:
    env = kit_dify.api_env(dify()) | kit_dify.web_env(dify())
    assert env["CONSOLE_API_URL"] == env["FILES_URL"] == env["TRIGGER_URL"] == ""
    assert env["ENDPOINT_URL_TEMPLATE"] == "/e/{hook_id}"
    assert env["INTERNAL_FILES_URL"] == "http://127.0.0.1:0"
    assert env["SERVER_CONSOLE_API_URL"] == "http://127.0.0.1:1"


def test_a_public_url_is_in_every_address_that_browsers_see() -> None:
    env = kit_dify.api_env(dify(public_url="https://dify.example.com"))
    urls = {
        key: value for key, value in env.items() if key.endswith("_URL") and "127.0.0.1" not in str(value) and value
    }
    assert urls == dict.fromkeys(
        [
            "CONSOLE_API_URL",
            "CONSOLE_WEB_URL",
            "SERVICE_API_URL",
            "APP_API_URL",
            "APP_WEB_URL",
            "FILES_URL",
            "TRIGGER_URL",
        ],
        "https://dify.example.com",
    )
    assert env["ENDPOINT_URL_TEMPLATE"] == "https://dify.example.com/e/{hook_id}"


def test_proxies_and_certificates_reach_every_process() -> None:
    network = kit_network.environment("/ca.pem", "", "http://proxy:3128")
    for env in (
        kit_dify.api_env(dify(network=network)),
        kit_dify.web_env(dify(network=network)),
        kit_dify.daemon_env(daemon(network=network)),
        kit_dify.agent_env(dify(network=network)),
    ):
        assert network.items() <= env.items()


def test_a_mirror_goes_before_lockfiles() -> None:
    env = kit_dify.daemon_env(daemon(pypi_index="https://mirror/simple"))
    assert (env["PIP_MIRROR_URL"], env["PLUGIN_IGNORE_UV_LOCK"]) == ("https://mirror/simple", True)
    # Without one the lockfile counts, by its hashes.
    assert not {"PIP_MIRROR_URL", "PLUGIN_IGNORE_UV_LOCK"} & set(kit_dify.daemon_env(daemon()))


def test_a_slow_index_has_time() -> None:
    env = kit_dify.daemon_env(daemon())
    assert (env["PYTHON_ENV_INIT_TIMEOUT"], env["PIP_MIRROR_AUTO_DETECT"]) == (600, False)
    wrapper = Path(__file__).parents[2] / "roles/plugin_daemon/templates/uv-for-plugins.j2"
    assert "UV_HTTP_TIMEOUT=300" in wrapper.read_text()


def test_whole_images_fit_between_daemon_and_plugin() -> None:
    env = kit_dify.daemon_env(daemon())
    # Ten images of 4 MiB, the most of a question, in base64.
    assert env["PLUGIN_STDIO_MAX_BUFFER_SIZE"] == env["PLUGIN_RUNTIME_MAX_BUFFER_SIZE"] > 10 * 4 * 2**20 * 4 / 3


def test_signatures_stay_on_and_the_sites_key_counts() -> None:
    env = kit_dify.daemon_env(daemon())
    assert env["FORCE_VERIFYING_SIGNATURE"] is True
    assert env["THIRD_PARTY_SIGNATURE_VERIFICATION_PUBLIC_KEYS"] == "/h/site.public.pem,/other.pem"


# --- A site's own settings ------------------------------------------------------------------------------------------


def test_a_sites_setting_wins_and_reaches_only_who_reads_it() -> None:
    site = dify(env={"UPLOAD_FILE_SIZE_LIMIT": 50, "TOP_K_MAX_VALUE": 20})
    assert kit_dify.api_env(site)["UPLOAD_FILE_SIZE_LIMIT"] == 50
    assert "UPLOAD_FILE_SIZE_LIMIT" not in kit_dify.web_env(site)
    assert kit_dify.web_env(site)["TOP_K_MAX_VALUE"] == 20


def test_all_problems_of_a_sites_settings_are_named_at_once() -> None:
    env = {"UPLOAD_FILE_SIZE_LIMITS": 1, "SECRET_KEY": "x", "LOG_LEVEL": ["DEBUG"], "UPLOAD_FILE_SIZE_LIMIT": "2G"}
    with pytest.raises(kit_dify.SettingsProblem) as error:
        kit_dify.api_env(dify(env=env))
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert "UPLOAD_FILE_SIZE_LIMIT: is no size" in lines[3]
    assert "did you mean UPLOAD_FILE_SIZE_LIMIT?" in lines[0]
    assert "set dify_source_secret_key instead" in lines[1]
    assert "LOG_LEVEL" in lines[2]


def test_the_daemons_settings_are_checked_too() -> None:
    with pytest.raises(kit_dify.SettingsProblem, match=r"plugin_daemon_env\.SERVER_KEY.*plugin_daemon_key"):
        kit_dify.daemon_env(daemon(env={"SERVER_KEY": "x"}))


# --- Sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "memory", "workers", "connections"),
    [(1, 4_000, 1, 10), (2, 24_000, 2, 10), (4, 32_000, 4, 10), (8, 64_000, 6, 20), (32, 256_000, 16, 20)],
)
def test_workers_follow_the_cores(cores: int, memory: int, workers: int, connections: int) -> None:
    found = kit_dify.size(cores, memory)
    assert (found.workers, found.connections) == (workers, connections)


def test_a_host_with_little_memory_gets_fewer_workers_and_processes() -> None:
    assert kit_dify.size(8, 6_000).workers == 3
    assert set(kit_dify.size(8, 7_900).processes) == {"api", "worker", "beat"}


def test_a_host_of_12_gib_runs_everything() -> None:
    found = kit_dify.size(2, 11_900)
    assert found.processes == {"api": 2, "websocket": 1, "worker": 1, "workflow-worker": 1, "beat": 1}
    assert kit_dify.size(2, 11_900, "lean").processes == {"api": 2, "worker": 1, "beat": 1}


def test_large_hosts_run_several_workflow_workers_and_forget_them_again() -> None:
    large, small = kit_dify.size(32, 256_000), kit_dify.size(2, 4_000)
    assert large.workflow_workers == [
        "workflow-worker",
        "workflow-worker-2",
        "workflow-worker-3",
        "workflow-worker-4",
    ]
    assert {*large.workflow_workers, "websocket"} <= set(small.unwanted)
    for found in (large, small):
        assert not set(found.unwanted) & set(found.processes)


@pytest.mark.parametrize("layout", ["full", "lean"])
@pytest.mark.parametrize("cores", [1, 2, 4, 8, 16, 64, 256])
@pytest.mark.parametrize("chosen", [(0, 0, 0), (1, 1, 1), (64, 0, 0), (0, 200, 0), (0, 0, 100)])
def test_the_database_has_room_for_all_pools_at_once(layout: str, cores: int, chosen: tuple[int, int, int]) -> None:
    found = kit_dify.size(cores, 64_000, layout, *chosen)
    assert set(found.pools) == set(found.processes)
    most = {name: sum(pool.values()) for name, pool in found.pools.items()}
    # What one thing at a time takes, as it was measured.
    assert most["api"] >= 2.5 * found.connections
    assert most["worker"] >= 2.5 * found.tasks
    assert all(most[name] >= 2.5 * found.workflow_tasks for name in found.workflow_workers)
    everything = sum(number * most[name] for name, number in found.processes.items())
    everything += found.vector_connections + kit_dify.DAEMON_POOL
    # Backups, migrations, people, and three that PostgreSQL keeps for its superuser.
    assert everything + 20 < found.max_connections


def test_the_environments_have_the_pools_that_were_counted() -> None:
    site = dify(sizing=dataclasses.asdict(kit_dify.size(2, 24_000)))
    api = kit_dify.api_env(site)
    # The file is for commands; a service overrides it.
    assert (api["SQLALCHEMY_POOL_SIZE"], api["SQLALCHEMY_MAX_OVERFLOW"]) == (1, 10)
    assert kit_dify.daemon_env(daemon())["DB_MAX_OPEN_CONNS"] == kit_dify.DAEMON_POOL


@pytest.mark.parametrize("release", ["1.14.2", "1.16.0"])
@pytest.mark.parametrize("layout", ["full", "lean"])
def test_every_queue_of_a_release_has_one_kind_of_worker(release: str, layout: str) -> None:
    queues = yaml.safe_load((DEPLOY / f"releases/{release}.yml").read_text())["celery"]["queues"]
    split = kit_dify.split_queues(queues, layout)
    assert sorted([*split["worker"], *split["workflow-worker"]]) == queues
    assert set(split["workflow-worker"]) == (kit_dify.WORKFLOW_QUEUES if layout == "full" else set())


# --- Agents ---------------------------------------------------------------------------------------------------------


def test_the_agent_backend_has_its_own_secrets_and_those_that_it_shows() -> None:
    text = str(kit_dify.agent_env(dify()))
    for secret in ("agent-secret", "runtime-secret", "daemon-secret", "inner-secret"):
        assert secret in text
    for secret in ("secret-key", "pg-secret"):
        assert secret not in text


def test_the_agent_backend_and_dify_agree() -> None:
    site = dify()
    agent, api, plugins = kit_dify.agent_env(site), kit_dify.api_env(site), kit_dify.daemon_env(daemon())
    assert agent["DIFY_AGENT_PLUGIN_DAEMON_API_KEY"] == plugins["SERVER_KEY"]
    assert agent["DIFY_AGENT_INNER_API_KEY"] == api["INNER_API_KEY_FOR_PLUGIN"]
    assert agent["DIFY_AGENT_STUB_API_BASE_URL"] == api["AGENT_BACKEND_BASE_URL"] + "/agent-stub"
    assert agent["DIFY_AGENT_OUTBOUND_HTTP_READ_TIMEOUT"] == api["AGENT_BACKEND_STREAM_READ_TIMEOUT_SECONDS"] == 900


def test_without_a_runtime_agents_are_offered_no_shell() -> None:
    site = dify(agent=AGENT | {"runtime_url": ""})
    assert kit_dify.api_env(site)["AGENT_SHELL_ENABLED"] is False
    assert not [key for key in kit_dify.agent_env(site) if "SHELL" in key]
    assert kit_dify.api_env(dify())["AGENT_SHELL_ENABLED"] is True


def test_without_agents_nobody_is_asked() -> None:
    site = dify(agent=AGENT | {"url": "", "runtime_url": ""})
    assert kit_dify.api_env(site)["AGENT_BACKEND_BASE_URL"] == kit_dify.NOWHERE


@pytest.mark.parametrize("parts", [{}, ELSEWHERE])
def test_every_setting_of_the_agent_backend_is_one_that_it_reads(parts: Any) -> None:
    system = {"PYTHONDONTWRITEBYTECODE", *kit_network.CA_NAMES}
    assert set(kit_dify.agent_env(dify(**parts))) - set(ENV_KEYS["agent"]) == system


def test_the_agent_backend_finds_redis_wherever_it_is() -> None:
    url = "DIFY_AGENT_REDIS_URL"
    assert kit_dify.agent_env(dify())[url] == "redis://:re%2Fdis%40secret@127.0.0.1:6/2"
    # It knows the address alone, so what the server's certificate is checked with stands there.
    assert kit_dify.agent_env(dify(**ELSEWHERE))[url] == (
        "rediss://dify:re%2Fdis%40secret@redis.example.com:6/2?ssl_cert_reqs=required&ssl_ca_certs=/redis-ca.pem"
    )


def test_dify_asks_others_through_the_egress_proxy_whatever_no_proxy_says() -> None:
    env = kit_dify.api_env(dify())
    names = ("SSRF_PROXY_ALL_URL", "SSRF_PROXY_HTTP_URL", "SSRF_PROXY_HTTPS_URL")
    assert {env[name] for name in names} == {"http://127.0.0.1:15"}
