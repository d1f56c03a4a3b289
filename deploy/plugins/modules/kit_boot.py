"""Starts the kit's services at boot, by whatever this machine has for it."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_boot import BootHook, BootProblem
from ansible.module_utils.kit_files import FileProblem

DOCUMENTATION = r"""
module: kit_boot
short_description: Starts the services of a kit home when the machine boots
description:
  - A systemd user unit where systemd runs an instance for the user without a login (lingering),
    else a C(@reboot) line in the user's crontab where cron runs, else a notice of what an administrator can do.
  - Changes nothing outside of the user's own unit folder and crontab, and there only its own unit and line.
options:
  home: {type: path, required: true, description: The kit's folder on the host (kit_home).}
  state: {type: str, choices: [present, absent], default: present, description: Whether to have the hook.}
author: [Dify deployment kit]
"""


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "home": {"type": "path", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
    )
    hook = BootHook(Path(module.params["home"]), check=module.check_mode)
    try:
        result = hook.present() if module.params["state"] == "present" else hook.absent()
    except (BootProblem, FileProblem) as problem:
        module.fail_json(msg=str(problem))
    diff = [
        {"before": c.before, "after": c.after, "before_header": str(c.dest), "after_header": str(c.dest)}
        for c in result.changes
    ]
    module.exit_json(
        changed=bool(result.changes),
        hook=result.hook,
        kit_notice=result.notice,
        **({"diff": diff} if module._diff else {}),
    )


if __name__ == "__main__":
    main()
