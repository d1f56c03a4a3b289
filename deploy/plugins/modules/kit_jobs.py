"""Start, or look at, long commands on a host; the action plugin of the same name drives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_jobs import detach, last_line, lock, parse_jobs, read_status, tail

DOCUMENTATION = r"""
module: kit_jobs
short_description: Run long commands side by side, with progress, surviving the caller
description:
  - Runs every job whose O(jobs[].creates) is missing, at most O(parallel) at a time.
  - The jobs run in a process of their own. A second call while they run follows them.
options:
  state_dir: {type: path, required: true, description: Folder for the lock and the logs; 0700.}
  parallel: {type: int, default: 3, description: How many jobs may run at a time.}
  jobs:
    type: list
    elements: dict
    required: true
    description: The commands; see the fields below. Neither argv nor environment may hold a secret.
  call: {type: str, choices: [start, poll], default: start, description: Set by the action plugin.}
"""

JOB_SPEC: dict[str, Any] = {
    "name": {"type": "str", "required": True},
    "title": {"type": "str"},
    "argv": {"type": "list", "elements": "str", "required": True},
    "environment": {"type": "dict"},
    "directory": {"type": "path"},
    "creates": {"type": "path", "required": True},
    "after": {"type": "list", "elements": "str"},
}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state_dir": {"type": "path", "required": True},
            "parallel": {"type": "int", "default": 3},
            "jobs": {"type": "list", "elements": "dict", "options": JOB_SPEC, "required": True},
            "call": {"type": "str", "choices": ["start", "poll"], "default": "start"},
        },
        supports_check_mode=True,
    )
    state_dir = Path(module.params["state_dir"])
    try:
        jobs = parse_jobs(module.params["jobs"])
    except ValueError as error:
        module.fail_json(msg=f"kit_jobs: {error}. Remedy: correct the task's list of jobs.")
    for job in jobs:
        job.environment = {key: str(value) for key, value in job.environment.items()}
    pending = [job.name for job in jobs if job.pending]

    if module.params["call"] == "start":
        if not pending or module.check_mode:
            module.exit_json(changed=bool(pending), pending=pending, started=False)
        handle = lock(state_dir)
        if handle is not None:
            detach(jobs, state_dir, module.params["parallel"], handle)
        module.exit_json(changed=True, pending=pending, started=handle is not None)

    handle = lock(state_dir)  # free again when this process ends
    status = read_status(state_dir)
    states = status["jobs"] if status else {}
    module.exit_json(
        changed=False,
        alive=handle is None,
        finished=bool(status and status["finished"]),
        jobs=states,
        last={name: last_line(state_dir / f"{name}.log") for name, s in states.items() if s["state"] == "running"},
        failed_logs={name: tail(state_dir / f"{name}.log") for name, s in states.items() if s["state"] == "failed"},
        runner_log=tail(state_dir / "runner.log"),
        pending=pending,
    )


if __name__ == "__main__":
    main()
