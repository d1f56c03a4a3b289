"""Bring Dify's database to a release's schema, prove it, and make that release the current one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_build import MANIFEST, PARTS
from ansible.module_utils.kit_migrate import (
    POSTGRES_SPEC,
    Memory,
    MigrationProblem,
    as_numbers,
    connected,
    current,
    due_steps,
    heads,
    point_current,
    revisions,
    run_logged,
)

DOCUMENTATION = r"""
module: dify_migrate
short_description: Migrates Dify's database to a release and switches to that release
description:
  - Compares alembic's revision in the database with the heads of the release's migrations. Where they differ it runs
    C(flask upgrade-db) and compares again, as that command ends well without migrating when its lock is held.
  - Then runs the release's upgrade steps, once for a database that comes from an earlier release, and points
    C(current) to the release.
  - Refuses a database that a later release has migrated.
  - Must run with an interpreter that has psycopg (kit_runtime_python).
options:
  home: {type: path, required: true, description: The kit's folder on the host (kit_home).}
  version: {type: str, required: true, description: The release; its parts are installed below C(home/releases).}
  upgrade: {type: dict, required: true, description: "The release file's C(upgrade): C(from) and C(steps)."}
  postgres: {type: dict, required: true, description: "host, port, user, password, database."}
  env_file: {type: str, required: true, description: "Environment of Dify's commands, relative to C(home)."}
  notices: {type: list, elements: str, default: [], description: Passed on to the summary.}
author: [Dify deployment kit]
"""

# upgrade-db's lock in Redis outlives a run that was killed by about a minute.
LOCK_SECONDS = 150
MEMORY = "dify_release"


class Migration:
    """One run for one release."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.home = Path(module.params["home"])
        self.version: str = module.params["version"]
        self.release = self.home / "releases" / self.version
        self.api = self.release / "api"

    def run(self) -> list[str]:
        """Migrate, run the upgrade's steps and switch; return what was done, for people."""
        done: list[str] = []
        graph = revisions(self.api / "migrations/versions")
        wanted = heads(graph)
        with connected(self.module.params["postgres"]) as connection:
            memory = Memory(connection)
            found, came_from = current(connection), memory.get(MEMORY)
            self.refuse_unknown(found - set(graph), came_from)
            if found != wanted:
                done.append(
                    f"database migrated from {', '.join(sorted(found)) or 'empty'} to {', '.join(sorted(wanted))}"
                )
                if self.module.check_mode:
                    return done
                self.upgrade(connection, wanted)
            if came_from != self.version:
                # A database that was empty has nothing to upgrade.
                for step in due_steps(self.module.params["upgrade"]["steps"], came_from) if found else []:
                    done.append(f"upgrade step {step['name']}")
                    if not self.module.check_mode:
                        self.command(self.release / step["directory"], step["command"])
                done.append(f"database is of {self.version}")
                if not self.module.check_mode:
                    memory.set(MEMORY, self.version)
        if point_current(self.home, self.version, check=self.module.check_mode):
            done.append(f"current is {self.version}")
        return done

    def refuse_unknown(self, unknown: set[str], came_from: str | None) -> None:
        """Stop when the database is ahead of this release, or too far behind."""
        if unknown:
            raise MigrationProblem(
                f"Dify's database was migrated by a later release{f' ({came_from})' if came_from else ''}: its "
                f"revision {', '.join(sorted(unknown))} does not exist in {self.version}.\n"
                f"Remedy: deploy that release again (dify_release), or restore the backup made before the upgrade."
            )
        oldest = self.module.params["upgrade"]["from"]
        if came_from and as_numbers(came_from) < as_numbers(oldest):
            raise MigrationProblem(
                f"Dify's database is of {came_from}; {self.version} can be reached from {oldest} or later.\n"
                f"Remedy: set dify_release to {oldest}, `make deploy`, then upgrade from there."
            )

    def upgrade(self, connection: Any, wanted: set[str]) -> None:
        """Run upgrade-db until the database is where the release wants it."""
        end = time.monotonic() + LOCK_SECONDS
        while True:
            said = self.command(self.api, ["flask", "upgrade-db"])
            found = current(connection)
            if found == wanted:
                return
            if "skipped" not in said or time.monotonic() > end:
                raise MigrationProblem(
                    f"`flask upgrade-db` ended well, but the database is at {sorted(found)}, not at {sorted(wanted)}.\n"
                    f"Remedy: see {self.log()}. If it says 'skipped', another migration holds the lock "
                    "db_upgrade_lock in Redis: wait until it has ended, then run again."
                )
            time.sleep(5)

    def command(self, directory: Path, command: list[str]) -> str:
        """Run one of Dify's commands in its environment, which holds secrets and so comes from a file."""
        scripts = directory / ".venv/bin"
        program = scripts / command[0]
        exec_ = [str(self.home / "runtime/bin/kit-exec"), "--env-file", str(self.home / self.module.params["env_file"])]
        path = f"PATH={scripts}:{self.home}/runtime/bin:/usr/local/bin:/usr/bin:/bin"
        return str(run_logged([*exec_, path, "--", str(program), *command[1:]], directory, self.log()))

    def log(self) -> Path:
        """Where Dify's commands have said what."""
        return self.home / "var/log/migrate.log"

    def notices(self) -> list[str]:
        """What the builds want people to know, then the role's own."""
        found: list[str] = []
        for part in PARTS:
            manifest = self.release / part / MANIFEST
            if manifest.exists():
                found += json.loads(manifest.read_text())["notices"]
        return [*dict.fromkeys(found), *self.module.params["notices"]]


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "home": {"type": "path", "required": True},
            "version": {"type": "str", "required": True},
            "upgrade": {"type": "dict", "required": True},
            "postgres": {"type": "dict", "required": True, "options": POSTGRES_SPEC},
            "env_file": {"type": "str", "required": True},
            "notices": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    migration = Migration(module)
    try:
        done = migration.run()
    except MigrationProblem as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(changed=bool(done), done=done, kit_notice=migration.notices())


if __name__ == "__main__":
    main()
