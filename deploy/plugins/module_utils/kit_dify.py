"""What Dify's processes are told: how many there are, and the environment of each, computed from a site's variables.

One place, because the pairs must match: the API's view of the plugin daemon and the daemon's of the API, connection
pools and PostgreSQL's limit, one timeout along the whole way of a request.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from . import kit_parts

Env = dict[str, Any]

# The same on both sides, or a package that the console accepts is refused by the daemon.
MAX_PLUGIN_PACKAGE_BYTES = 50 * 1024 * 1024
# A line between daemon and plugin carries whole images in base64; upstream's 5 MB cut them off.
MAX_PLUGIN_LINE_BYTES = 64 * 1024 * 1024
# Nothing listens on the discard port. Upstream's default would reach whoever runs a sandbox of his own on this host.
NOWHERE = "http://127.0.0.1:9"


class SettingsProblem(ValueError):
    """Variables of the site that contradict each other or don't exist; the text names them all."""


# --- Sizes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizing:
    """Processes and connections of one host.

    Attributes:
        workers: API processes; each is busy with one request's Python at a time.
        connections: TCP connections of one of them. Also what guards its pool: far above it, the API collapses.
        tasks: background tasks that the worker runs at a time.
        pool, overflow: database connections that a process keeps, and more that it may open.
        max_connections: what PostgreSQL must allow for all of that.
    """

    workers: int
    connections: int
    tasks: int
    pool: int
    overflow: int
    max_connections: int


# Of the host's memory, what API processes may take together, and what one takes (observed: 400 to 450).
API_MEMORY_SHARE, API_PROCESS_MB = 4, 450
# pgvector's own pool in each process, the daemon's, and what beat, backups and people need.
VECTOR_POOL, DAEMON_POOL, SPARE = 5, 30, 35


