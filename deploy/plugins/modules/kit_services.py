"""Services of a host as supervisor programs: started, restarted when their inputs change, and proved to answer."""

from __future__ import annotations

import http.client
import xmlrpc.client
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_boot import BootHook, BootProblem
from ansible.module_utils.kit_files import FileProblem
from ansible.module_utils.kit_supervisor import Service, ServiceProblem, Supervisor, reconcile

DOCUMENTATION = r"""
module: kit_services
short_description: Runs services under supervisord and waits until they answer
description:
  - Starts supervisord where it does not run, after stopping what a dead one left behind.
  - Starts what does not run, restarts what was started from other inputs (command, environment, env file, files),
    all side by side, and waits until every service passes its check.
  - A service that keeps dying fails at once, with the last lines of its log.
options:
  home: {type: path, required: true, description: The kit's folder on the host (kit_home).}
  supervisord:
    type: str
    choices: [started, stopped]
    default: started
    description: C(stopped) stops all services gracefully, databases last, and supervisord itself.
  boot:
    type: str
    choices: [present, absent]
    description: >-
      Whether the services start when the machine boots - a systemd user unit where systemd runs an instance for the
      user without a login (lingering), else a C(@reboot) line in the user's crontab where cron runs, else only a
      notice of what an administrator can do. Left out, the call does not look at it.
  absent: {type: list, elements: str, default: [], description: Names of services to stop and forget where they exist.}
  notices: {type: list, elements: str, default: [], description: Passed on to the summary.}
  log_megabytes: {type: int, default: 10, description: Size at which a service's log is rotated.}
  log_backups: {type: int, default: 5, description: Rotated logs that are kept.}
  services:
    type: list
    elements: dict
    default: []
    description: The services, see below.
    suboptions:
      name: {type: str, required: true, description: Also names its log and its configuration.}
      state:
        type: str
        choices: [started, stopped, absent]
        default: started
        description: C(stopped) lasts until the next deploy or boot.
      command: {type: list, elements: str, description: Program and arguments. No shell, no secret.}
      env_file: {type: str, description: "File of KEY='value' lines, from kit_files."}
      environment: {type: dict, description: More variables, not secret.}
      directory: {type: str, description: Working folder, relative to home; default home.}
      stop_signal: {type: str, default: TERM, description: Signal for a graceful end.}
      stop_seconds: {type: int, default: 10, description: Time for it before KILL.}
      priority: {type: int, default: 50, description: Order at boot, lowest first; below 30 stops last.}
      files:
        type: list
        elements: str
        description: What the service reads; changed content restarts it. A folder counts by its real path.
      ready:
        type: dict
        description: >-
          One of C(command) (with C(env_file)), C(http) (with C(status) and C(headers)) and C(tcp).
          Without any, running for a second is enough.
      ready_seconds: {type: int, default: 30, description: Time for that.}
      explain:
        type: list
        elements: str
        description: >-
          A command that reads the last start's log from its standard input and prints why the service died, a line
          with what is wrong and one with the remedy, or nothing. A service whose death it explains is not waited for.
author: [Dify deployment kit]
"""

_SERVICE_SPEC: dict[str, Any] = {
    "name": {"type": "str", "required": True},
    "state": {"type": "str", "choices": ["started", "stopped", "absent"], "default": "started"},
    "command": {"type": "list", "elements": "str"},
    "env_file": {"type": "str"},
    "environment": {"type": "dict"},
    "directory": {"type": "str"},
    "stop_signal": {
        "type": "str",
        "default": "TERM",
        "choices": ["TERM", "INT", "QUIT", "HUP", "KILL", "USR1", "USR2"],
    },
    "stop_seconds": {"type": "int", "default": 10},
    "priority": {"type": "int", "default": 50},
    "files": {"type": "list", "elements": "str"},
    "ready": {
        "type": "dict",
        "options": {
            "command": {"type": "list", "elements": "str"},
            "env_file": {"type": "str"},
            "http": {"type": "str"},
            "status": {"type": "list", "elements": "int"},
            "headers": {"type": "dict", "no_log": True},
            "tcp": {"type": "int"},
        },
        "mutually_exclusive": [["command", "http", "tcp"]],
    },
    "ready_seconds": {"type": "int", "default": 30},
    "explain": {"type": "list", "elements": "str"},
}


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "home": {"type": "path", "required": True},
            "supervisord": {"type": "str", "choices": ["started", "stopped"], "default": "started"},
            "boot": {"type": "str", "choices": ["present", "absent"]},
            "absent": {"type": "list", "elements": "str", "default": []},
            "notices": {"type": "list", "elements": "str", "default": []},
            "log_megabytes": {"type": "int", "default": 10},
            "log_backups": {"type": "int", "default": 5},
            "services": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": _SERVICE_SPEC,
                "required_if": [["state", "started", ["command"]]],
            },
        },
        supports_check_mode=True,
    )
    home = Path(module.params["home"])
    result: dict[str, Any] = {}
    notices = list(module.params["notices"])
    try:
        if module.params["supervisord"] == "stopped":
            supervisor = Supervisor(home)
            changed = supervisor.anything_runs() if module.check_mode else supervisor.shutdown()
            changes = []
        else:
            outcome = reconcile(
                [_service(raw) for raw in module.params["services"]]
                + [Service(name, state="absent") for name in module.params["absent"]],
                home,
                check=module.check_mode,
                log_megabytes=module.params["log_megabytes"],
                log_backups=module.params["log_backups"],
            )
            changed, changes = outcome.changed, outcome.files
            result = {name: getattr(outcome, name) for name in ("started", "restarted", "stopped", "seconds")}
        if module.params["boot"]:
            hook = BootHook(home, check=module.check_mode)
            boot = hook.present() if module.params["boot"] == "present" else hook.absent()
            changes = changes + boot.changes
            result |= {"boot": boot.hook}
            notices += boot.notice
    except (ServiceProblem, FileProblem, BootProblem) as problem:
        module.fail_json(msg=str(problem))
    except (OSError, http.client.HTTPException, xmlrpc.client.Error) as error:
        log = home / "var/log/supervisord.log"
        module.fail_json(msg=f"supervisord of {home} broke off: {error}. Remedy: read {log}, then run the same again.")
    if module._diff:
        result["diff"] = [
            {"before": c.before, "after": c.after, "before_header": str(c.dest), "after_header": str(c.dest)}
            for c in changes
        ]
    module.exit_json(changed=bool(changed or changes), kit_notice=notices, **result)


def _service(raw: dict[str, Any]) -> Service:
    """From validated arguments; what was left out has the dataclass's default."""
    given = {key: value for key, value in raw.items() if value is not None}
    for key in ("command", "files", "explain"):
        given[key] = tuple(given.get(key, ()))
    given["environment"] = {str(key): str(value) for key, value in given.get("environment", {}).items()}
    given["ready"] = {key: value for key, value in given.get("ready", {}).items() if value is not None}
    return Service(**given)


if __name__ == "__main__":
    main()
