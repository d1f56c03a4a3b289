"""The controller's half of kit_difypkg: reads the plugin's files and sends them in one call."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

# What tools leave behind is no part of the plugin.
LEFT_OUT = ("__pycache__", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache")


class ActionModule(ActionBase):
    """See the module kit_difypkg for what the arguments mean."""

    _VALID_ARGS = frozenset(("source", "package", "cli", "signing_key", "cache"))
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Reads the folder here, packages and signs it there."""
        super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        if "source" in arguments:
            arguments["payload"] = self._payload(Path(str(arguments.pop("source"))))
        result: dict[str, Any] = self._execute_module(
            module_name="kit_difypkg", module_args=arguments, task_vars=task_vars or {}
        )
        result.pop("invocation", None)
        return result

    @staticmethod
    def _payload(source: Path) -> str:
        if not (source / "manifest.yaml").is_file():
            raise AnsibleActionFail(f"kit_difypkg: {source} holds no manifest.yaml. Remedy: name a plugin's folder.")
        files = {
            str(path.relative_to(source)): base64.b64encode(path.read_bytes()).decode()
            for path in sorted(source.rglob("*"))
            if path.is_file() and not set(path.relative_to(source).parts) & set(LEFT_OUT)
        }
        return base64.b64encode(zlib.compress(json.dumps(files).encode())).decode()
