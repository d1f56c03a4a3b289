"""PostgreSQL's sizes and configuration lines; the rest is tested on a real server in tests/integration."""

from __future__ import annotations

import pytest
from ansible.module_utils.kit_postgres import config_value, settings


def megabytes(text: str) -> int:
    assert text.endswith("MB")
    return int(text[:-2])


@pytest.mark.parametrize("memory", [512, 2048, 8192, 24576, 131072, 2_000_000])
@pytest.mark.parametrize("connections", [20, 200, 2000])
def test_sizes_stay_in_bounds(memory: int, connections: int) -> None:
    found = settings(memory, connections)
    assert found["max_connections"] == str(connections)
    assert 128 <= megabytes(found["shared_buffers"]) <= 8192
    assert megabytes(found["shared_buffers"]) <= max(128, memory // 8)
    assert 4 <= megabytes(found["work_mem"]) <= 64
    assert 64 <= megabytes(found["maintenance_work_mem"]) <= 1024


def test_sizes_of_a_common_host() -> None:
    assert settings(24576, 200) == {
        "effective_cache_size": "9216MB",
        "maintenance_work_mem": "384MB",
        "max_connections": "200",
        "shared_buffers": "3072MB",
        "work_mem": "30MB",
    }


@pytest.mark.parametrize(
    ("value", "line"),
    [(True, "on"), (False, "off"), (5, "5"), (1.1, "1.1"), ("4GB", "'4GB'"), ("it's", "'it''s'"), ("0700", "'0700'")],
)
def test_config_value(value: object, line: str) -> None:
    assert config_value(value) == line
