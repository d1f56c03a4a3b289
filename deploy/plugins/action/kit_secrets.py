"""Fill the blanks of a site's secrets, on the controller; see module_utils/kit_secrets.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ansible.module_utils
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.plugins.action import ActionBase

# Ansible finds the kit's module_utils for modules only; an action plugin is imported as it is.
ansible.module_utils.__path__.append(str(Path(__file__).parents[1] / "module_utils"))
from ansible.module_utils import kit_secrets
from ansible.module_utils.kit_report import Problem, render

VAULT_HEADER = "$ANSIBLE_VAULT;"


class ActionModule(ActionBase):
    """Writes O(path) where a secret is blank; returns which names it filled, never a value.

    Arguments: ``path`` of the site's secrets file, ``hosts_with_data`` (names of hosts that hold a database).
    """

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset(("path", "hosts_with_data"))

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        variables = task_vars or {}
        path = Path(self._task.args["path"])
        known = [self._known(variables["hostvars"][host]) for host in variables["groups"]["kit"]]
        names = kit_secrets.blanks(known)
        if not names:
            return {"changed": False}
        lost = [name for name in names if name in kit_secrets.BOUND_TO_DATA]
        with_data = list(self._task.args.get("hosts_with_data") or [])
        if lost and with_data:
            raise AnsibleActionFail(render([self._lost(path, lost, with_data)], "Nothing was changed."))
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text.startswith(VAULT_HEADER):
            raise AnsibleActionFail(render([self._vaulted(path, names)], "Nothing was changed."))
        if self._task.check_mode:
            # So that a dry run of a new site can go on; of no use to anybody.
            return {"changed": True, "filled": names, "ansible_facts": dict.fromkeys(names, "made-by-the-real-run")}
        try:
            kit_secrets.write(path, kit_secrets.fill(text, {name: kit_secrets.generate(name) for name in names}))
        except OSError as error:
            problem = Problem(
                f"The site's secrets cannot be written: {error.strerror}.",
                str(path),
                "make the folder writable for you, or run from a checkout of your own.",
            )
            raise AnsibleActionFail(render([problem], "Nothing was changed.")) from None
        return {"changed": True, "filled": names, "changed_files": [path.name]}

    @staticmethod
    def _known(host: Any) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name in kit_secrets.SECRETS:
            try:
                values[name] = host[name]
            except (AnsibleError, KeyError):
                continue
        return values

    @staticmethod
    def _lost(path: Path, names: list[str], hosts: list[str]) -> Problem:
        return Problem(
            f"The data on {', '.join(hosts)} needs secrets that the site no longer has: {', '.join(names)}.",
            str(path),
            "one of these:\n"
            "- put the file back from your copy (and keep mode 0600)\n"
            "- read the values from the services' own files on the host (etc/env/*.env): make recover-secrets\n"
            '- if the data may go: make uninstall ARGS="-e kit_delete_data=yes"',
        )

    @staticmethod
    def _vaulted(path: Path, names: list[str]) -> Problem:
        return Problem(
            f"The encrypted secrets lack {', '.join(names)}.",
            str(path),
            "let the kit fill them in and encrypt again:\n"
            f"  ansible-vault decrypt {path}; make deploy; ansible-vault encrypt {path}",
        )
