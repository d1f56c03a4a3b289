"""Read from a checkout of Dify what its release file repeats, and tell where the two differ.

Upstream's files are read by their text, not executed: a host that builds has no YAML parser, and its Python may be
older than Dify's. Everything here works on one checkout of Dify and, where given, one of its plugin daemon.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

COMPOSE = "docker/docker-compose.yaml"
ENTRYPOINT = "api/docker/entrypoint.sh"
WEB_ENV = "web/env.ts"
WEB_ENTRYPOINT = "web/docker/entrypoint.sh"
AGENT_SETTINGS = "dify-agent/src/dify_agent/server/settings.py"
DAEMON_CONFIG = "internal/types/app/config.go"


class SourceError(Exception):
    """A file of the checkout is missing or has a form that is not known here."""


class _Tree:
    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def text(self, name: str) -> str:
        try:
            return (self.root / name).read_text(encoding="utf-8")
        except OSError as error:
            raise SourceError(f"{self.root / name}: {error.strerror}. Is this a checkout of Dify?") from None

    def one(self, name: str, pattern: str) -> str:
        """Return the first group of the pattern's first match in a file."""
        found = re.search(pattern, self.text(name), re.MULTILINE)
        if not found:
            raise SourceError(f"{self.root / name}: nothing looks like {pattern!r}; upstream has changed its form")
        return found[1]


def read_source(dify: str | Path, daemon: str | Path | None = None) -> dict[str, Any]:
    """Return the parts of a release file that the checkouts themselves define.

    Keys are those of the file; ``toolchain.go`` is there only with the plugin daemon's checkout, and
    ``toolchain.pnpm`` has no integrity (the registry knows it).
    """
    tree = _Tree(dify)
    services = _compose_services(tree)
    toolchain: dict[str, Any] = {
        "node": tree.one("package.json", r'"engines": \{\s*"node": "([^"]+)"'),
        "pnpm": {"version": tree.one("package.json", r'"packageManager": "pnpm@([\d.]+)')},
        "python": tree.one("api/pyproject.toml", r'^requires-python = "(.+)"'),
    }
    if daemon is not None:
        toolchain["go"] = _Tree(daemon).one("go.mod", r"^go (\S+)")
    return {
        "celery": _celery(tree),
        "compose": {"services": services},
        "gunicorn": _gunicorn(tree),
        "plugin_daemon": {"tag": _image_tag(services, "langgenius/dify-plugin-daemon").removesuffix("-local")},
        "sandbox": {"version": _image_tag(services, "langgenius/dify-sandbox")},
        "toolchain": toolchain,
    }


def _image_tag(services: Mapping[str, str], image: str) -> str:
    for reference in services.values():
        name, _, tag = reference.partition(":")
        if name == image:
            return tag
    raise SourceError(f"{COMPOSE}: no service runs {image}")


def _compose_services(tree: _Tree) -> dict[str, str]:
    """Return service -> image; the image is empty where upstream builds it. The file is generated: its form is even."""
    services: dict[str, str] = {}
    section = name = ""
    for line in tree.text(COMPOSE).splitlines():
        if found := re.fullmatch(r"([\w-]+):.*", line):
            section = found[1]
        elif section == "services" and (found := re.fullmatch(r"  ([\w-]+):\s*", line)):
            name = found[1]
            services[name] = ""
        elif name and section == "services" and (found := re.fullmatch(r"    image: [\"']?([^\s\"']+)[\"']?\s*", line)):
            services[name] = found[1]
    if not services:
        raise SourceError(f"{tree.root / COMPOSE}: no services found; upstream has changed its form")
    return dict(sorted(services.items()))


def _celery(tree: _Tree) -> dict[str, Any]:
    # Two lists stand there; the self-hosted edition's has one `workflow` queue, the cloud's one per plan.
    lists = [found.split(",") for found in re.findall(r'^\s*DEFAULT_QUEUES="([\w,]+)"', tree.text(ENTRYPOINT), re.M)]
    queues = [words for words in lists if "workflow" in words]
    if len(queues) != 1:
        raise SourceError(f"{tree.root / ENTRYPOINT}: {len(queues)} queue lists of the self-hosted edition, not 1")
    return {
        "app": tree.one(ENTRYPOINT, r"exec celery -A (\S+) worker"),
        "beat_app": tree.one(ENTRYPOINT, r"exec celery -A (\S+) beat"),
        "pool": tree.one(ENTRYPOINT, r"CELERY_WORKER_CLASS:-(\w+)\}"),
        "queues": sorted(queues[0]),
    }


def _gunicorn(tree: _Tree) -> dict[str, Any]:
    command = tree.one(ENTRYPOINT, r"exec gunicorn ((?:.*\\\n)*.*)").replace("\\\n", " ").replace('"', "")
    # ${NAME:-default} becomes its default; the application is the last word.
    *words, app = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", command).split()
    arguments = " ".join(words)
    return {
        "app": app,
        "flags": sorted(re.findall(r"(--[a-z-]+)(?= --|$)", arguments)),
        "options": dict(sorted(re.findall(r"--([a-z-]+) (?!--)(\S+)", arguments))),
    }


# --- Environment variables ------------------------------------------------------------------------------------------

_NAME = r"[A-Z][A-Z0-9_]+"


