"""The controller's half of kit_preflight: remembers in the site's folder which mirrors were chosen for a host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ansible.module_utils
from ansible.plugins.action import ActionBase

# Ansible finds the kit's module_utils for modules only; an action plugin is imported as it is.
ansible.module_utils.__path__.append(str(Path(__file__).parents[1] / "module_utils"))
from ansible.module_utils import kit_mirrors_file


class ActionModule(ActionBase):
    """See the module kit_preflight."""

    TRANSFERS_FILES = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        arguments = dict(self._task.args)
        mirrors = dict(arguments["mirrors"])
        path, host = Path(mirrors.pop("file")), str(variables["inventory_hostname"])
        arguments["mirrors"] = mirrors | {"recorded": kit_mirrors_file.read(path, host)}
        result |= self._execute_module(module_name="kit_preflight", module_args=arguments, task_vars=variables)
        if result.get("mirrors") and not self._task.check_mode:
            kit_mirrors_file.record(path, host, result["mirrors"])
        return result
