"""Controller's side of kit_jobs: starts the jobs on the host, shows their progress, ends when they end."""

from __future__ import annotations

import time
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

display = Display()

# A person who watches wants a sign of life; a log does not want a thousand lines.
REPORT_SECONDS = 30
POLL_SECONDS = (0.5, 1, 2, 4)


def clock(seconds: float) -> str:
    """``75`` -> ``1:15``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class ActionModule(ActionBase):
    """See the module's documentation."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        del tmp
        arguments = dict(self._task.args)
        titles = {job["name"]: job.get("title") or job["name"] for job in arguments.get("jobs", [])}
        host = (task_vars or {}).get("inventory_hostname", "")
        prefix = "" if host == "localhost" else f"[{host}] "
        seconds: dict[str, float] = {}

        # Twice: a run that followed somebody else's jobs starts what those left undone.
        for _attempt in range(3):
            begun = self._call(arguments, task_vars, call="start")
            if begun.get("failed"):
                return {**result, **begun}
            if not begun["pending"] or self._task.check_mode:
                break
            if not begun["started"]:
                display.display(f"  {prefix}an earlier run's jobs are still at work; following them")
            self._follow(arguments, task_vars, titles, prefix, seconds)
        else:
            raise AnsibleActionFail(
                f"These jobs did not come to an end: {', '.join(begun['pending'])}. "
                f"Remedy: read the logs in {arguments['state_dir']} on the host and run again."
            )
        result["changed"] = bool(seconds) or bool(begun["pending"])
        result["jobs"] = {name: {"ran": name in seconds, "seconds": round(seconds.get(name, 0), 1)} for name in titles}
        return result

    def _call(self, arguments: dict[str, Any], task_vars: dict[str, Any] | None, call: str) -> dict[str, Any]:
        answer: dict[str, Any] = self._execute_module(
            module_name="kit_jobs", module_args={**arguments, "call": call}, task_vars=task_vars
        )
        return answer

    def _follow(
        self,
        arguments: dict[str, Any],
        task_vars: dict[str, Any] | None,
        titles: dict[str, str],
        prefix: str,
        seconds: dict[str, float],
    ) -> None:
        """Poll until the runner ends; prints starts, ends and a sign of life; fails with a failed job's log."""
        seen: dict[str, str] = {}
        polls = 0
        reported = time.monotonic()
        while True:
            time.sleep(POLL_SECONDS[min(polls, len(POLL_SECONDS) - 1)])
            polls += 1
            state = self._call(arguments, task_vars, call="poll")
            if state.get("failed"):
                raise AnsibleActionFail(str(state.get("msg")))
            now = time.time()
            for name, job in state["jobs"].items():
                title = titles.get(name, name)
                took = (job["ended"] or now) - (job["started"] or now)
                if job["state"] != seen.get(name):
                    seen[name] = job["state"]
                    if job["state"] == "running":
                        display.display(f"  {prefix}{title}: started")
                    elif job["state"] == "done":
                        seconds[name] = took
                        display.display(f"  {prefix}{title}: done in {clock(took)}")
                    elif job["state"] == "failed":
                        self._fail(name, title, job, state, arguments)
            if time.monotonic() - reported >= REPORT_SECONDS:
                reported = time.monotonic()
                for name, line in state["last"].items():
                    took = now - (state["jobs"][name]["started"] or now)
                    display.display(f"  {prefix}{titles.get(name, name)}: {clock(took)}  {line}")
            if not state["alive"]:
                if state["jobs"] and not state["finished"]:
                    raise AnsibleActionFail(
                        "The process that ran the jobs was killed (out of memory, or by hand)"
                        f" on {(task_vars or {}).get('inventory_hostname')}: {' '.join(state['runner_log'])}\n"
                        f"Remedy: see the logs in {arguments['state_dir']}; run again, what is done stays done."
                    )
                return

    @staticmethod
    def _fail(name: str, title: str, job: dict[str, Any], state: dict[str, Any], arguments: dict[str, Any]) -> None:
        others = [other for other, s in state["jobs"].items() if s["state"] == "running"]
        killed = "\nSignal 9 means that the system ran out of memory, or somebody killed it." if job["rc"] == -9 else ""
        going_on = f"\nStill at work, the next run follows them: {', '.join(others)}." if others else ""
        log = "\n".join("    " + line for line in state["failed_logs"].get(name, []))
        raise AnsibleActionFail(
            f"{title} failed with exit status {job['rc']}. The end of its log:\n{log}\n"
            f"The whole log: {arguments['state_dir']}/{name}.log{killed}{going_on}\n"
            "Remedy: mend what the log names and run again; finished jobs are not repeated."
        )
