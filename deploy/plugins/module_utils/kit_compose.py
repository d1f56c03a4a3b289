"""Dify on Docker: what upstream's Compose file is told, and whether the result is what the kit promises.

Upstream's ``docker/`` is never edited. Beside it the kit has a project folder with a ``.env`` (upstream's own example,
with the site's values in place of its own) and an override file. ``docker compose config`` shows what the three make
together; that is what is checked here, and not what was meant.

Nothing in this file knows Ansible or talks to an engine.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import kit_dify, kit_parts
from .kit_report import Problem

Env = dict[str, Any]

#: Where the services find each other: names and ports of upstream's file.
API, PLUGIN_DAEMON, AGENT = "http://api:5001", "http://plugin_daemon:5002", "http://agent_backend:5050"
SSRF_PROXY, SANDBOX, AGENT_RUNTIME = "http://ssrf_proxy:3128", "http://sandbox:8194", "http://local_sandbox:5004"
#: What a proxy must not be asked for.
NEAR = (
    *("api", "web", "plugin_daemon", "agent_backend", "local_sandbox", "sandbox", "ssrf_proxy"),
    *("db_postgres", "pgvector", "redis"),
)
#: Where the override mounts the public keys of who may sign plugins, and root certificates of servers of the site's.
KEYS = "/app/keys"
ROOTS = {"postgres": "/app/kit/postgres-roots.pem", "redis": "/app/kit/redis-roots.pem"}
#: What a release's own files don't name: read by libraries, or by plugins, which inherit them from the daemon.
LIBRARIES = frozenset(
    {
        "AWS_REQUEST_CHECKSUM_CALCULATION",
        "AWS_RESPONSE_CHECKSUM_VALIDATION",
        "MAX_INVOCATION_TIMEOUT",
        "MAX_REQUEST_TIMEOUT",
        "PGSSLMODE",
        "PGSSLROOTCERT",
    }
)
# Settings of the kit's own that the oldest release it deploys does not know: left out there. Any other that a release
# does not know is a problem, see ``merge``.
NEWER = frozenset(
    {
        "AGENT_BACKEND_BASE_URL",
        "AGENT_BACKEND_RUN_TIMEOUT_SECONDS",
        "AGENT_BACKEND_STREAM_READ_TIMEOUT_SECONDS",
        "AGENT_SHELL_ENABLED",
        "PIP_MIRROR_AUTO_DETECT",
        "SERVER_CONSOLE_API_URL",
        "WORKFLOW_GENERATION_TIMEOUT_MS",
    }
)
# They run once and end; Compose starts them again at every `up`.
ONE_SHOT = frozenset({"init_permissions"})
# What upstream's Compose file calls the plugin daemon's own settings: what stands in .env under the daemon's names is
# overridden by it, and has no effect.
DAEMON_NAMES = {
    "SERVER_KEY": "PLUGIN_DAEMON_KEY",
    "DB_DATABASE": "DB_PLUGIN_DATABASE",
    "DIFY_INNER_API_KEY": "PLUGIN_DIFY_INNER_API_KEY",
    "DIFY_INNER_API_URL": "PLUGIN_DIFY_INNER_API_URL",
    "MAX_PLUGIN_PACKAGE_SIZE": "PLUGIN_MAX_PACKAGE_SIZE",
    "PYTHON_ENV_INIT_TIMEOUT": "PLUGIN_PYTHON_ENV_INIT_TIMEOUT",
    "S3_USE_AWS": "PLUGIN_S3_USE_AWS",
    "S3_ENDPOINT": "PLUGIN_S3_ENDPOINT",
    "S3_USE_PATH_STYLE": "PLUGIN_S3_USE_PATH_STYLE",
    "AWS_REGION": "PLUGIN_AWS_REGION",
    "AWS_ACCESS_KEY": "PLUGIN_AWS_ACCESS_KEY",
    "AWS_SECRET_KEY": "PLUGIN_AWS_SECRET_KEY",
}
# Which of the daemon's settings the containers have of themselves: paths, listeners, the interpreter.
DAEMON_CONTAINER = frozenset(
    {
        "GIN_MODE",
        "PLATFORM",
        "PLUGIN_REMOTE_INSTALLING_HOST",
        "PLUGIN_REMOTE_INSTALLING_PORT",
        "PLUGIN_STORAGE_LOCAL_ROOT",
        "PLUGIN_WORKING_PATH",
        "PYTHON_INTERPRETER_PATH",
        "SERVER_HOST",
        "SERVER_PORT",
        "UV_PATH",
    }
)
# The same of the API: what of api_env holds in a venv on the host only.
API_CONTAINER = frozenset({"FLASK_APP", "OPENDAL_FS_ROOT", "PYTHONDONTWRITEBYTECODE", "TIKTOKEN_CACHE_DIR"})
_SECRET = re.compile(r"(?:PASSWORD|PASSWD|SECRET|TOKEN|_KEYS?|_PASS)\Z")
_NAME = r"[A-Z][A-Z0-9_]*"
# Shorter ones, like `dify`, are words that stand for something else elsewhere.
_TELLING = 10


class ComposeProblem(Exception):
    """What a person must mend; ``problems`` are complete, each with its remedy."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(problem.what for problem in problems))
        self.problems = problems


