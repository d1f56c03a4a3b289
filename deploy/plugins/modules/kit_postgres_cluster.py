"""Have PostgreSQL's data on a host, or say why not."""

from __future__ import annotations

import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_postgres import Cluster, PostgresProblem

DOCUMENTATION = r"""
module: kit_postgres_cluster
short_description: Initialise PostgreSQL's data, once
description:
  - Runs initdb (scram-sha-256, checksums, UTF8, C.UTF-8) beside the final place and renames it.
  - Refuses an empty data folder where a marker says that there was data, and data of another major version.
options:
  home: {type: path, required: true, description: "The kit's home: data in var/postgres, marker in etc."}
  bin: {type: path, required: true, description: Folder of the server's programs.}
  password: {type: str, required: true, description: The superuser's first password.}
"""

RETURN = r"""
data: {type: str, description: The data folder.}
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "home": {"type": "path", "required": True},
            "bin": {"type": "path", "required": True},
            "password": {"type": "str", "required": True, "no_log": True},
        },
        supports_check_mode=True,
    )
    os.umask(0o077)
    home, bin_folder = Path(module.params["home"]), Path(module.params["bin"])
    if module.check_mode and not bin_folder.is_dir():
        module.exit_json(changed=True, data="")
    try:
        cluster = Cluster(home, bin_folder)
        changed = not cluster.exists()
        if changed and not module.check_mode:
            cluster.initialise(module.params["password"])
        if not module.check_mode:
            changed = cluster.mark() or changed
    except PostgresProblem as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(changed=changed, data=str(cluster.data))


if __name__ == "__main__":
    main()