def read_env_keys(dify: str | Path, daemon: str | Path | None = None) -> dict[str, list[str]]:
    """Return component -> sorted names of the environment variables that it reads.

    ``api``: its settings classes, other names they accept, and direct look-ups; ``web``: its entry point;
    ``agent``: the agent backend's settings (releases that have one); ``plugin_daemon``: its configuration, with the
    daemon's checkout; ``compose``: what only upstream's Compose files and its images' start script know.
    """
    tree = _Tree(dify)
    keys: dict[str, set[str]] = {"api": _api_keys(tree), "web": _web_keys(tree)}
    if (tree.root / AGENT_SETTINGS).exists():
        keys["agent"] = _agent_keys(tree.text(AGENT_SETTINGS))
    if daemon is not None:
        keys["plugin_daemon"] = set(re.findall(rf'envconfig:"({_NAME})"', _Tree(daemon).text(DAEMON_CONFIG)))
    keys["compose"] = _compose_keys(tree).difference(*keys.values())
    for component, names in keys.items():
        if not names:
            raise SourceError(f"{tree.root}: no variables of {component} found; upstream has changed their form")
    return {component: sorted(names) for component, names in sorted(keys.items())}


def _api_keys(tree: _Tree) -> set[str]:
    keys: set[str] = set()
    for path in sorted((tree.root / "api").rglob("*.py")):
        parts = path.relative_to(tree.root / "api").parts
        if "tests" in parts or ".venv" in parts:
            continue
        text = path.read_text(encoding="utf-8")
        keys.update(re.findall(rf'(?:getenv|environ\.get)\(\s*"({_NAME})"', text))
        # Settings live in api/configs and in the vector store and trace providers' own packages.
        if "BaseSettings" in text or parts[0] == "configs":
            keys.update(re.findall(rf"^    ({_NAME}): ", text, re.MULTILINE))
            for names in re.findall(r"AliasChoices\(([^)]*)\)", text):
                keys.update(re.findall(rf'"({_NAME})"', names))
    return keys


def _web_keys(tree: _Tree) -> set[str]:
    entry = tree.text(WEB_ENTRYPOINT)
    keys = set(re.findall(rf"\$\{{?({_NAME})", entry)) | set(re.findall(rf"export ({_NAME})=", entry))
    return keys | set(re.findall(rf"^ {{2,4}}({_NAME}): ", tree.text(WEB_ENV), re.MULTILINE))


def _agent_keys(settings: str) -> set[str]:
    prefix = re.search(r'env_prefix="(\w+)"', settings)
    keys = set(re.findall(rf'validation_alias="({_NAME})"', settings))
    for name, definition in re.findall(r"^    ([a-z][a-z0-9_]+): (.*)", settings, re.MULTILINE):
        if "validation_alias" not in definition and not definition.startswith("ClassVar"):
            keys.add((prefix[1] if prefix else "") + name.upper())
    return keys


def _compose_keys(tree: _Tree) -> set[str]:
    # "$${NAME}" is for a container's own shell.
    keys = set(re.findall(rf"(?<!\$)\$\{{({_NAME})", tree.text(COMPOSE) + tree.text(ENTRYPOINT)))
    for path in [tree.root / "docker/.env.example", *(tree.root / "docker/envs").rglob("*.env.example")]:
        keys.update(re.findall(rf"^#? ?({_NAME})=", path.read_text(encoding="utf-8"), re.MULTILINE))
    return keys


# --- Drift ----------------------------------------------------------------------------------------------------------


def check_checkout(
    release: Mapping[str, Any],
    dify: str | Path,
    daemon: str | Path | None = None,
    env_keys: Mapping[str, Iterable[str]] | None = None,
) -> list[str]:
    """Return every difference between a release's file and its source, each naming the key; empty when they agree.

    ``dify`` is a checkout before adjustments. ``env_keys`` is the release's file of ``deploy/releases/env-keys``.
    Raises SourceError when the checkout cannot be read at all.
    """
    found = read_source(dify, daemon)
    problems = _differences(found, release, "")
    if env_keys is not None:
        for component, names in read_env_keys(dify, daemon).items():
            problems += _list_difference(f"env_keys.{component}", names, list(env_keys.get(component, [])))
    return problems


def _differences(found: Any, recorded: Any, where: str) -> list[str]:
    if isinstance(found, dict):
        recorded = recorded if isinstance(recorded, dict) else {}
        prefix = f"{where}." if where else ""
        problems = [p for key, value in found.items() for p in _differences(value, recorded.get(key), f"{prefix}{key}")]
        if where.endswith(("services", "options")):
            problems += [f"{prefix}{key}: is in the release file only" for key in recorded if key not in found]
        return problems
    if isinstance(found, list):
        return _list_difference(where, found, recorded or [])
    if recorded is None:
        return [f"{where}: {found!r} is in the source only"]
    if str(found) != str(recorded):
        return [f"{where}: {found!r} in the source, {recorded!r} in the release file"]
    return []


def _list_difference(where: str, found: list[str], recorded: list[str]) -> list[str]:
    return [f"{where}: {name} is in the source only" for name in found if name not in set(recorded)] + [
        f"{where}: {name} is in the release file only" for name in recorded if name not in set(found)
    ]