# --- What .env says -------------------------------------------------------------------------------------------------


def inside(
    site: Mapping[str, Any], daemon: Mapping[str, Any], network: Mapping[str, str], vector_password: str, keys: int
) -> dict[str, Any]:
    """``site`` for ``settings``: what source mode tells API and daemon, with addresses as containers see them.

    ``site`` and ``daemon`` are ``dify_source_site`` and ``plugin_daemon_site``, the former with ``external`` (those of
    ``postgres`` and ``redis`` that run elsewhere) and ``pgvector`` (whether vectors have a container); ``network`` is
    the way out of a container, to which ``NEAR`` is added; ``keys`` is the number of public keys that are mounted at
    ``KEYS``.
    """
    postgres, redis = dict(site["postgres"]), dict(site["redis"])
    if "postgres" in site["external"]:
        postgres["sslrootcert"] = ROOTS["postgres"]
    else:
        postgres |= {"host": "db_postgres", "port": 5432, "sslmode": "disable"}
    if "redis" in site["external"]:
        redis["ca_file"] = ROOTS["redis"]
    else:
        redis |= {"host": "redis", "port": 6379, "username": "", "tls": False}
    direct = {name: ",".join([network[name], *NEAR]) for name in ("no_proxy", "NO_PROXY") if name in network}
    parts = {"postgres": postgres, "redis": redis, "network": {**network, **direct}}
    agent = {"url": AGENT, "runtime_url": AGENT_RUNTIME} if site["agent"]["url"] else {"url": "", "runtime_url": ""}
    return {
        **site,
        **parts,
        "home": "/app",
        "api_url": API,
        "internal_files_url": API,
        "plugin_daemon_url": PLUGIN_DAEMON,
        "egress_url": SSRF_PROXY,
        "sandbox_url": SANDBOX,
        "agent": {**site["agent"], **agent},
        "vector_password": vector_password,
        "daemon": {
            **daemon,
            **parts,
            "postgres": {**postgres, "database": daemon["postgres"]["database"]},
            "home": "/app",
            "api_url": API,
            "trusted_keys": [f"{KEYS}/{number}.pem" for number in range(keys)],
        },
    }


