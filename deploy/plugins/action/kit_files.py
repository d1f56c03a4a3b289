"""The controller's half of kit_files: reads a role's files, renders its templates, sends all in one call."""

from __future__ import annotations

import base64
import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.template import trust_as_template

_KINDS = ("template", "file", "content", "env")
_KEYS = {"dest", "state", "target", "mode", "secret", "validate", "vars", *_KINDS}
_MODE = re.compile(r"0?[0-7]{3,4}\Z")


class ActionModule(ActionBase):
    """See the module kit_files for what the arguments mean."""

    _VALID_ARGS = frozenset(("base", "files"))
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Render everything, then hand over to the module on the host."""
        task_vars = task_vars or {}
        super().run(tmp, task_vars)
        base, files = self._task.args.get("base"), self._task.args.get("files")
        if not isinstance(base, str) or not os.path.isabs(base):
            raise AnsibleActionFail(
                f"kit_files: base must be an absolute path, got {base!r}. Remedy: base: '{{{{ kit_home }}}}'."
            )
        if not isinstance(files, list):
            raise AnsibleActionFail("kit_files: files must be a list. Remedy: see CONTRIBUTING.md, 'kit_files'.")
        wire = [self._entry(raw, task_vars) for raw in files]
        payload = base64.b64encode(zlib.compress(json.dumps(wire, default=str).encode(), 1)).decode()
        result: dict[str, Any] = self._execute_module(
            module_name="kit_files", module_args={"base": base, "payload": payload}, task_vars=task_vars
        )
        result.pop("invocation", None)
        return result

    def _entry(self, raw: Any, task_vars: dict[str, Any]) -> dict[str, Any]:
        """One item of `files`, checked, with its content as base64 (or its env as a dict)."""
        if not isinstance(raw, dict) or not raw.get("dest"):
            raise AnsibleActionFail(
                "kit_files: every item of files is a dict with a dest. Remedy: see CONTRIBUTING.md, 'kit_files'."
            )
        dest = str(raw["dest"])
        state = raw.get("state") or "file"
        kinds = [kind for kind in _KINDS if raw.get(kind) is not None]
        problem = ""
        if unknown := sorted(set(raw) - _KEYS):
            problem = f"does not know {', '.join(unknown)}; it knows {', '.join(sorted(_KEYS))}"
        elif state not in ("file", "directory", "link", "absent"):
            problem = f"does not know the state {state}"
        elif len(kinds) != (1 if state == "file" else 0):
            problem = f"needs exactly one of {', '.join(_KINDS)} for a file, and none otherwise"
        elif state == "link" and not raw.get("target"):
            problem = "needs the target of a link"
        elif raw.get("mode") is not None and not (isinstance(raw["mode"], str) and _MODE.match(raw["mode"])):
            problem = f"""needs its mode as octal text like "0644", got {raw["mode"]!r}"""
        elif isinstance(raw.get("validate"), str):
            problem = "needs validate as a list"
        if problem:
            raise AnsibleActionFail(f"kit_files: {dest} {problem}. Remedy: correct the task in the role.")
        wire = {key: raw[key] for key in ("state", "target", "mode", "secret", "env") if raw.get(key) is not None}
        wire["dest"] = dest
        wire["validate"] = [str(part) for part in raw.get("validate") or []]
        if kinds and kinds != ["env"]:
            wire["content"] = base64.b64encode(self._content(kinds[0], raw, task_vars)).decode()
        return wire

    def _content(self, kind: str, raw: dict[str, Any], task_vars: dict[str, Any]) -> bytes:
        if kind == "content":
            return str(raw["content"]).encode()
        source = self._find_needle("templates" if kind == "template" else "files", raw[kind])
        if kind == "file":
            return Path(source).read_bytes()
        # From here on as ansible.builtin.template does it, so that a template means the same in both.
        places = [*task_vars.get("ansible_search_path", []), self._loader.get_basedir(), os.path.dirname(source)]
        templar = self._templar.copy_with_new_env(
            searchpath=[path for place in places for path in (os.path.join(place, "templates"), place)],
            available_variables={**task_vars, **(raw.get("vars") or {})},
        )
        text = templar.template(
            trust_as_template(self._loader.get_text_file_contents(source)),
            escape_backslashes=False,
            overrides={"trim_blocks": True, "newline_sequence": "\n"},
        )
        return ("" if text is None else str(text)).encode()
