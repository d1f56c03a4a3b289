"""Writes README's configuration tables from the variables' specifications, so that they cannot disagree.

usage: config_table.py [--write]    without it, only says whether README is up to date (status 1 if not)
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BEGIN = "<!-- configuration: written by deploy/tools/config_table.py -->"
END = "<!-- configuration: end -->"


def options(file: Path) -> dict[str, dict[str, Any]]:
    """The variables that a specification (argument_specs format) describes."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text())["argument_specs"]["main"].get("options", {})
    return found


def cell(text: str) -> str:
    """Text that fits into one cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def value(option: dict[str, Any]) -> str:
    """What stands in the column of the default value."""
    if "default" not in option:
        return "*required*" if option.get("required") else "*generated*" if option.get("no_log") else "*computed*"
    default = option["default"]
    return f"`{cell(default if isinstance(default, str) and default else json.dumps(default))}`"


def effect(option: dict[str, Any]) -> str:
    """The description, and the values where they are a fixed set."""
    words = option.get("description", "")
    text = cell(" ".join(words) if isinstance(words, list) else str(words))
    choices = ", ".join(f"`{choice}`" for choice in option.get("choices", []))
    return f"{text} One of {choices}." if choices else text


def table(variables: dict[str, dict[str, Any]]) -> str:
    """A Markdown table."""
    rows = [f"| `{name}` | {value(option)} | {effect(option)} |" for name, option in variables.items()]
    return "\n".join(["| variable | default | effect |", "|---|---|---|", *rows])


def section() -> str:
    """Everything between the markers: the site's own variables open, each role's folded."""
    parts = [table(options(ROOT / "deploy" / "kit_variables.yml"))]
    for file in sorted(ROOT.glob("roles/*/meta/argument_specs.yml")):
        role = file.parents[1].name
        if found := options(file):
            parts.append(f"<details><summary>{role}: {len(found)} variables</summary>\n\n{table(found)}\n\n</details>")
    return "\n\n".join(parts)


def updated(readme: str) -> str:
    """README's text with the tables as they should be.

    Raises:
        ValueError: the markers are missing.
    """
    head, found, rest = readme.partition(BEGIN)
    _, closed, foot = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"README.md lacks the lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{section()}\n\n{END}{foot}"


def main() -> int:
    """Entry point."""
    text = README.read_text()
    wanted = updated(text)
    if text == wanted:
        return 0
    if "--write" in sys.argv[1:]:
        README.write_text(wanted)
        return 0
    print("README.md's tables are out of date. Remedy: .venv/bin/python deploy/tools/config_table.py --write")
    return 1


if __name__ == "__main__":
    sys.exit(main())