def settings(site: Mapping[str, Any]) -> Env:
    """The site's values for upstream's ``.env``, under the names that its Compose file reads.

    ``site`` is what ``inside`` returns.
    """
    api = {name: value for name, value in kit_dify.api_env(site).items() if name not in API_CONTAINER}
    daemon = {
        DAEMON_NAMES.get(name, name): value
        for name, value in kit_dify.daemon_env(site["daemon"]).items()
        if name not in DAEMON_CONTAINER
    }
    web = kit_dify.web_env(site)
    sizing = site["sizing"]
    env: Env = {
        "PLUGIN_DIFY_INNER_API_KEY": site["inner_api_key"],
        # Both workers' and the API's processes read the same file: the pool is the largest that one of them needs.
        **_largest_pool(sizing),
        "POSTGRES_MAX_CONNECTIONS": sizing["max_connections"],
        "SERVER_WORKER_AMOUNT": sizing["workers"],
        "SERVER_WORKER_CONNECTIONS": sizing["connections"],
        "CELERY_WORKER_AMOUNT": sizing["tasks"] + sizing["workflow_tasks"],
        "GUNICORN_TIMEOUT": site["request_timeout"],
        "API_WEBSOCKET_GUNICORN_TIMEOUT": site["request_timeout"],
        # Only the web server reads these.
        "SERVER_CONSOLE_API_URL": API,
        "NEXT_PUBLIC_SOCKET_URL": web["NEXT_PUBLIC_SOCKET_URL"],
        "TEXT_GENERATION_TIMEOUT_MS": web["TEXT_GENERATION_TIMEOUT_MS"],
        "WORKFLOW_GENERATION_TIMEOUT_MS": web["WORKFLOW_GENERATION_TIMEOUT_MS"],
        "NEXT_TELEMETRY_DISABLED": 1,
        "SANDBOX_API_KEY": site["sandbox_key"],
        "SSRF_PROXY_ALLOW_PRIVATE_IPS": ",".join(site["egress_allow"]) or None,
        "COMPOSE_PROFILES": ",".join(profiles(site)),
        # Compose warns of these at every command otherwise, or fills in upstream's own secrets.
        "WEAVIATE_API_KEY": "",
        "WEAVIATE_AUTHENTICATION_APIKEY_ALLOWED_KEYS": "",
    }
    if site["pgvector"]:
        # A server of its own: upstream's PostgreSQL image has no such extension.
        env |= {
            "PGVECTOR_HOST": "pgvector",
            "PGVECTOR_PORT": 5432,
            "PGVECTOR_USER": "postgres",
            "PGVECTOR_PASSWORD": site["vector_password"],
            "PGVECTOR_POSTGRES_PASSWORD": site["vector_password"],
            "PGVECTOR_DATABASE": "dify",
        }
    if site["agent"]["url"]:
        env |= {
            "DIFY_AGENT_SHELLCTL_AUTH_TOKEN": site["agent"]["runtime_token"],
            "DIFY_AGENT_SERVER_SECRET_KEY": site["agent"]["key"],
        }
        if "redis" in site["external"]:
            env["DIFY_AGENT_REDIS_URL"] = kit_parts.verified_redis_url(site["redis"], 2)
    # What both read under one name must be one value.
    clash = {name for name in daemon.keys() & api.keys() if str(daemon[name]) != str(api[name])}
    if clash:
        raise ValueError(f"API and plugin daemon disagree about {', '.join(sorted(clash))}")
    given = daemon | api | env
    # A vector store of the site's own has its key in `api`, which the blank one must not hide.
    given |= {name: api[name] for name in ("WEAVIATE_API_KEY",) if api.get(name)}
    unknown = NEWER.difference(*site["env_keys"].values())
    return {name: value for name, value in given.items() if value is not None and name not in unknown}


def _largest_pool(sizing: Mapping[str, Any]) -> Env:
    pools = [dict(pool) for pool in sizing["pools"].values()]
    return {name: max(pool[name] for pool in pools) for name in pools[0]}


def profiles(site: Mapping[str, Any]) -> list[str]:
    """Which of upstream's optional services run."""
    wanted = [] if "postgres" in site["external"] else ["postgresql"]
    if site["pgvector"]:
        wanted.append("pgvector")
    if site["sizing"]["layout"] == "full":
        wanted.append("collaboration")
    return wanted


# --- Upstream's files -----------------------------------------------------------------------------------------------