def size(cores: int, memory_mb: int, workers: int = 0, connections: int = 0, tasks: int = 0) -> Sizing:
    """Sizes for a host; ``workers``, ``connections`` and ``tasks`` are the site's choice, 0 computes them.

    Measured on two cores: workers = cores, 10 connections each, 12 chats a second; a third worker costs throughput.
    Extrapolated above: other processes take their share of many cores.
    """
    by_cores = cores if cores <= 4 else min(16, 4 + (cores - 4) // 2)
    by_memory = memory_mb // API_MEMORY_SHARE // API_PROCESS_MB
    workers = workers or max(1, min(by_cores, by_memory))
    connections = connections or (10 if cores <= 4 else 20)
    overflow = 10
    # 2.5 connections to the database a request at the worst.
    pool = max(30, -(-connections * 5 // 2) - overflow)
    processes = workers + 1  # and the background worker
    return Sizing(
        workers=workers,
        connections=connections,
        tasks=tasks or max(4, cores),
        pool=pool,
        overflow=overflow,
        max_connections=processes * (pool + overflow + VECTOR_POOL) + DAEMON_POOL + SPARE,
    )


# --- A site's own settings ------------------------------------------------------------------------------------------

# Settings that follow from variables of the kit: setting them twice would let the two drift apart.
_WIRED = {
    "api": {
        "SECRET_KEY": "dify_source_secret_key",
        **kit_parts.WIRED,
        "PLUGIN_DAEMON_URL": "dify_source_plugin_daemon_url",
        "PLUGIN_DAEMON_KEY": "dify_source_plugin_daemon_key",
        "INNER_API_KEY_FOR_PLUGIN": "dify_source_inner_api_key",
        "CONSOLE_API_URL": "dify_public_url",
        "CONSOLE_WEB_URL": "dify_public_url",
        "SERVICE_API_URL": "dify_public_url",
        "APP_API_URL": "dify_public_url",
        "APP_WEB_URL": "dify_public_url",
        "FILES_URL": "dify_public_url",
        "TRIGGER_URL": "dify_public_url",
        "MARKETPLACE_ENABLED": "dify_source_marketplace",
        "PLUGIN_DAEMON_TIMEOUT": "dify_source_request_timeout",
        "GUNICORN_TIMEOUT": "dify_source_request_timeout",
        "SERVER_WORKER_AMOUNT": "dify_source_api_workers",
        "SERVER_WORKER_CONNECTIONS": "dify_source_api_connections",
        "CELERY_WORKER_AMOUNT": "dify_source_worker_tasks",
        "SQLALCHEMY_POOL_SIZE": "dify_source_api_connections",
        "SQLALCHEMY_MAX_OVERFLOW": "dify_source_api_connections",
    },
    "plugin_daemon": {
        "SERVER_HOST": "plugin_daemon_port",
        "SERVER_PORT": "plugin_daemon_port",
        "SERVER_KEY": "plugin_daemon_key",
        "DIFY_INNER_API_URL": "plugin_daemon_api_url",
        "DIFY_INNER_API_KEY": "plugin_daemon_inner_api_key",
        **kit_parts.WIRED,
        "PLUGIN_MAX_EXECUTION_TIMEOUT": "plugin_daemon_request_timeout",
        "FORCE_VERIFYING_SIGNATURE": "plugin_daemon_require_signatures",
        "THIRD_PARTY_SIGNATURE_VERIFICATION_ENABLED": "plugin_daemon_require_signatures",
        "THIRD_PARTY_SIGNATURE_VERIFICATION_PUBLIC_KEYS": "plugin_daemon_trusted_keys",
    },
}


def own_settings(
    variable: str, values: Mapping[str, Any], env_keys: Mapping[str, Iterable[str]], components: Iterable[str]
) -> list[str]:
    """Return every problem of a site's ``dify_source_env`` or ``plugin_daemon_env``, each with its remedy.

    ``env_keys`` is the release's file of ``deploy/releases/env-keys``; ``components`` those of it that the variable
    is for.
    """
    known = {key for component in components for key in env_keys.get(component, [])}
    wired = {key: to for component in components for key, to in _WIRED.get(component, {}).items()}
    problems = []
    for key, value in values.items():
        if key in wired:
            problems.append(f"{variable}.{key}: the kit sets it. Remedy: set {wired[key]} instead.")
        elif key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else "see deploy/releases/env-keys for what it reads."
            problems.append(f"{variable}.{key}: this release does not read it. Remedy: {hint}")
        elif isinstance(value, (dict, list)):
            problems.append(f"{variable}.{key}: must be text, a number or a boolean. Remedy: quote the value.")
    return problems


def _own(variable: str, site: Mapping[str, Any], components: Iterable[str], wanted: str) -> Env:
    values: Mapping[str, Any] = site["env"] or {}
    problems = own_settings(variable, values, site["env_keys"], components)
    if problems:
        raise SettingsProblem("\n".join(problems))
    return {key: value for key, value in values.items() if key in site["env_keys"][wanted]}


# --- Environments ---------------------------------------------------------------------------------------------------


def _network(site: Mapping[str, Any]) -> Env:
    """Certificates and proxies. The services of this host are never behind the proxy."""
    env: Env = {"SSL_CERT_FILE": site["ca_bundle"], "REQUESTS_CA_BUNDLE": site["ca_bundle"]}
    for name in ("http_proxy", "https_proxy"):
        if site[name]:
            env |= {name: site[name], name.upper(): site[name]}
    if site["http_proxy"] or site["https_proxy"]:
        own = [host for host in ("127.0.0.1", "localhost") if host not in site["no_proxy"].split(",")]
        no_proxy = ",".join([*filter(None, [site["no_proxy"]]), *own])
        env |= {"no_proxy": no_proxy, "NO_PROXY": no_proxy}
    return env


def api_env(site: Mapping[str, Any]) -> Env:
    """Environment of api, worker, beat and ``flask``: they are one program. See ``dify_source_site`` in the role."""
    url = site["public_url"]
    sizing, timeout = site["sizing"], site["request_timeout"]
    env: Env = {
        "EDITION": "SELF_HOSTED",
        "DEPLOY_ENV": "PRODUCTION",
        "FLASK_APP": "app.py",
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "PYTHONIOENCODING": "utf-8",
        # A release is compiled once and never written to again.
        "PYTHONDONTWRITEBYTECODE": "1",
        "SECRET_KEY": site["secret_key"],
        # Where browsers are; empty means "where you are", and the site works under every host name.
        **dict.fromkeys(
            ("CONSOLE_API_URL", "CONSOLE_WEB_URL", "SERVICE_API_URL", "APP_API_URL", "APP_WEB_URL", "FILES_URL"), url
        ),
        "TRIGGER_URL": url,
        "ENDPOINT_URL_TEMPLATE": f"{url}/e/{{hook_id}}",
        # Where plugins and models fetch files: from this host.
        "INTERNAL_FILES_URL": site["internal_files_url"],
        "CONSOLE_CORS_ALLOW_ORIGINS": url,
        **kit_parts.api_env(site),
        "SQLALCHEMY_POOL_SIZE": sizing["pool"],
        "SQLALCHEMY_MAX_OVERFLOW": sizing["overflow"],
        # A restarted database costs a ping, not a failed request.
        "SQLALCHEMY_POOL_PRE_PING": True,
        "TIKTOKEN_CACHE_DIR": f"{site['home']}/var/run/tiktoken",
        "PGVECTOR_MAX_CONNECTION": VECTOR_POOL,
        "PLUGIN_DAEMON_URL": site["plugin_daemon_url"],
        "PLUGIN_DAEMON_KEY": site["plugin_daemon_key"],
        "PLUGIN_DAEMON_TIMEOUT": timeout,
        "PLUGIN_MAX_PACKAGE_SIZE": MAX_PLUGIN_PACKAGE_BYTES,
        "PLUGIN_REMOTE_INSTALL_HOST": "127.0.0.1",
        "PLUGIN_REMOTE_INSTALL_PORT": site["plugin_daemon_debug_port"],
        "INNER_API_KEY_FOR_PLUGIN": site["inner_api_key"],
        "APP_MAX_EXECUTION_TIME": max(1200, timeout),
        "WORKFLOW_MAX_EXECUTION_TIME": max(1200, timeout),
        "MARKETPLACE_ENABLED": site["marketplace"],
        "CREATORS_PLATFORM_FEATURES_ENABLED": site["marketplace"],
        # Dify's own call home; `make deploy` says which releases are known.
        "CHECK_UPDATE_URL": "",
        "SCARF_NO_ANALYTICS": True,
        "SWAGGER_UI_ENABLED": False,
        "CODE_EXECUTION_ENDPOINT": NOWHERE,
        "AGENT_BACKEND_BASE_URL": NOWHERE,
    }
    return _network(site) | env | _own("dify_source_env", site, ("api", "web"), "api")


def web_env(site: Mapping[str, Any]) -> Env:
    """Environment of the web server; upstream's start script makes ``NEXT_PUBLIC_*`` out of it. No secrets."""
    url, milliseconds = site["public_url"], site["request_timeout"] * 1000
    env: Env = {
        "EDITION": "SELF_HOSTED",
        "DEPLOY_ENV": "PRODUCTION",
        "NODE_ENV": "production",
        "NEXT_TELEMETRY_DISABLED": 1,
        # Else every host of the network could talk to it past the gateway.
        "HOSTNAME": "127.0.0.1",
        "PORT": site["web_port"],
        "CONSOLE_API_URL": url,
        "APP_API_URL": url,
        # Pages are also made on the server, which needs an address even when browsers don't; else `/` is a 500.
        "SERVER_CONSOLE_API_URL": site["api_url"],
        "MARKETPLACE_ENABLED": site["marketplace"],
        "MARKETPLACE_API_URL": "https://marketplace.dify.ai",
        "MARKETPLACE_URL": "https://marketplace.dify.ai",
        "TEXT_GENERATION_TIMEOUT_MS": milliseconds,
        "WORKFLOW_GENERATION_TIMEOUT_MS": max(180_000, milliseconds),
    }
    return env | _own("dify_source_env", site, ("api", "web"), "web")


def daemon_env(site: Mapping[str, Any]) -> Env:
    """Environment of the plugin daemon and its command line. See ``plugin_daemon_site`` in the role."""
    timeout = site["request_timeout"]
    env: Env = {
        "GIN_MODE": "release",
        "PLATFORM": "local",
        "SERVER_HOST": "127.0.0.1",
        "SERVER_PORT": site["port"],
        "SERVER_KEY": site["key"],
        "DIFY_INNER_API_URL": site["api_url"],
        "DIFY_INNER_API_KEY": site["inner_api_key"],
        "PLUGIN_REMOTE_INSTALLING_ENABLED": True,
        "PLUGIN_REMOTE_INSTALLING_HOST": "127.0.0.1",
        "PLUGIN_REMOTE_INSTALLING_PORT": site["debug_port"],
        **kit_parts.daemon_env(site),
        "DB_MAX_OPEN_CONNS": DAEMON_POOL,
        "PLUGIN_WORKING_PATH": f"{site['home']}/var/plugins/cwd",
        "MAX_PLUGIN_PACKAGE_SIZE": MAX_PLUGIN_PACKAGE_BYTES,
        "PLUGIN_STDIO_MAX_BUFFER_SIZE": MAX_PLUGIN_LINE_BYTES,
        "PLUGIN_RUNTIME_MAX_BUFFER_SIZE": MAX_PLUGIN_LINE_BYTES,
        "PLUGIN_MAX_EXECUTION_TIMEOUT": timeout,
        "DIFY_BACKWARDS_INVOCATION_READ_TIMEOUT": timeout * 1000,
        "PYTHON_INTERPRETER_PATH": site["python"],
        # uv starts in an empty environment; the wrapper gives it interpreter, certificates and mirror.
        "UV_PATH": site["uv"],
        # Without a sign of life from uv; a slow mirror needs more than upstream's 120 s.
        "PYTHON_ENV_INIT_TIMEOUT": 600,
        # Probes public mirrors at every start; the site names its own.
        "PIP_MIRROR_AUTO_DETECT": False,
        "FORCE_VERIFYING_SIGNATURE": site["require_signatures"],
        "THIRD_PARTY_SIGNATURE_VERIFICATION_ENABLED": True,
        "THIRD_PARTY_SIGNATURE_VERIFICATION_PUBLIC_KEYS": ",".join(site["trusted_keys"]),
        "HEALTH_API_LOG_ENABLED": False,
    }
    if site["pypi_index"]:
        # A plugin's lockfile names PyPI's own addresses; the mirror counts only without it.
        env |= {"PIP_MIRROR_URL": site["pypi_index"], "PLUGIN_IGNORE_UV_LOCK": True}
    return _network(site) | env | _own("plugin_daemon_env", site, ("plugin_daemon",), "plugin_daemon")
