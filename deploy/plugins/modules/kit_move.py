"""A site that Dify's containers have served goes over to source mode, with its data."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_move import MoveProblem, from_containers

DOCUMENTATION = r"""
module: kit_move
short_description: Takes the data of Dify's containers over into source mode
description:
  - Stops the containers, copies their databases and files, counts the rows, and puts what was away to C(var/moved).
  - Does nothing on a host without containers. Before the copy is whole, the containers' data is only read - a move that
    broke off begins again.
  - Needs a running PostgreSQL of the kit's, with its databases. The other way is C(take_over) of kit_compose.
options:
  home: {type: path, required: true, description: The kit's folder on the host (kit_home).}
  version: {type: str, required: true, description: The release that is deployed.}
  databases: {type: list, elements: str, required: true, description: "Dify's, the plugin daemon's, the vectors'."}
author: [Dify deployment kit]
"""


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "home": {"type": "path", "required": True},
            "version": {"type": "str", "required": True},
            "databases": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    want = module.params
    try:
        done = from_containers(Path(want["home"]), want["version"], want["databases"], check=module.check_mode)
    except MoveProblem as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(changed=bool(done), done=done)


if __name__ == "__main__":
    main()