def parse_dotenv(text: str) -> dict[str, str]:
    """KEY -> value of an example file; comments and blank lines are left out."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = re.match(rf"({_NAME})=(.*)\Z", line.strip())
        if match:
            value = match[2].strip()
            quoted = re.fullmatch(r"(['\"])(.*)\1", value)
            found[match[1]] = quoted[2] if quoted else re.sub(r"\s+#.*\Z", "", value)
    return found


def render_dotenv(values: Mapping[str, Any]) -> str:
    """The text of a ``.env`` as Compose reads it: literal, whatever the values hold.

    Raises:
        ValueError: a value has a line break, which no program reads the same way.
    """
    lines = []
    for name in sorted(values):
        value = values[name]
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if "\n" in text or "\r" in text:
            raise ValueError(f"{name} has a line break")
        if "'" in text:
            # Within single quotes nothing can stand for a single quote.
            escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$")
            lines.append(f'{name}="{escaped}"\n')
        else:
            lines.append(f"{name}='{text}'\n")
    return "".join(lines)


def read_docker(folder: Path) -> tuple[dict[str, str], set[str], dict[str, str]]:
    """From a release's ``docker/``: its .env.example, all names that it knows, and the secrets it comes with.

    The names are those of the example files and of the Compose file's ``${NAME}``. The secrets are values that stand
    ready in either; see ``default_secrets``.
    """
    compose = (folder / "docker-compose.yaml").read_text(encoding="utf-8")
    example = parse_dotenv((folder / ".env.example").read_text(encoding="utf-8"))
    known, secrets = set(example), default_secrets(example)
    for path in sorted((folder / "envs").rglob("*.env.example")):
        values = parse_dotenv(path.read_text(encoding="utf-8"))
        known |= set(values)
        secrets |= default_secrets(values)
    known |= set(re.findall(rf"(?<!\$)\$\{{({_NAME})", compose))
    secrets |= default_secrets(parse_defaults(compose))
    return example, known, secrets


def parse_defaults(text: str) -> dict[str, str]:
    """NAME -> what a Compose file takes where .env is silent: ``${NAME:-this}``."""
    return dict(re.findall(rf"\$\{{({_NAME}):-([^${{}}]*)\}}", text))


def is_secret(name: str) -> bool:
    """Whether a variable of that name holds a secret."""
    return bool(_SECRET.search(name))


def default_secrets(values: Mapping[str, str]) -> dict[str, str]:
    """Those of the values that are secrets by their name, or within an address, and not blank."""
    found = {}
    for name, value in values.items():
        login = re.search(r"://[^/@\s]*:([^/@\s]+)@", value)
        if login:
            found[name] = login[1]
        elif value and _SECRET.search(name) and not value.isdigit() and "${" not in value:
            found[name] = value
    return found


def merge(
    example: Mapping[str, str],
    ours: Mapping[str, Any],
    known: Iterable[str],
    secrets: Mapping[str, str],
    where: str,
) -> tuple[Env, list[Problem]]:
    """The release's .env.example with the site's values in place of its own, and what is wrong with that.

    A name of ours that the release does not know has been dropped or renamed; a secret of the example that keeps its
    value is known to everybody.
    """
    names, problems = set(known), []
    for name in sorted(set(ours) - names):
        near = difflib.get_close_matches(name, names, 1, 0.85)
        hint = f"; did you mean {near[0]}?" if near else ""
        problems.append(
            Problem(
                f"{name} is read by nothing of this release{hint}",
                where,
                "delete it from dify_source_env or plugin_daemon_env where it comes from there; otherwise the release "
                "has dropped it, and kit_compose.py must learn the new name.",
            )
        )
    env: Env = {**example, **ours}
    for name in sorted(set(example) & set(secrets)):
        if str(env[name]) == example[name]:
            problems.append(
                Problem(
                    f"{name} has the value that every copy of Dify comes with.",
                    where,
                    "this release has a secret that the kit does not know: set it in dify_source_env.",
                )
            )
    return env, problems


# --- The result -----------------------------------------------------------------------------------------------------


def check_config(
    config: Mapping[str, Any], secrets: Mapping[str, str], release: Path, data: Path, allowed: Iterable[Path] = ()
) -> list[Problem]:
    """Hold what Compose would run (``docker compose config --format json``) against what the kit promises.

    ``release`` is upstream's folder, ``data`` where everything that containers write must lie, ``allowed`` other
    paths of the host that they may read.
    """
    problems: list[Problem] = []
    for name, service in sorted(config["services"].items()):
        where = f"service {name}"
        problems += _check_image(service, where)
        problems += _check_mounts(service, where, release, data, list(allowed))
        for port in service.get("ports") or []:
            address = port.get("host_ip", "")
            if address not in ("127.0.0.1", "::1"):
                what = f"Port {port.get('published')} would be open to the network, past the gateway."
                problems.append(Problem(what, where, "the override must publish it on 127.0.0.1, or reset it."))
        if "max-size" not in ((service.get("logging") or {}).get("options") or {}):
            problems.append(
                Problem("Its log would grow without limit.", where, "the override must set logging.options.")
            )
        left = sorted(secrets_in(service, secrets))
        if left:
            what = f"A secret that every copy of Dify comes with would be in use, that of {', '.join(left)}."
            problems.append(Problem(what, where, "the kit's .env must set it, see settings() in kit_compose.py."))
    return problems + check_pairs(config["services"], "the effective configuration")


def _check_image(service: Mapping[str, Any], where: str) -> list[Problem]:
    image = str(service.get("image", ""))
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    if digest or (tag and tag != "latest"):
        return []
    what = f"Its image {image or '(none)'} is another one tomorrow." if image else "It has no image."
    return [Problem(what, where, "name a tag in dify_compose_images.")]


def _check_mounts(
    service: Mapping[str, Any], where: str, release: Path, data: Path, allowed: list[Path]
) -> list[Problem]:
    problems = []
    for mount in service.get("volumes") or []:
        if mount.get("type") != "bind":
            continue
        source = Path(mount["source"])
        ours = source == data or data in source.parents
        # What upstream ships is read from its folder; what is not there would be made in it, as root.
        shipped = release in source.parents and source.exists() and mount.get("read_only")
        if not (ours or shipped or source in allowed):
            what = f"{mount['target']} would be {source}, which is outside the data folder {data}."
            problems.append(Problem(what, where, "compose/override.yaml.j2 must give that mount a place."))
    return problems


def secrets_in(service: Mapping[str, Any], secrets: Mapping[str, str]) -> set[str]:
    """Names of the default secrets that a service would have: under their own name, or anywhere if they are telling."""
    environment = {str(key): str(value) for key, value in (service.get("environment") or {}).items()}
    command = [str(word) for word in service.get("command") or []]
    texts = [*environment.values(), *command, *map(str, (service.get("healthcheck") or {}).get("test") or [])]
    return {
        name
        for name, value in secrets.items()
        if environment.get(name) == value or (len(value) >= _TELLING and any(value in text for text in texts))
    }


def check_pairs(services: Mapping[str, Any], where: str) -> list[Problem]:
    """Both sides of a conversation have one key; ``services`` have their ``environment``."""
    problems = []
    pairs = [
        ("api", "PLUGIN_DAEMON_KEY", "plugin_daemon", "SERVER_KEY"),
        ("api", "INNER_API_KEY_FOR_PLUGIN", "plugin_daemon", "DIFY_INNER_API_KEY"),
        ("worker", "INNER_API_KEY_FOR_PLUGIN", "plugin_daemon", "DIFY_INNER_API_KEY"),
        ("api", "PLUGIN_MAX_PACKAGE_SIZE", "plugin_daemon", "MAX_PLUGIN_PACKAGE_SIZE"),
        ("api", "CODE_EXECUTION_API_KEY", "sandbox", "API_KEY"),
        ("agent_backend", "DIFY_AGENT_PLUGIN_DAEMON_API_KEY", "plugin_daemon", "SERVER_KEY"),
        ("agent_backend", "DIFY_AGENT_SHELLCTL_AUTH_TOKEN", "local_sandbox", "SHELLCTL_AUTH_TOKEN"),
    ]
    for one, its, other, others in pairs:
        if one in services and other in services:
            left = (services[one].get("environment") or {}).get(its)
            right = (services[other].get("environment") or {}).get(others)
            if not left or str(left) != str(right):
                what = f"{its} of {one} is not {others} of {other}, or blank: they would refuse each other."
                problems.append(Problem(what, where, "set neither of them in dify_source_env."))
    return problems


# --- Images ---------------------------------------------------------------------------------------------------------


def mirrored(image: str, mirror: str) -> str:
    """The image's name in a registry that has copies of others' under their paths; ``mirror`` is its host and prefix.

    ``redis:6-alpine`` is ``library/redis:6-alpine`` there; another registry's name is left out, as its host would be
    the first part of a path that no mirror has.
    """
    if not mirror:
        return image
    mirror = mirror.rstrip("/")
    first, slash, rest = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return f"{mirror}/{rest}"
    return f"{mirror}/{image}" if slash else f"{mirror}/library/{image}"


def parse_version(text: str) -> tuple[int, ...]:
    """``v2.24.0-rc1`` -> (2, 24, 0); empty where there is no number."""
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part or 0) for part in match.groups()) if match else ()
