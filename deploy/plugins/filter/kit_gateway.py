"""Filters for the role gateway: where it listens, and what the summary says about it; see module_utils/kit_gateway."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ansible.module_utils

# Ansible finds the kit's module_utils for modules only; a filter is imported as it is.
ansible.module_utils.__path__.append(str(Path(__file__).parents[1] / "module_utils"))
from ansible.module_utils import kit_gateway


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"kit_listen": kit_gateway.listen, "kit_exposure": kit_gateway.exposure}
