"""The table of public failures is complete, and what it names exists."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ROWS: list[dict[str, Any]] = yaml.safe_load((ROOT / "tests/public_failures.yml").read_text())
# Of the collection: a row may be explained, but not lost.
NUMBERS = [1, 4, 5, 6, 7, 8, 10, 11, 14, 15, 16, 17, 18, 19, 20, 21, 23, 25, 26, 27, 28, 31, 32, 33, 34, 35, 36]
NUMBERS += [39, 40, 43, 44, 45]


def test_no_row_is_lost() -> None:
    assert [row["row"] for row in ROWS] == NUMBERS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["row"]))
def test_a_row_has_its_tests_or_its_reason(row: dict[str, Any]) -> None:
    assert set(row) - {"tests", "elsewhere"} == {"row", "threads", "failure"}
    assert ("tests" in row) != ("elsewhere" in row)
    assert all(row.values())
    for name in row.get("tests", []):
        file, _, test = name.partition("::")
        functions = {
            node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert test in functions, f"{file} has no test {test}"
