"""Have PostgreSQL's data on a host, or say why not."""

from __future__ import annotations

import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_postgres import Cluster, PostgresProblem, find_programs, find_tools, unpack

DOCUMENTATION = r"""
module: kit_postgres_cluster
short_description: PostgreSQL's programs, found or unpacked, and its data, initialised once
description:
  - Runs initdb (scram-sha-256, checksums, UTF8, C.UTF-8) beside the final place and renames it.
  - Refuses an empty data folder where a marker says that there was data, and data of another major version.
  - Of an external server, only finds the tools for people (psql, pg_dump).
options:
  home: {type: path, required: true, description: "The kit's home: data in var/postgres, marker in etc."}
  source:
    type: str
    choices: [wheel, system, archive, external]
    default: wheel
    description: Where its programs come from.
  version: {type: str, default: "", description: "Major version; empty: that of the data, else the source's own."}
  archive: {type: path, default: "", description: A tar archive of a whole installation.}
  archive_sha256: {type: str, default: "", description: Its sha256.}
  password: {type: str, required: true, description: The superuser's first password.}
  tls: {type: bool, default: false, description: Whether an external server speaks TLS.}
"""

RETURN = r"""
data: {type: str, description: The data folder.}
bin: {type: str, description: Folder of the programs.}
build: {type: str, description: A file or folder that is another one when the programs are.}
uuid_ossp: {type: str, description: "Where the stand-in for uuid-ossp belongs, without .control; empty for nowhere."}
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "home": {"type": "path", "required": True},
            "source": {"type": "str", "choices": ["wheel", "system", "archive", "external"], "default": "wheel"},
            "version": {"type": "str", "default": ""},
            "archive": {"type": "path", "default": ""},
            "archive_sha256": {"type": "str", "default": ""},
            "password": {"type": "str", "required": True, "no_log": True},
            "tls": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    os.umask(0o077)
    params = module.params
    home = Path(params["home"])
    if params["source"] == "external":
        tools, with_tls = find_tools(home)
        notice = "psql and pg_dump on this host are built without TLS - an administrator can install postgresql-client"
        missed = [notice] if params["tls"] and not with_tls else []
        module.exit_json(changed=False, bin=str(tools), kit_notice=missed)
    archived = (params["archive"], params["archive_sha256"])
    try:
        changed = (
            params["source"] == "archive" and not module.check_mode and unpack(home, Path(archived[0]), archived[1])
        )
        programs = find_programs(home, params["source"], params["version"], *archived)
        cluster = Cluster(home, programs)
        new = not cluster.exists()
        if not module.check_mode:
            if new:
                cluster.initialise(params["password"])
            changed = cluster.mark() or changed
    except PostgresProblem as problem:
        module.fail_json(msg=str(problem))
    stand_in = programs.uuid_ossp() if programs.bin.is_dir() else None
    module.exit_json(
        changed=changed or new,
        data=str(cluster.data),
        bin=str(programs.bin),
        build=str(programs.build),
        uuid_ossp=str(stand_in or ""),
    )


if __name__ == "__main__":
    main()
