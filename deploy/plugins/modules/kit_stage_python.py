"""Lay a Python that only root may read ready for the service user."""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import tempfile
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_runtime import STAGING, STAGING_PREFIX, Python, probe

DOCUMENTATION = r"""
module: kit_stage_python
short_description: Copy an interpreter of root's for a user who may not read it
description:
  - Runs as root. It only reads what is root's and writes a fresh folder of its own below C(/var/tmp),
    which it gives to the user when it is complete. It touches and runs nothing of the user's.
  - Interpreter, standard library and headers only, no installed packages.
options:
  python: {type: str, description: An interpreter that the site names; empty looks at root's PATH, pyenv and uv.}
  python_version: {type: str, required: true, description: The minor version, 3.12.}
  user: {type: str, required: true, description: Who gets the copy.}
"""

RETURN = r"""
path: {type: str, description: The copy; empty where root has none either.}
"""

ABANDONED_SECONDS = 3600
UNNEEDED = {"__pycache__", "idlelib", "site-packages", "test", "turtledemo"}


def candidates(python: str, version: str) -> list[str]:
    """Return where root may have an interpreter."""
    if python:
        return [python]
    name = f"python{version}"
    on_path = shutil.which(name)
    home = os.path.expanduser("~root")
    patterns = (
        f"{home}/.pyenv/versions/{version}.*/bin/{name}",
        f"{home}/.local/share/uv/python/cpython-{version}.*/bin/{name}",
    )
    return ([on_path] if on_path else []) + [
        path for pattern in patterns for path in sorted(glob.glob(pattern), reverse=True)
    ]


def copy(python: Python, version: str, user: str) -> str:
    """Copy an interpreter with its library and headers to a folder that belongs to the user."""
    entry = pwd.getpwnam(user)
    staging = Path(tempfile.mkdtemp(dir=STAGING, prefix=STAGING_PREFIX))  # 0700: nobody looks in before it is complete
    prefix, name = Path(python.prefix), f"python{version}"

    def unneeded(folder: str, names: list[str]) -> set[str]:
        del folder
        return {entry for entry in names if entry in UNNEEDED or entry.endswith(".a")}

    (staging / "bin").mkdir()
    (staging / "lib").mkdir()
    shutil.copy2(python.executable, staging / "bin" / name)
    for library in sorted((prefix / "lib").glob(f"lib{name}.so*")):
        shutil.copy2(library, staging / "lib" / library.name, follow_symlinks=False)
    shutil.copytree(prefix / "lib" / name, staging / "lib" / name, symlinks=True, ignore=unneeded)
    (staging / "lib" / name / "site-packages").mkdir()
    shutil.copytree(prefix / "include" / name, staging / "include" / name, symlinks=True)
    for folder, folders, files in os.walk(staging):
        for each in folders + files:
            os.lchown(os.path.join(folder, each), entry.pw_uid, entry.pw_gid)
    os.chown(staging, entry.pw_uid, entry.pw_gid)
    return str(staging)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "python": {"type": "str", "default": ""},
            "python_version": {"type": "str", "required": True},
            "user": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    version = module.params["python_version"]
    for old in STAGING.glob(STAGING_PREFIX + "*"):
        if time.time() - old.lstat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    for command in candidates(module.params["python"], version):
        found = probe(command, version)
        # A system's interpreter needs no copy, and its prefix holds the whole system.
        if isinstance(found, Python) and found.prefix not in ("/", "/usr", "/usr/local"):
            path = "" if module.check_mode else copy(found, version, module.params["user"])
            module.exit_json(changed=True, path=path, source=found.prefix)
    module.exit_json(changed=False, path="")


if __name__ == "__main__":
    main()
