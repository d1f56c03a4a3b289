"""Install the tool chain of a host."""

from __future__ import annotations

import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_fetch import FetchError
from ansible.module_utils.kit_network import hide
from ansible.module_utils.kit_runtime import NoPython, Runtime, RuntimeFailure

DOCUMENTATION = r"""
module: kit_runtime
short_description: Install pinned tools, a Python and the servers' virtual environment without root
description:
  - Downloads side by side into the cache, verifies hashes, unpacks, and switches links last.
  - A run with the same inputs looks at a few files only.
  - Python is the one named, else the host's, else one that uv downloads, else the copy O(python_staged).
options:
  home: {type: path, required: true, description: The kit's home; everything goes to C(runtime) in it.}
  cache: {type: path, required: true, description: Downloads are kept in C(downloads) in it.}
  tools: {type: list, elements: str, description: "Beside uv: go, node, pnpm."}
  lock: {type: dict, required: true, description: The pins, tool -> version -> platform -> source, name, hash.}
  versions: {type: dict, description: Which version of a tool where the lock has several.}
  requirements: {type: str, required: true, description: The virtual environment's requirements with hashes.}
  links: {type: dict, description: "Further links: path in runtime -> path in runtime; {machine} is uname -m."}
  python: {type: str, description: An interpreter that the site names.}
  python_version: {type: str, required: true, description: The minor version, 3.12.}
  python_download: {type: str, description: Full version that uv may download; empty forbids it.}
  python_staged: {type: str, description: A copy that root laid ready for this user.}
  python_optional: {type: bool, description: Return C(python_missing) where there is none instead of failing.}
  download_seconds: {type: int, description: How long the download of a Python may take.}
  mirrors: {type: dict, description: "Registry by source: go, npm, pypi, python."}
  environment: {type: dict, description: Environment of every download and command.}
"""

RETURN = r"""
python_missing: {type: str, description: Why no interpreter was found; empty when one was.}
versions: {type: dict, description: Version of every tool.}
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "home": {"type": "path", "required": True},
            "cache": {"type": "path", "required": True},
            "tools": {"type": "list", "elements": "str", "choices": ["go", "node", "pnpm"], "default": []},
            "lock": {"type": "dict", "required": True},
            "versions": {"type": "dict", "default": {}},
            "requirements": {"type": "str", "required": True},
            "links": {"type": "dict", "default": {}},
            "python": {"type": "str", "default": ""},
            "python_version": {"type": "str", "required": True},
            "python_download": {"type": "str", "default": ""},
            "python_staged": {"type": "str", "default": ""},
            "python_optional": {"type": "bool", "default": False},
            "download_seconds": {"type": "int", "default": 180},
            "mirrors": {"type": "dict", "default": {}},
            "environment": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    os.umask(0o022)
    os.environ.update(hide(module))
    try:
        runtime = Runtime(Path(module.params["home"]), module.params)
        changed = not runtime.is_current()
        if changed and not module.check_mode:
            runtime.install()
    except NoPython as failure:
        if not module.params["python_optional"]:
            module.fail_json(msg=str(failure))
        module.exit_json(changed=False, python_missing=str(failure), versions={})
    except (FetchError, RuntimeFailure) as failure:
        module.fail_json(msg=str(failure))
    module.exit_json(changed=changed, python_missing="", versions=runtime.state().get("versions", {}))


if __name__ == "__main__":
    main()
