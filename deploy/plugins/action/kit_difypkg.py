"""The controller's half of kit_difypkg: reads folders, and sends the packages that the host has not packaged yet."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import ansible.module_utils
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

# Ansible finds the kit's module_utils for modules only; an action plugin is imported as it is.
ansible.module_utils.__path__.append(str(Path(__file__).parents[1] / "module_utils"))
from ansible.module_utils.kit_plugin import PackageError, describe

# What tools leave behind is no part of the plugin.
LEFT_OUT = ("__pycache__", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache")


class ActionModule(ActionBase):
    """See the module kit_difypkg for what the arguments mean."""

    _VALID_ARGS = frozenset(("plugins", "marketplace", "cli", "signing_key", "cache"))
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Describes the plugins, and once more with the files that the host asks for."""
        super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        try:
            plugins = [self._described(dict(plugin)) for plugin in arguments["plugins"]]
        except (PackageError, OSError) as error:
            raise AnsibleActionFail(str(error)) from None
        result = self._module({**arguments, "plugins": [wire for wire, _ in plugins]}, task_vars)
        if result.get("needed"):
            folder = self._make_tmp_path()
            sent = []
            for number, (wire, file) in enumerate(plugins):
                if wire.get("sha256") in result["needed"]:
                    wire["sent"] = self._transfer_file(str(file), f"{folder}/{number}.difypkg")
                    sent.append(wire["sent"])
            self._fixup_perms2([folder, *sent])
            result = self._module({**arguments, "plugins": [wire for wire, _ in plugins]}, task_vars)
            self._remove_tmp_path(folder)
        return result

    def _module(self, arguments: dict[str, Any], task_vars: dict[str, Any] | None) -> dict[str, Any]:
        result: dict[str, Any] = self._execute_module(
            module_name="kit_difypkg", module_args=arguments, task_vars=task_vars or {}
        )
        result.pop("invocation", None)
        return result

    def _described(self, plugin: dict[str, Any]) -> tuple[dict[str, str], Path | None]:
        """What the module is told of a plugin, and its file here."""
        if "source" in plugin:
            return {"payload": self._payload(Path(str(plugin["source"])))}, None
        if "file" in plugin:
            file = Path(str(plugin["file"]))
            content = file.read_bytes()
            return {"name": describe(content, str(file))[0], "sha256": hashlib.sha256(content).hexdigest()}, file
        return {"id": str(plugin["id"]), "version": str(plugin["version"])}, None

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
