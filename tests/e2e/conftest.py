"""What the end-to-end tests share: root's rights, the table of times."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.e2e.harness import TIMINGS, WORK


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Last: its images are made of what source mode's tests have left in the cache.
    items.sort(key=lambda item: "test_compose.py" in item.nodeid)
    if os.geteuid() != 0:
        why = "needs root, to make throw-away users: run `sudo make e2e`, or .ci/run in a container"
        for item in items:
            item.add_marker(pytest.mark.skip(reason=why))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if TIMINGS:
        width = max(len(timing.what) for timing in TIMINGS)
        terminalreporter.section("times")
        for timing in TIMINGS:
            terminalreporter.write_line(f"{timing.who:<14} {timing.what:<{width}} {timing.seconds:8.1f} s")
        terminalreporter.write_line(f"Output of every command: {WORK}/log")
