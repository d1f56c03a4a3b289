"""What the kit knows about one release of Dify: is the data sound, which advisories are open, what must be adjusted.

The data is a file of ``deploy/releases``. This module only decides over it: the caller has parsed the YAML, because
a host has no YAML parser to offer. What a release's source says about itself is read by ``kit_release_source``.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import ssl
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What a person must still decide in a drafted file. No release that holds it passes validation.
FILL_IN = "FILL IN"
SEVERITIES = ("low", "medium", "high", "critical")
ADJUST_MODES = ("auto", "always", "never")
PROBE_SECONDS = 15.0

Release = Mapping[str, Any]


class ReleaseError(Exception):
    """A release file, or a source tree it should fit, is not as it must be. The text says where, and what to do."""


# --- Is the file sound? ---------------------------------------------------------------------------------------------

_COMMIT = r"[0-9a-f]{40}"
_VERSION = r"\d+\.\d+\.\d+"
_NAME = r"[a-z0-9]+(-[a-z0-9]+)*"
_TEXT = r"(?s).*\S.*"

# The file's form and order. A scalar's whole text must match; a list of one schema holds any number of such items;
# "*" stands for any key. Keys of "*" and lists of words must be sorted; not so the words of a command.
SCHEMA: dict[str, Any] = {
    "dify": {"tag": r"\S+", "commit": _COMMIT, "repository": r"https://.+"},
    "plugin_daemon": {"tag": r"\S+", "commit": _COMMIT, "repository": r"https://.+"},
    "sandbox": {"version": _VERSION, "commit": _COMMIT, "repository": r"https://.+"},
    "toolchain": {
        "go": r"\d+\.\d+(\.\d+)?",
        "node": r"\S+",
        "pnpm": {"version": _VERSION, "integrity": r"sha512-[A-Za-z0-9+/]{86}=="},
        "python": r"\S+",
    },
    "advisories": [
        {
            "id": r"[A-Za-z0-9-]+",
            "cve": r"(CVE-\d{4}-\d+)?",
            "severity": "|".join(SEVERITIES),
            "summary": _TEXT,
            "consequence": _TEXT,
            "fixed_in": rf"({_VERSION})?",
            "remedy": _TEXT,
        }
    ],
    "upgrade": {
        "from": _VERSION,
        "steps": [
            {"name": _NAME, "before": _VERSION, "directory": r"[\w-]+", "command": [r".+"], "reason": _TEXT},
        ],
    },
    "postgres": {"newest": r"\d+"},
    "adjustments": [
        {
            "name": _NAME,
            "when_unreachable": r"(git\+)?https://\S+",
            "reason": _TEXT,
            "consequence": _TEXT,
            "edits": [
                {"file": r"[\w.-]+(/[\w.-]+)*", "pattern": _TEXT, "replacement": r"(?s).*", "count": r"[1-9]\d*"},
            ],
        }
    ],
    "gunicorn": {"app": r"[\w:.]+", "flags": [r"--[a-z-]+"], "options": {"*": r"\S+"}},
    "celery": {"app": r"[\w.]+", "beat_app": r"[\w.]+", "pool": r"\w+", "queues": [r"[a-z_]+"]},
    "compose": {"services": {"*": r"\S*"}},
}


def validate_release(data: object, schema: object = None, where: str = "") -> list[str]:
    """Return every problem of a parsed release file, each with its place, e.g. ``dify.commit: ...``."""
    schema = SCHEMA if schema is None else schema
    if data == FILL_IN:
        return [f"{where}: still says {FILL_IN!r}; a person must decide it"]
    if isinstance(schema, dict):
        return _validate_mapping(data, schema, where)
    if isinstance(schema, list):
        if not isinstance(data, list):
            return [f"{where}: must be a list"]
        problems = [p for i, item in enumerate(data) for p in validate_release(item, schema[0], f"{where}[{i}]")]
        if not where.endswith(".command"):
            return problems + _validate_order(data, where)
        return problems if data else [f"{where}: is empty"]
    if isinstance(data, bool) or not isinstance(data, (str, int)):
        return [f"{where}: must be text or a number, in quotes if it looks like something else"]
    if re.fullmatch(str(schema), str(data)) is None:
        return [f"{where}: {str(data)!r} does not have the form {schema}"]
    return _validate_pattern(str(data), where) if where.endswith(".pattern") else []


def _validate_mapping(data: object, schema: dict[str, Any], where: str) -> list[str]:
    if not isinstance(data, dict):
        return [f"{where or 'the file'}: must be a mapping"]
    prefix = f"{where}." if where else ""
    problems = [f"{prefix}{key}: is missing" for key in schema if key != "*" and key not in data]
    for key, value in data.items():
        wanted = schema.get(key, schema.get("*"))
        if wanted is None:
            problems.append(f"{prefix}{key}: is not known here")
        else:
            problems += validate_release(value, wanted, f"{prefix}{key}")
    return problems + (_validate_order(list(data), where) if "*" in schema else [])


def _validate_order(items: list[Any], where: str) -> list[str]:
    words = [item for item in items if isinstance(item, str)]
    expected = sorted(set(words))
    if words == expected:
        return []
    first = next((word for word, wanted in zip(words, expected, strict=False) if word != wanted), words[-1])
    return [f"{where}: must be sorted and without repeats, see {first!r}"]


def _validate_pattern(pattern: str, where: str) -> list[str]:
    try:
        re.compile(pattern)
    except re.error as error:
        return [f"{where}: {pattern!r} is not a regular expression: {error}"]
    return []


# --- Advisories -----------------------------------------------------------------------------------------------------


def open_advisories(release: Release, acknowledged: Iterable[str]) -> list[dict[str, Any]]:
    """Return the release's critical advisories that the site has not acknowledged by id (or by CVE number)."""
    named = set(acknowledged) - {""}  # not every advisory has a CVE number
    return [
        dict(advisory)
        for advisory in release["advisories"]
        if advisory["severity"] == "critical" and not named & {advisory["id"], advisory["cve"]}
    ]


