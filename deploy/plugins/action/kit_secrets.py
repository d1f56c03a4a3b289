"""Fill the blanks of a site's secrets, on the controller; see module_utils/kit_secrets.py."""

from __future__ import annotations

import base64
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

    Arguments: ``path`` of the site's secrets file, ``hosts_with_data`` (names of hosts that hold a database);
    ``recover_from``: instead of generating, take the values from the env files below this kit_home on the host.
    """

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset(("path", "hosts_with_data", "recover_from"))

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        variables = task_vars or {}
        path = Path(self._task.args["path"])
        known = [self._known(variables["hostvars"][host]) for host in variables["groups"]["kit"]]
        names = kit_secrets.blanks(known)
        if not names:
            return {"changed": False}
        if self._task.args.get("recover_from"):
            return self._recover(path, names, self._task.args["recover_from"], variables)
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

    def _recover(self, path: Path, names: list[str], home: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Fill blanks with what the host's services were given."""
        values: dict[str, str] = {}
        for file_name in kit_secrets.ON_HOST:
            source = f"{home}/etc/env/{file_name}"
            read = self._execute_module("ansible.builtin.slurp", {"src": source}, task_vars=variables)
            if not read.get("failed"):  # a host without Dify has no api.env
                values |= kit_secrets.recover(file_name, base64.b64decode(read["content"]).decode())
        values = {name: value for name, value in values.items() if name in names}
        if not values:
            problem = Problem(
                "None of the missing secrets is on the host.",
                f"{home}/etc/env",
                "put the site's secrets.yml back from your copy.",
            )
            raise AnsibleActionFail(render([problem], "Nothing was changed."))
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text.startswith(VAULT_HEADER):
            raise AnsibleActionFail(render([self._vaulted(path, names)], "Nothing was changed."))
        if not self._task.check_mode:
            kit_secrets.write(path, kit_secrets.fill(text, values))
        notices = [f"recovered {name}" for name in values]
        notices += [
            f"{name} is not kept on the host: add it to {path} yourself" for name in names if name not in values
        ]
        return {"changed": True, "filled": list(values), "changed_files": [path.name], "kit_notice": notices}

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
            "- take them from the services' files on the host: make recover-secrets (the first account's password "
            "is not among them: put it into the file yourself)\n"
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
