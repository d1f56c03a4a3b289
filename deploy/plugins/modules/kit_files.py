"""All files of a role in one call. The action plugin of the same name renders; this part writes."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_files import FileProblem, apply, entry_from_dict

DOCUMENTATION = r"""
module: kit_files
short_description: Writes all files of a role in one task
description:
  - Templates and files are read on the controller, and everything is compared and written on the host in one call.
  - Writing is atomic; a file that fails its validation is not written. Missing parent folders are made with mode 0700.
  - Files keep belonging to the user the task runs as.
options:
  base:
    description: Folder that a relative C(dest) starts from; also where validation commands run.
    type: path
    required: true
  files:
    description: Each has C(dest) and one of the kinds below. They are handled in order.
    type: list
    elements: dict
    required: true
    suboptions:
      dest: {type: path, required: true, description: Absolute, or relative to C(base).}
      template: {type: str, description: Name in the role's templates folder.}
      vars: {type: dict, description: More variables for the template.}
      file: {type: str, description: Name in the role's files folder.}
      content: {type: str, description: The content itself.}
      env: {type: dict, description: "KEY='value' lines; None leaves a key out, booleans become true and false."}
      state: {type: str, choices: [file, directory, link, absent], description: What to have there.}
      target: {type: str, description: What a link points to, as written.}
      mode: {type: str, description: "Octal text, default 0600 for files and 0700 for folders."}
      secret: {type: bool, description: The content appears in no diff and no message.}
      validate: {type: list, elements: str, description: "Command that must succeed on the new file (%s)."}
author: [Dify deployment kit]
"""


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "base": {"type": "path", "required": True},
            # Everything in one opaque value: Ansible writes a module's arguments to the host's log, but not this one.
            "payload": {"type": "str", "required": True, "no_log": True},
        },
        supports_check_mode=True,
    )
    base = Path(module.params["base"])
    changes = []
    try:
        for raw in json.loads(zlib.decompress(base64.b64decode(module.params["payload"]))):
            change = apply(entry_from_dict(raw, base), base=base, check=module.check_mode)
            if change:
                changes.append(change)
    except FileProblem as problem:
        module.fail_json(
            msg=str(problem), changed=bool(changes), changed_files=[str(change.dest) for change in changes]
        )
    diff = [
        {
            "before": change.before,
            "after": change.after,
            "before_header": str(change.dest),
            "after_header": str(change.dest),
        }
        for change in changes
    ]
    module.exit_json(
        changed=bool(changes),
        changed_files=[str(change.dest) for change in changes],
        **({"diff": diff} if module._diff else {}),
    )


if __name__ == "__main__":
    main()
