"""Have a role, its databases and their extensions in a running PostgreSQL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_files import Entry, apply, parse_env, render_env
from ansible.module_utils.kit_postgres import SUPERUSER, Catalog, PostgresProblem

DOCUMENTATION = r"""
module: kit_postgres
short_description: Role, databases and extensions of a running PostgreSQL
description:
  - Needs psycopg; run it with the runtime's interpreter.
  - Passwords are proved by logging in and changed where that fails. The superuser's last working one is kept in
    O(admin_env) (0600), so that a rotated secret is taken over; everything that psql needs is in that file.
options:
  port: {type: int, required: true, description: Where it listens on 127.0.0.1.}
  admin_env: {type: path, required: true, description: Environment file for the superuser, written here.}
  admin_password: {type: str, required: true, description: The superuser's password.}
  role: {type: str, required: true, description: Owner of the databases.}
  password: {type: str, required: true, description: Its password.}
  databases: {type: list, elements: str, required: true, description: Databases of that role.}
  extensions: {type: dict, description: "Database -> list of extensions."}
  connection_limits: {type: dict, description: "Database -> connections that it may have; others share what is left."}
"""


def admin_password(catalog: Catalog, wanted: str, env_file: Path) -> str:
    """Return the superuser's password in force: the wanted one, or the one before."""
    if catalog.accepts(SUPERUSER, wanted):
        return wanted
    try:
        before: str = parse_env(env_file.read_text()).get("PGPASSWORD", "")
    except OSError:
        before = ""
    if before and before != wanted and catalog.accepts(SUPERUSER, before):
        return before
    raise PostgresProblem(
        f"PostgreSQL refuses the superuser's password of this site, and the one in {env_file} too. Remedy: bring back "
        "the secrets.yml that this host was deployed with, or put the password in force into postgres_admin_password."
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "port": {"type": "int", "required": True},
            "admin_env": {"type": "path", "required": True},
            "admin_password": {"type": "str", "required": True, "no_log": True},
            "role": {"type": "str", "required": True},
            "password": {"type": "str", "required": True, "no_log": True},
            "databases": {"type": "list", "elements": "str", "required": True},
            "extensions": {"type": "dict", "default": {}},
            "connection_limits": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    params: dict[str, Any] = module.params
    env_file = Path(params["admin_env"])
    catalog = Catalog({"host": "127.0.0.1", "port": params["port"]}, check=module.check_mode)
    try:
        in_force = admin_password(catalog, params["admin_password"], env_file)
        with catalog.connect(SUPERUSER, in_force, "postgres") as connection:
            if in_force != params["admin_password"]:
                catalog.ensure_password(connection, SUPERUSER, params["admin_password"])
                in_force = in_force if module.check_mode else params["admin_password"]
            catalog.ensure_role(connection, params["role"], params["password"])
            there = [
                database
                for database in params["databases"]
                if catalog.ensure_database(connection, database, params["role"])
            ]
            for database in there:
                catalog.ensure_limit(connection, database, int(params["connection_limits"].get(database, -1)))
        for database in there:
            extensions = params["extensions"].get(database, [])
            if extensions:
                with catalog.connect(SUPERUSER, in_force, database) as connection:
                    catalog.ensure_extensions(connection, database, extensions)
    except PostgresProblem as problem:
        module.fail_json(msg=str(problem))
    admin = {
        "PGHOST": "127.0.0.1",
        "PGPORT": params["port"],
        "PGUSER": SUPERUSER,
        "PGPASSWORD": params["admin_password"],
        "PGDATABASE": "postgres",
    }
    # Last: until here the file holds the password that an interrupted run would need again.
    entry = Entry(env_file, content=render_env(admin).encode(), secret=True, is_env=True)
    written = apply(entry, base=env_file.parent, check=module.check_mode)
    module.exit_json(changed=bool(catalog.changes or written), changes=catalog.changes)


if __name__ == "__main__":
    main()
