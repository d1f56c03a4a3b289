"""Filters for the role egress; see module_utils/kit_egress.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ansible.module_utils

# Ansible finds the kit's module_utils for modules only; a filter is imported as it is.
ansible.module_utils.__path__.append(str(Path(__file__).parents[1] / "module_utils"))
from ansible.module_utils import kit_egress


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "kit_egress_command": kit_egress.command,
            "kit_egress_notices": kit_egress.notices,
            "kit_plugin_network": kit_egress.plugin_network,
        }
