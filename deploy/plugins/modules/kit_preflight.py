"""Look at a host before anything is written to it."""

from __future__ import annotations

import getpass
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_migrate import POSTGRES_SPEC
from ansible.module_utils.kit_network import hide
from ansible.module_utils.kit_preflight import examine
from ansible.module_utils.kit_report import render

DOCUMENTATION = r"""
module: kit_preflight
short_description: Check that a host can take the kit, and say everything that is in the way
description:
  - Changes nothing. Fails with one list of all problems, each with its place and its remedy.
  - Runs as the connecting user; what the service user may do is tried as that user.
options:
  user: {type: str, required: true, description: The service user; need not exist yet.}
  user_home: {type: path, required: true, description: Its home.}
  home: {type: path, required: true, description: kit_home.}
  cache: {type: path, required: true, description: kit_cache.}
  environment: {type: dict, required: true, description: The environment of builds and downloads.}
  ports: {type: dict, required: true, description: Listeners, name to number.}
  binds: {type: dict, default: {}, description: 'Addresses that services listen on, name to address.'}
  mirrors: {type: dict, required: true, description: 'Named, recorded and known mirrors, see kit_mirrors.Mirrors.'}
  sockets: {type: list, elements: str, default: [], description: The paths of unix sockets.}
  machines: {type: list, elements: str, required: true, description: Processors that parts exist for.}
  glibc: {type: str, required: true, description: The oldest glibc that parts run on.}
  cpu_flags: {type: list, elements: str, default: [], description: Processor features that are needed.}
  python: {type: dict, required: true, description: 'C(version), C(path) named by the site, C(download) address.'}
  services_mb: {type: int, required: true, description: Memory of all services together, in MiB.}
  parts: {type: list, elements: dict, required: true, description: What is built or downloaded; see Part.}
  sandbox: {type: dict, required: true, description: 'C(mode), C(part), C(source); see check_sandbox.'}
  sources: {type: list, elements: dict, required: true, description: Where parts come from; see Source.}
  agent_runtime:
    type: bool
    default: false
    description: Look for what the agent runtime needs; what is missing is returned as C(agent_runtime_lacks).
  docker:
    type: str
    default: ""
    description: >-
      The Compose project's name, where Dify runs in containers or comes from them. The bridge is returned as
      C(docker_bridge).
  docker_builds: {type: bool, default: false, description: Whether images are built there.}
  mode:
    type: str
    required: true
    description: The site's dify_mode. C(has_data) and C(has_vectors) say what an earlier deploy has left in any mode.
  move: {type: bool, default: false, description: Whether the other mode's data is taken along.}
  stores:
    type: dict
    required: true
    description: >-
      C(postgres), C(redis), C(storage) and C(vector), of the kit (what is on the host must fit), of a container or
      external (they are asked); see kit_postgres_cluster and kit_external.
"""

# Each secret is marked by itself: hiding the whole would blank out every "dify" in what the module says.
STORES: dict[str, Any] = {
    "postgres": {
        "type": "dict",
        "required": True,
        "options": {
            **POSTGRES_SPEC,
            "source": {"type": "str", "required": True},
            "version": {"type": "str", "required": True},
            "archive": {"type": "path", "required": True},
            "archive_sha256": {"type": "str", "required": True},
            "databases": {"type": "dict", "required": True},
            "extensions": {"type": "list", "elements": "str", "required": True},
            "newest": {"type": "str", "required": True},
            "connections": {"type": "int", "required": True},
        },
    },
    "redis": {
        "type": "dict",
        "required": True,
        "options": {
            "source": {"type": "str", "required": True},
            "host": {"type": "str", "required": True},
            "port": {"type": "int", "required": True},
            "username": {"type": "str", "required": True},
            "password": {"type": "str", "required": True, "no_log": True},
            "tls": {"type": "bool", "required": True},
            "ca_file": {"type": "path", "required": True},
        },
    },
    "storage": {
        "type": "dict",
        "required": True,
        "options": {
            **{key: {"type": "str"} for key in ("kind", "endpoint", "region", "bucket", "access_key", "address_style")},
            "secret_key": {"type": "str", "no_log": True},
        },
    },
    "vector": {
        "type": "dict",
        "required": True,
        "options": {
            "kind": {"type": "str"},
            "url": {"type": "str"},
            "api_key": {"type": "str", "no_log": True},
            "grpc": {"type": "str"},
        },
    },
}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "user": {"type": "str", "required": True},
            "user_home": {"type": "path", "required": True},
            "home": {"type": "path", "required": True},
            "cache": {"type": "path", "required": True},
            "environment": {"type": "dict", "required": True},
            "ports": {"type": "dict", "required": True},
            "binds": {"type": "dict", "default": {}},
            "mirrors": {"type": "dict", "required": True},
            "sockets": {"type": "list", "elements": "str", "default": []},
            "machines": {"type": "list", "elements": "str", "required": True},
            "glibc": {"type": "str", "required": True},
            "cpu_flags": {"type": "list", "elements": "str", "default": []},
            "python": {"type": "dict", "required": True},
            "services_mb": {"type": "int", "required": True},
            "parts": {"type": "list", "elements": "dict", "required": True},
            "sandbox": {"type": "dict", "required": True},
            "sources": {"type": "list", "elements": "dict", "required": True},
            "agent_runtime": {"type": "bool", "default": False},
            "docker": {"type": "str", "default": ""},
            "docker_builds": {"type": "bool", "default": False},
            "mode": {"type": "str", "required": True},
            "move": {"type": "bool", "default": False},
            "stores": {"type": "dict", "required": True, "options": STORES},
        },
        supports_check_mode=True,
    )
    ports = {name: int(port) for name, port in module.params["ports"].items()}
    parameters = {**module.params, "ports": ports, "environment": hide(module)}
    findings, known = examine(parameters, getpass.getuser())
    if findings.problems:
        module.fail_json(msg=render(findings.problems, "Nothing was changed."))
    module.exit_json(changed=False, kit_notice=findings.notices, **known)


if __name__ == "__main__":
    main()
