"""Write the file of a release of Dify into deploy/releases: from its source what the source defines, the rest kept.

    make release-file VERSION=1.16.0

A new release's file says FILL IN where a person must decide (is there an advisory? which upgrade steps?); the kit
refuses such a file. Run on a release that has a file it brings that file into its one form and its keys up to date.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import yaml

# Run as a script, not as a package: the kit's plugins are a folder of modules.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "plugins"))
from module_utils.kit_release import FILL_IN, SCHEMA, validate_release
from module_utils.kit_release_source import SourceError, read_env_keys, read_source

RELEASES = Path(__file__).resolve().parents[1] / "releases"
DIFY = "https://github.com/langgenius/dify"
DAEMON = "https://github.com/langgenius/dify-plugin-daemon"
SANDBOX = "https://github.com/langgenius/dify-sandbox"
NPM = "https://registry.npmjs.org"

HEADER = """\
# What the kit knows about Dify {version}. README.md beside it explains the parts.
# Written by `make release-file VERSION={version}`; adjustments, advisories, commits and upgrade are a person's.
# yamllint disable rule:line-length
"""
COMMENTS = {
    "dify": "Pinned: a clone whose tag gives another commit is refused (dify_source_verify).",
    "plugin_daemon": "The daemon that this release's Compose file names.",
    "sandbox": "The sandbox that this release's Compose file names.",
    "toolchain": "What the source asks for: go at least this; node, python within its own range; pnpm exactly.",
    "advisories": "Open in this release. A critical one stops the deploy until dify_acknowledged_advisories names it.",
    "upgrade": "The oldest release whose data an upgrade was proved with; steps after the migration of an older one.",
    "postgres": "The newest PostgreSQL that its migrations were seen to work with.",
    "adjustments": "Edits of the source for networks that cannot reach an address (dify_source_adjustments: auto).",
    "gunicorn": "How upstream starts the API; options with their defaults.",
    "celery": "How upstream starts worker and beat; a queue that no worker consumes is a task that waits for ever.",
    "compose": "Services of upstream's Compose file and their images; empty: upstream builds it itself.",
}
ENV_HEADER = """\
# Environment variables that Dify {version} reads, by component. Written by `make release-file VERSION={version}`.
"""


class _Block(str):
    """Text that is shown as it is, in a literal block: regular expressions and what they put in place."""


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if isinstance(value, _Block) and value else ">" if len(value) > 100 and " " in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(value), style=style)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(_Block, _text)


def _ordered(value: Any, schema: Any, key: str = "") -> Any:
    """Bring mappings into the schema's order, others into the alphabet's; mark what is to be shown as a block."""
    if isinstance(value, dict):
        names = [name for name in schema if name in value] if "*" not in schema else sorted(value)
        return {name: _ordered(value[name], schema.get(name, ""), name) for name in names}
    if isinstance(value, list):
        return [_ordered(item, schema[0] if isinstance(schema, list) else "") for item in value]
    return _Block(value) if key in ("pattern", "replacement") else value


def render(data: dict[str, Any], header: str, comments: dict[str, str]) -> str:
    """Return the YAML of a file: the header, then each part under its comment."""
    parts = [header]
    for key, value in data.items():
        comment = f"# {comments[key]}\n" if key in comments else ""
        parts.append(comment + yaml.dump({key: value}, Dumper=_Dumper, width=110, sort_keys=False))
    return "\n".join(parts)


def draft(
    version: str, dify: Path, daemon: Path, known: dict[str, Any], registry: str = NPM
) -> tuple[dict[str, Any], list[str]]:
    """Return the file's data and notes for the person who asked. ``known`` is the release's file so far, or empty."""
    found = read_source(dify, daemon)
    notes: list[str] = []
    data: dict[str, Any] = {
        "adjustments": known.get("adjustments", []),
        "advisories": known.get("advisories", [FILL_IN]),
        "upgrade": known.get("upgrade", {"from": FILL_IN, "steps": [FILL_IN]}),
        "postgres": known.get("postgres", {"newest": FILL_IN}),
        **found,
    }
    for part, repository, path, tag in (
        ("dify", DIFY, dify, version),
        ("plugin_daemon", DAEMON, daemon, found["plugin_daemon"]["tag"]),
    ):
        commit = _git("-C", str(path), "rev-parse", "HEAD")
        pinned = known.get(part, {}).get("commit", commit)
        if pinned != commit:
            notes.append(
                f"{part}.commit: kept; this checkout is {commit} (a mirror with its own history, or a moved tag)"
            )
        data[part] = {"commit": pinned, "repository": known.get(part, {}).get("repository", repository), "tag": tag}
    sandbox, before = data["sandbox"], known.get("sandbox", {})
    sandbox["commit"] = before.get("commit", FILL_IN) if before.get("version") == sandbox["version"] else FILL_IN
    sandbox["repository"] = before.get("repository", SANDBOX)
    pnpm = found["toolchain"]["pnpm"]
    before = known.get("toolchain", {}).get("pnpm", {})
    pnpm["integrity"] = (
        before["integrity"] if before.get("version") == pnpm["version"] else _integrity(pnpm["version"], registry)
    )
    return _ordered(data, SCHEMA), notes


def _integrity(version: str, registry: str) -> str:
    """Return the registry's hash of a version of pnpm."""
    with urllib.request.urlopen(f"{registry.rstrip('/')}/pnpm/{version}", timeout=60) as answer:
        return str(json.load(answer)["dist"]["integrity"])


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def _clone(repository: str, tag: str, folder: Path) -> Path:
    print(f"cloning {repository} {tag} ...", file=sys.stderr)
    _git("clone", "--quiet", "--depth", "1", "--branch", tag, repository, str(folder))
    return folder


def write(version: str, dify: Path | None, daemon: Path | None, releases: Path) -> tuple[list[str], list[str]]:
    """Write ``<version>.yml`` and ``env-keys/<version>.yml``; return notes, and what a person must still do."""
    target = releases / f"{version}.yml"
    known = yaml.safe_load(target.read_text(encoding="utf-8")) if target.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        dify = dify or _clone(DIFY, version, Path(scratch, "dify"))
        tag = read_source(dify)["plugin_daemon"]["tag"]
        daemon = daemon or _clone(DAEMON, tag, Path(scratch, "daemon"))
        data, notes = draft(version, dify, daemon, known, os.environ.get("NPM_CONFIG_REGISTRY", NPM))
        env_keys = read_env_keys(dify, daemon)
    target.write_text(render(data, HEADER.format(version=version), COMMENTS), encoding="utf-8")
    env_target = releases / "env-keys" / f"{version}.yml"
    env_target.parent.mkdir(exist_ok=True)
    env_target.write_text(render(env_keys, ENV_HEADER.format(version=version), {}), encoding="utf-8")
    return notes, [f"{target}: {problem}" for problem in validate_release(data)]


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 1 when something is left to a person."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="a tag of Dify, e.g. 1.16.0")
    parser.add_argument("--checkout", type=Path, help="a checkout of that tag (default: a shallow clone)")
    parser.add_argument("--daemon-checkout", type=Path, help="a checkout of the plugin daemon that belongs to it")
    parser.add_argument("--releases", type=Path, default=RELEASES, help="folder to write to (default: deploy/releases)")
    options = parser.parse_args(arguments)
    try:
        notes, problems = write(options.version, options.checkout, options.daemon_checkout, options.releases)
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(error.cmd)}: {error.stderr.strip()}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the registry does not tell pnpm's hash: {error}", file=sys.stderr)
        return 2
    print("\n".join(notes + problems) or f"{options.version}: nothing left to decide")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
