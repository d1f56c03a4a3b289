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

MIB = 1024 * 1024
# What people may upload, in MiB, where the site says nothing: upstream's own limits by kind.
UPLOAD_LIMITS = {
    "UPLOAD_FILE_SIZE_LIMIT": 15,
    "UPLOAD_IMAGE_FILE_SIZE_LIMIT": 10,
    "UPLOAD_AUDIO_FILE_SIZE_LIMIT": 50,
    "UPLOAD_VIDEO_FILE_SIZE_LIMIT": 100,
}
# A line between daemon and plugin carries whole files in base64: upstream's 5 MB cut images off. Larger uploads move
# it. Packages have a limit of their own, plugin_daemon_package_mb.
PLUGIN_LINE_MIB = 64
# Nothing listens on the discard port. Upstream's default would reach whoever runs a sandbox of his own on this host.
NOWHERE = "http://127.0.0.1:9"


class SettingsProblem(ValueError):
    """Variables of the site that contradict each other or don't exist; the text names them all."""


# --- Sizes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizing:
    """Processes and connections of one host.

    Attributes:
        layout: ``full``, or ``lean``: the API answers sockets and one worker does everything.
        workers: API processes; each is busy with one request's Python at a time.
        connections: TCP connections of one of them. Also what guards its pool: far above it, the API collapses.
        tasks: background tasks that the worker runs at a time.
        workflow_workers: names of the services that run workflows; none where the worker does.
        workflow_tasks: workflows that one of them runs at a time.
        unwanted: names of the services that another size of host has.
        pools: service -> environment of each of its processes: database connections that it keeps, and opens beyond.
        processes: service -> number of its processes that have such a pool.
        vector_connections: what the vector store's database may have; Dify opens a pool there for every search.
        max_connections: what PostgreSQL must allow for all of that.
    """

    layout: str
    workers: int
    connections: int
    tasks: int
    workflow_workers: list[str]
    workflow_tasks: int
    unwanted: list[str]
    pools: dict[str, dict[str, int]]
    processes: dict[str, int]
    vector_connections: int
    max_connections: int


# Of the host's memory, what API processes may take together, and what one takes (observed: 400 to 450).
API_MEMORY_SHARE, API_PROCESS_MB = 4, 450
# From this memory on, the processes of the full layout (1 GB more than the lean one's) fit beside a model on CPUs.
FULL_MEMORY_MB = 10_000
# What a burst may open beyond a pool and closes again.
OVERFLOW = 10
# The plugin daemon's pool, and what backups, migrations, people and PostgreSQL's superuser need.
DAEMON_POOL, SPARE = 30, 35
# Browsers that edit workflows together hold a connection each, and do little with it (upstream's number).
SOCKETS = 1000
# Where whole workflows run; each may wait for a model for minutes.
WORKFLOW_QUEUES = frozenset({"workflow", "workflow_based_app_execution"})
RUNNERS = ["workflow-worker", *(f"workflow-worker-{number}" for number in range(2, 9))]


