"""From root to the service user, without a file on the way."""

from __future__ import annotations

import shlex
from typing import Any

from ansible.plugins.become import BecomeBase

DOCUMENTATION = r"""
name: kit_su
short_description: Become another user from root with su
description:
  - Ansible's own C(su) can answer a password prompt, and therefore cannot pipeline; root is never asked for one.
  - With pipelining a task takes half the time, and no module (with its arguments) is written to a disk.
author: [Dify deployment kit]
options:
  become_user:
    description: Whom to become.
    default: root
    ini: [{section: privilege_escalation, key: become_user}]
    vars: [{name: ansible_become_user}]
    keyword: [{name: become_user}]
  become_exe:
    description: The su command.
    default: su
    vars: [{name: ansible_become_exe}]
  become_flags:
    description: Options for su.
    default: ""
    vars: [{name: ansible_become_flags}]
  become_pass:
    description: Not used.
    vars: [{name: ansible_become_password}]
"""


class BecomeModule(BecomeBase):
    """`su USER -c COMMAND`."""

    name = "kit_su"

    def build_become_command(self, cmd: str, shell: Any) -> str:
        """The command that runs `cmd` as the other user."""
        super().build_become_command(cmd, shell)
        if not cmd:
            return cmd
        command = self._build_success_command(cmd, shell)
        user, exe, flags = (self.get_option(name) for name in ("become_user", "become_exe", "become_flags"))
        return " ".join(part for part in (exe, flags, user, "-c", shlex.quote(command)) if part)
