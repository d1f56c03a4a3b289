"""Filters for postgresql.conf; the deciding is in module_utils/kit_postgres.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ansible.module_utils

# Ansible finds the kit's module_utils for modules only; a filter is imported as it is.
ansible.module_utils.__path__.append(str(Path(__file__).parents[1] / "module_utils"))
from ansible.module_utils import kit_postgres


def sizes(memory_mb: int, max_connections: int) -> dict[str, str]:
    """``memory | kit_postgres_sizes(connections)``: see ``kit_postgres.settings``."""
    return dict(kit_postgres.settings(int(memory_mb), int(max_connections)))


def lines(settings: Mapping[str, Any]) -> str:
    """``settings | kit_postgres_lines``: the lines of postgresql.conf, sorted."""
    return "".join(f"{name} = {kit_postgres.config_value(settings[name])}\n" for name in sorted(settings))


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"kit_postgres_sizes": sizes, "kit_postgres_lines": lines}