def size(
    cores: int, memory_mb: int, layout: str = "auto", workers: int = 0, connections: int = 0, tasks: int = 0
) -> Sizing:
    """Sizes for a host; ``workers``, ``connections`` and ``tasks`` are the site's choice, 0 computes them.

    Measured on two cores: workers = cores, 10 connections each, 12 chats a second; a third worker costs throughput.
    Extrapolated above: other processes take their share of many cores.
    """
    if layout == "auto":
        layout = "full" if memory_mb >= FULL_MEMORY_MB else "lean"
    by_cores = cores if cores <= 4 else min(16, 4 + (cores - 4) // 2)
    by_memory = memory_mb // API_MEMORY_SHARE // API_PROCESS_MB
    workers = workers or max(1, min(by_cores, by_memory))
    connections = connections or (10 if cores <= 4 else 20)
    # A streamed workflow runs in a worker while the API passes its words on: as many there as the API can carry.
    wanted = RUNNERS[: max(1, workers // 4)] if layout == "full" else []
    workflow_tasks = 2 * connections if wanted else 0
    tasks = tasks or max(4, cores) + (0 if wanted else connections)

    services = {"api": (workers, _pool(connections)), "worker": (1, _pool(tasks)), "beat": (1, _pool(0, 1))}
    services |= {name: (1, _pool(workflow_tasks)) for name in wanted}
    if layout == "full":
        services["websocket"] = (1, _pool(0, 5))
    pools = sum(number * (pool["SQLALCHEMY_POOL_SIZE"] + OVERFLOW) for number, pool in services.values())
    # A search holds one connection; more than one a request comes only from several knowledge bases at once.
    vector = workers * connections + tasks + len(wanted) * workflow_tasks
    return Sizing(
        layout=layout,
        workers=workers,
        connections=connections,
        tasks=tasks,
        workflow_workers=wanted,
        workflow_tasks=workflow_tasks,
        unwanted=[name for name in ["websocket", *RUNNERS] if name not in services],
        pools={name: pool for name, (_, pool) in services.items()},
        processes={name: number for name, (number, _) in services.items()},
        vector_connections=vector,
        max_connections=pools + vector + DAEMON_POOL + SPARE,
    )


def _pool(at_a_time: int, least: int = 30) -> dict[str, int]:
    """The pool of a process that works on so many things at a time; 2.5 connections each at the worst."""
    kept = -(-at_a_time * 5 // 2) - OVERFLOW
    return {"SQLALCHEMY_POOL_SIZE": max(least, kept), "SQLALCHEMY_MAX_OVERFLOW": OVERFLOW}


def split_queues(queues: Iterable[str], layout: str) -> dict[str, list[str]]:
    """Which of a release's queues the two kinds of workers consume: ``{"worker": [...], "workflow-worker": [...]}``."""
    queues = list(queues)
    apart = WORKFLOW_QUEUES if layout == "full" else frozenset[str]()
    return {
        "worker": [queue for queue in queues if queue not in apart],
        "workflow-worker": [queue for queue in queues if queue in apart],
    }


# --- Limits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """How large files may be, in MiB, along the whole way: the same numbers for gateway, API and plugin daemon.

    Attributes:
        uploads: by Dify's names; empty where the release's own limits hold.
        body: the largest request that the gateway must let pass.
        line: between daemon and plugin.
    """

    uploads: dict[str, int]
    body: int
    line: int


def limits(upload_mb: int, env: Mapping[str, Any] | None = None) -> Limits:
    """From the site's one limit (0: the release's own, by kind) and what it sets by kind in ``dify_source_env``."""
    uploads = dict.fromkeys(UPLOAD_LIMITS, upload_mb) if upload_mb else {}
    own = {key: int(value) for key, value in (env or {}).items() if key in UPLOAD_LIMITS and str(value).isdigit()}
    by_kind = UPLOAD_LIMITS | uploads | own
    # A third more in base64, and room for the question around it; videos go by their address.
    image = max(by_kind["UPLOAD_IMAGE_FILE_SIZE_LIMIT"], by_kind["UPLOAD_FILE_SIZE_LIMIT"])
    return Limits(uploads, max(by_kind.values()), max(PLUGIN_LINE_MIB, image * 4 // 3 + 8))


def mail_env(mail: Mapping[str, Any], password: str) -> Env:
    """Dify's mail settings. ``mail``: see dify_source_mail; empty for none."""
    if not mail:
        return {}
    security = mail.get("security", "starttls")
    return {
        "MAIL_TYPE": "smtp",
        "MAIL_DEFAULT_SEND_FROM": mail["from"],
        "SMTP_SERVER": mail["server"],
        "SMTP_PORT": mail.get("port") or {"starttls": 587, "tls": 465, "none": 25}[security],
        "SMTP_USERNAME": mail.get("user", ""),
        "SMTP_PASSWORD": password,
        "SMTP_USE_TLS": security != "none",
        "SMTP_OPPORTUNISTIC_TLS": security == "starttls",
    }


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
        "PLUGIN_MAX_PACKAGE_SIZE": "plugin_daemon_package_mb",
        "PLUGIN_DAEMON_TIMEOUT": "dify_source_request_timeout",
        "GUNICORN_TIMEOUT": "dify_source_request_timeout",
        "SMTP_SERVER": "dify_source_mail",
        "SMTP_PORT": "dify_source_mail",
        "SMTP_USERNAME": "dify_source_mail",
        "SMTP_PASSWORD": "dify_source_mail_password",
        "SMTP_USE_TLS": "dify_source_mail",
        "SMTP_OPPORTUNISTIC_TLS": "dify_source_mail",
        "SERVER_WORKER_AMOUNT": "dify_source_api_workers",
        "SERVER_WORKER_CONNECTIONS": "dify_source_api_connections",
        "CELERY_WORKER_AMOUNT": "dify_source_worker_tasks",
        "AGENT_BACKEND_BASE_URL": "dify_source_agent",
        "AGENT_SHELL_ENABLED": "dify_source_agent_runtime",
        "CODE_EXECUTION_ENDPOINT": "sandbox_mode",
        "CODE_EXECUTION_API_KEY": "sandbox_api_key",
        "SSRF_PROXY_ALL_URL": "egress_allow",
        "SSRF_PROXY_HTTP_URL": "egress_allow",
        "SSRF_PROXY_HTTPS_URL": "egress_allow",
        "SQLALCHEMY_POOL_SIZE": "dify_source_api_connections",
        "SQLALCHEMY_MAX_OVERFLOW": "dify_source_api_connections",
    },
    "agent": {
        "DIFY_AGENT_REDIS_URL": "redis_host",
        "DIFY_AGENT_PLUGIN_DAEMON_URL": "dify_source_plugin_daemon_url",
        "DIFY_AGENT_PLUGIN_DAEMON_API_KEY": "dify_source_plugin_daemon_key",
        "DIFY_AGENT_INNER_API_URL": "dify_source_api_port",
        "DIFY_AGENT_INNER_API_KEY": "dify_source_inner_api_key",
        "DIFY_AGENT_SERVER_SECRET_KEY": "dify_source_agent_key",
        "DIFY_AGENT_SHELLCTL_ENTRYPOINT": "dify_source_agent_runtime",
        "DIFY_AGENT_SHELLCTL_AUTH_TOKEN": "dify_source_agent_runtime_token",
        "DIFY_AGENT_SHELL_HOME_ROOT": "dify_source_agent_runtime",
        "DIFY_AGENT_STUB_API_BASE_URL": "dify_source_agent_backend_port",
        "DIFY_AGENT_OUTBOUND_HTTP_READ_TIMEOUT": "dify_source_request_timeout",
    },
    "plugin_daemon": {
        "SERVER_HOST": "plugin_daemon_port",
        "SERVER_PORT": "plugin_daemon_port",
        "SERVER_KEY": "plugin_daemon_key",
        "DIFY_INNER_API_URL": "plugin_daemon_api_url",
        "DIFY_INNER_API_KEY": "plugin_daemon_inner_api_key",
        **kit_parts.WIRED,
        "MAX_PLUGIN_PACKAGE_SIZE": "plugin_daemon_package_mb",
        "PLUGIN_MAX_EXECUTION_TIMEOUT": "dify_source_request_timeout",
        "DIFY_BACKWARDS_INVOCATION_READ_TIMEOUT": "dify_source_request_timeout",
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
        elif key in UPLOAD_LIMITS and not str(value).isdigit():
            problems.append(f"{variable}.{key}: is no size. Remedy: write a whole number, in MiB.")
    return problems


# Whose settings `dify_source_env` may hold; older releases have no agents.
COMPONENTS = ("agent", "api", "web")


def _own(variable: str, site: Mapping[str, Any], components: Iterable[str], wanted: str) -> Env:
    values: Mapping[str, Any] = site["env"] or {}
    problems = own_settings(variable, values, site["env_keys"], components)
    if problems:
        raise SettingsProblem("\n".join(problems))
    return {key: value for key, value in values.items() if key in site["env_keys"].get(wanted, [])}


# --- Environments ---------------------------------------------------------------------------------------------------


def api_env(site: Mapping[str, Any]) -> Env:
    """Environment of the API, its workers, beat and ``flask``: they are one program. See ``dify_source_site``."""
    url, sizing, timeout, agent = site["public_url"], site["sizing"], site["request_timeout"], site["agent"]
    allowed = limits(site["upload_mb"], site["env"])
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
        # For commands; each service has its own.
        **sizing["pools"]["beat"],
        # A restarted database costs a ping, not a failed request.
        "SQLALCHEMY_POOL_PRE_PING": True,
        "TIKTOKEN_CACHE_DIR": f"{site['home']}/var/run/tiktoken",
        # A pool lives for one search, which uses one; the kit's PostgreSQL holds all of them together below a limit.
        "PGVECTOR_MIN_CONNECTION": 1,
        "PGVECTOR_MAX_CONNECTION": 5,
        "PLUGIN_DAEMON_URL": site["plugin_daemon_url"],
        "PLUGIN_DAEMON_KEY": site["plugin_daemon_key"],
        "PLUGIN_DAEMON_TIMEOUT": timeout,
        # The same on both sides, or a package that the console accepts is refused by the daemon.
        "PLUGIN_MAX_PACKAGE_SIZE": site["plugin_package_mb"] * MIB,
        **allowed.uploads,
        **mail_env(site["mail"], site["mail_password"]),
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
        # The first counts for nearly everything. Without it Dify's client would go past the proxy to whatever NO_PROXY
        # names, which is this host; the few places that know only the other two read them.
        **dict.fromkeys(("SSRF_PROXY_ALL_URL", "SSRF_PROXY_HTTP_URL", "SSRF_PROXY_HTTPS_URL"), site["egress_url"]),
        "CODE_EXECUTION_ENDPOINT": site["sandbox_url"] or NOWHERE,
        "CODE_EXECUTION_API_KEY": site["sandbox_key"],
        "AGENT_BACKEND_BASE_URL": agent["url"] or NOWHERE,
        "AGENT_SHELL_ENABLED": bool(agent["runtime_url"]),
        # The backend is silent while its model thinks.
        "AGENT_BACKEND_STREAM_READ_TIMEOUT_SECONDS": timeout,
        "AGENT_BACKEND_RUN_TIMEOUT_SECONDS": max(1200, timeout),
        # Each open page holds a connection; the API has too few to spare.
        "ENABLE_COLLABORATION_MODE": sizing["layout"] == "full",
    }
    return dict(site["network"]) | env | _own("dify_source_env", site, COMPONENTS, "api")


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
        # Upstream's default is a server on the reader's own machine; this is where the page came from.
        "NEXT_PUBLIC_SOCKET_URL": "/",
        "NEXT_PUBLIC_ENABLE_COLLABORATION_MODE": site["sizing"]["layout"] == "full",
        "MARKETPLACE_ENABLED": site["marketplace"],
        "MARKETPLACE_API_URL": "https://marketplace.dify.ai",
        "MARKETPLACE_URL": "https://marketplace.dify.ai",
        "TEXT_GENERATION_TIMEOUT_MS": milliseconds,
        "WORKFLOW_GENERATION_TIMEOUT_MS": max(180_000, milliseconds),
    }
    return dict(site["network"]) | env | _own("dify_source_env", site, COMPONENTS, "web")


def agent_env(site: Mapping[str, Any]) -> Env:
    """Environment of the agent backend: of Dify's secrets only those that it shows to others, and its own."""
    agent, env = site["agent"], dict[str, Any]()
    if agent["runtime_url"]:
        env = {
            "DIFY_AGENT_SHELLCTL_ENTRYPOINT": agent["runtime_url"],
            "DIFY_AGENT_SHELLCTL_AUTH_TOKEN": agent["runtime_token"],
            # As the runtime sees its own folder.
            "DIFY_AGENT_SHELL_HOME_ROOT": agent["runtime_homes"],
        }
    env |= {
        "PYTHONDONTWRITEBYTECODE": "1",
        "DIFY_AGENT_REDIS_URL": kit_parts.verified_redis_url(site["redis"], 2),
        "DIFY_AGENT_PLUGIN_DAEMON_URL": site["plugin_daemon_url"],
        "DIFY_AGENT_PLUGIN_DAEMON_API_KEY": site["plugin_daemon_key"],
        "DIFY_AGENT_INNER_API_URL": site["api_url"],
        "DIFY_AGENT_INNER_API_KEY": site["inner_api_key"],
        # What agents' commands call back to, and what protects the tokens that they do it with.
        "DIFY_AGENT_STUB_API_BASE_URL": f"{agent['url']}/agent-stub",
        "DIFY_AGENT_SERVER_SECRET_KEY": agent["key"],
        "DIFY_AGENT_OUTBOUND_HTTP_READ_TIMEOUT": site["request_timeout"],
    }
    return dict(site["network"]) | env | _own("dify_source_env", site, COMPONENTS, "agent")


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
        "MAX_PLUGIN_PACKAGE_SIZE": site["plugin_package_mb"] * MIB,
        "PLUGIN_STDIO_MAX_BUFFER_SIZE": site["limits"]["line"] * MIB,
        "PLUGIN_RUNTIME_MAX_BUFFER_SIZE": site["limits"]["line"] * MIB,
        "PLUGIN_MAX_EXECUTION_TIMEOUT": timeout,
        "DIFY_BACKWARDS_INVOCATION_READ_TIMEOUT": timeout * 1000,
        # Plugins inherit these from the daemon: how long they wait for a model, and for Dify.
        "MAX_REQUEST_TIMEOUT": timeout,
        "MAX_INVOCATION_TIMEOUT": timeout,
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
    return dict(site["network"]) | env | _own("plugin_daemon_env", site, ("plugin_daemon",), "plugin_daemon")
