"""Bring the plugin daemon's database to its version, and make the site's key for signing plugins."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_migrate import (
    POSTGRES_SPEC,
    Memory,
    MigrationProblem,
    connected,
    make_signing_key,
    run_logged,
)

DOCUMENTATION = r"""
module: plugin_daemon_migrate
short_description: Migrates the plugin daemon's database and makes the site's signing key
description:
  - Runs the daemon's own C(migrate), once a version of the daemon and database.
  - Makes the key pair for signing plugins where there is none. A key that was lost can't be made again - plugins that
    are installed keep working, others must be signed anew.
  - Must run with an interpreter that has psycopg (kit_runtime_python).
options:
  home: {type: path, required: true, description: The kit's folder on the host (kit_home).}
  version: {type: str, required: true, description: The daemon's version.}
  cli: {type: path, required: true, description: The daemon's command line.}
  postgres: {type: dict, required: true, description: "host, port, user, password, database."}
  env_file: {type: str, required: true, description: "The daemon's environment, relative to C(home)."}
  key: {type: path, required: true, description: "The key pair's path, without C(.private.pem) and C(.public.pem)."}
author: [Dify deployment kit]
"""

MEMORY = "plugin_daemon"


def migrate(module: AnsibleModule) -> list[str]:
    """Run the daemon's migration unless the database remembers it; return what was done."""
    home, version = Path(module.params["home"]), module.params["version"]
    with connected(module.params["postgres"]) as connection:
        memory = Memory(connection)
        before = memory.get(MEMORY)
        if before == version:
            return []
        if not module.check_mode:
            exec_ = [str(home / "runtime/bin/kit-exec"), "--env-file", str(home / module.params["env_file"]), "--"]
            run_logged([*exec_, module.params["cli"], "migrate"], home, home / "var/log/migrate.log")
            memory.set(MEMORY, version)
    return [f"the plugin daemon's database migrated from {before or 'empty'} to {version}"]


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "home": {"type": "path", "required": True},
            "version": {"type": "str", "required": True},
            "cli": {"type": "path", "required": True},
            "postgres": {"type": "dict", "required": True, "options": POSTGRES_SPEC},
            "env_file": {"type": "str", "required": True},
            "key": {"type": "path", "required": True, "no_log": False},
        },
        supports_check_mode=True,
    )
    try:
        key, log = Path(module.params["key"]), Path(module.params["home"]) / "var/log/migrate.log"
        done = make_signing_key(module.params["cli"], key, log, check=module.check_mode) + migrate(module)
    except MigrationProblem as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(changed=bool(done), done=done)


if __name__ == "__main__":
    main()