# --- Adjustments ----------------------------------------------------------------------------------------------------


@dataclass
class Probe:
    """Says whether an address answers from here; asks each address once.

    ``git+https://...`` is asked with git, so that a user's mirror (``insteadOf``), proxy and certificates count;
    anything else with an HTTP HEAD request. ``environment`` is that of the build: its proxy and certificates are used.
    """

    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    seconds: float = PROBE_SECONDS
    _known: dict[str, bool] = field(default_factory=dict)

    def reachable(self, address: str) -> bool:
        """Return True if the address answers within ``seconds``; a refusal of any kind is False."""
        if address not in self._known:
            git = address.startswith("git+")
            self._known[address] = self._git(address[len("git+") :]) if git else self._http(address)
        return self._known[address]

    def _git(self, address: str) -> bool:
        environment = {**self.environment, "GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "true"}
        try:
            # A session of its own: killing git alone would leave its helper waiting for a silent peer.
            asked = subprocess.Popen(
                ["git", "ls-remote", "--quiet", address, "HEAD"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError:
            return False
        try:
            return asked.wait(self.seconds) == 0
        except subprocess.TimeoutExpired:
            os.killpg(asked.pid, signal.SIGKILL)
            asked.wait()
            return False

    def _http(self, address: str) -> bool:
        # The build's proxy, not this process's: a module runs in the environment of whoever logged in.
        proxies = {scheme: url for scheme in ("http", "https") if (url := self.environment.get(f"{scheme}_proxy"))}
        context = ssl.create_default_context(cafile=self.environment.get("SSL_CERT_FILE") or None)
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=context)
        )
        try:
            with opener.open(urllib.request.Request(address, method="HEAD"), timeout=self.seconds):
                return True
        except (OSError, ValueError, http.client.HTTPException):  # urllib's own errors are OSErrors
            return False


def choose_adjustments(
    release: Release, mode: str = "auto", reachable: Callable[[str], bool] | None = None
) -> list[dict[str, Any]]:
    """Return the release's adjustments that are wanted here.

    ``mode``: ``auto`` takes those whose ``when_unreachable`` does not answer, ``always`` all, ``never`` none.
    """
    if mode not in ADJUST_MODES:
        raise ReleaseError(f"dify_source_adjustments: {mode!r} is none of {', '.join(ADJUST_MODES)}")
    if mode == "never":
        return []
    reachable = reachable or Probe().reachable
    return [dict(a) for a in release["adjustments"] if mode == "always" or not reachable(a["when_unreachable"])]


def apply_adjustments(adjustments: Iterable[Mapping[str, Any]], root: str | Path) -> list[str]:
    """Edit the source tree ``root``: all edits or, on the first that does not fit, none. Return the changed files.

    Each edit's ``pattern`` (a regular expression, ``^`` and ``$`` match at lines) must match exactly ``count`` times;
    every match is replaced by ``replacement``, taken literally. Not idempotent on purpose: a tree that was adjusted
    before does not fit, so apply it to a fresh checkout. Raises ReleaseError naming file and pattern.
    """
    root = Path(root)
    texts: dict[str, str] = {}
    for adjustment in adjustments:
        for edit in adjustment["edits"]:
            name = edit["file"]
            what = f"Adjustment {adjustment['name']!r}: {root / name}"
            try:
                text = texts[name] if name in texts else (root / name).read_bytes().decode()
            except (OSError, UnicodeDecodeError) as error:
                raise ReleaseError(f"{what} cannot be read: {error}. {_REMEDY}") from None
            replacement = str(edit["replacement"])
            texts[name], found = re.subn(edit["pattern"], lambda _, new=replacement: new, text, flags=re.MULTILINE)
            if found != int(edit["count"]):
                raise ReleaseError(
                    f"{what}: the pattern {edit['pattern']!r} matches {found} times, not {edit['count']}. {_REMEDY}"
                )
    for name, text in texts.items():
        _write(root / name, text)
    return sorted(texts)


_REMEDY = (
    "Remedy: apply it to an untouched checkout of the release; if this is one, correct the adjustment in "
    "deploy/releases, or set dify_source_adjustments: never where the network reaches everything."
)


def _write(path: Path, text: str) -> None:
    """Replace a file atomically, keeping its mode; a hard link elsewhere (a shared cache) keeps the old content."""
    mode = path.stat().st_mode & 0o777
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def adjustment_notices(adjustments: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return one line an adjustment for the run's summary: what was done and what it means."""
    return [
        f"source adjusted ({a['name']}): {_one_line(a['reason'])} {_one_line(a['consequence'])}" for a in adjustments
    ]


def _one_line(text: str) -> str:
    return " ".join(text.split())
