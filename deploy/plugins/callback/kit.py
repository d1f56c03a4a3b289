"""What a person sees of a run: one line a step with its time, what changed, and failures with their remedy."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = r"""
name: kit
type: stdout
short_description: The kit's terminal output
description:
  - Prints steps (roles), changed tasks and failures; keeps quiet about the rest.
  - Writes what it saw as JSON to the file that KIT_RUN_FILE names, for the summary of C(make deploy).
  - With C(-v) every task is named, with C(-vv) results are shown.
extends_documentation_fragment: default_callback
"""

# After so many seconds without a line, say which task is running and for how long.
QUIET_SECONDS = 20


def clock(seconds: float) -> str:
    """``0.4`` -> ``0.4 s``, ``75`` -> ``1 min 15 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


class CallbackModule(CallbackBase):
    """See DOCUMENTATION."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "kit"

    def __init__(self) -> None:
        super().__init__()
        self.colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.started = time.monotonic()
        self.steps: list[dict[str, Any]] = []
        self.summary: list[str] = []
        self.notices: list[str] = []
        self.failures: list[str] = []
        self.changed = 0
        self.task_name = ""
        self.wants_hosts = True
        self.task_started = time.monotonic()
        self.last_line = time.monotonic()
        threading.Thread(target=self._heartbeat, daemon=True).start()

    # --- printing -------------------------------------------------------------------------------
    def _say(self, text: str, colour: str | None = None) -> None:
        self.last_line = time.monotonic()
        self._display.display(text, color=colour if self.colour else None)

    def _heartbeat(self) -> None:
        while True:
            time.sleep(1)
            now = time.monotonic()
            # kit_jobs prints its own progress through the same display.
            if self.task_name and now - self.last_line >= QUIET_SECONDS and "kit_jobs" not in self.task_name:
                self._say(f"  ... {self.task_name.split('|')[0]}: {clock(now - self.task_started)}")

    # --- steps and tasks ------------------------------------------------------------------------
    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        # The builds of all roles run as one task outside them.
        step = task._role.get_name() if task._role else "builds" if task.action == "kit_jobs" else "site"
        now = time.monotonic()
        if not self.steps or self.steps[-1]["name"] != step:
            self._close_step(now)
            self.steps.append({"name": step, "begun": now, "seconds": 0.0, "changed": 0})
        self.task_name = f"{task.get_name().split(' : ', 1)[-1]}|{task.action}"
        self.task_started = now
        if self._display.verbosity >= 1:
            self._say(f"  - {self.task_name.split('|')[0]}")

    v2_playbook_on_handler_task_start = v2_playbook_on_task_start

    def _close_step(self, now: float) -> None:
        if not self.steps or "begun" not in self.steps[-1]:
            return
        step = self.steps[-1]
        step["seconds"] = round(now - step.pop("begun"), 2)
        changed = f"  {step['changed']} changed" if step["changed"] else ""
        self._say(f"{step['name']:<16}{clock(step['seconds']):>14}{changed}", "green" if not changed else "yellow")

    def v2_playbook_on_play_start(self, play: Any) -> None:
        self.task_name = ""
        self.wants_hosts = bool(play.hosts)

    def v2_playbook_on_no_hosts_matched(self) -> None:
        # A play of hosts that a site need not have (workers) names none where there are none.
        if self.wants_hosts:
            self._say("No host matches. Remedy: the inventory needs a group `kit` with at least one host.", "red")

    # --- results --------------------------------------------------------------------------------
    def _host(self, result: Any) -> str:
        name = result._host.get_name()
        return "" if name == "localhost" else f"[{name}] "

    def _collect(self, values: dict[str, Any]) -> None:
        for key, kept in (("kit_summary", self.summary), ("kit_notice", self.notices)):
            lines: Iterable[str] = values.get(key) or []
            kept.extend(str(line) for line in lines if str(line) not in kept)

    def v2_runner_on_ok(self, result: Any) -> None:
        values = result._result
        self._collect(values)
        for item in values.get("results") or []:
            if isinstance(item, dict):
                self._collect(item)
        if values.get("changed"):
            self.changed += 1
            if self.steps:
                self.steps[-1]["changed"] += 1
            files = values.get("changed_files") or []
            what = f": {', '.join(files[:4])}{' ...' if len(files) > 4 else ''}" if files else ""
            took = time.monotonic() - self.task_started
            self._say(f"  {self._host(result)}changed  {self._task(result)}{what}  ({clock(took)})", "yellow")
        if self._display.verbosity >= 2:
            self._say(self._dump_results(values))

    @staticmethod
    def _task(result: Any) -> str:
        return str(result._task.get_name()).split(" : ", 1)[-1]

    def v2_on_file_diff(self, result: Any) -> None:
        if result._result.get("diff") and result._result.get("changed"):
            diff = self._get_diff(result._result["diff"])
            if diff:
                self._say(diff.rstrip())

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        if ignore_errors:
            return
        values = result._result
        message = str(values.get("msg") or "failed without a message")
        details = [str(values[key]).rstrip() for key in ("module_stderr", "stderr", "exception") if values.get(key)]
        if details and (self._display.verbosity or "MODULE FAILURE" in message or "msg" not in values):
            message += "\n" + "\n".join(details)
        # Of a loop, or of what gathers facts.
        for item in [*(values.get("results") or []), *(values.get("failed_modules") or {}).values()]:
            if isinstance(item, dict) and item.get("failed"):
                message += "\n" + str(item.get("msg"))
        if "module interpreter" in message:
            message += "\nRemedy: install python3 there, or name one in the inventory: ansible_python_interpreter."
        self._fail(f"{self._host(result)}{self._task(result)}", message)

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self._fail(
            f"{self._host(result)}cannot be reached",
            f"{result._result.get('msg')}\nRemedy: check `ssh {result._host.get_name()}` and the inventory.",
        )

    def _fail(self, title: str, message: str) -> None:
        self.failures.append(f"{title}\n{message}")
        self._say(f"\nFAILED  {title}\n" + "\n".join("  " + line for line in message.splitlines()), "red")

    def v2_runner_retry(self, result: Any) -> None:
        values = result._result
        self._say(f"  ... {self._task(result)}: try {values.get('attempts')} of {values.get('retries')}")

    # --- the end --------------------------------------------------------------------------------
    def v2_playbook_on_stats(self, stats: Any) -> None:
        self.task_name = ""
        self._close_step(time.monotonic())
        path = os.environ.get("KIT_RUN_FILE")
        if not path:
            self._say(f"\n{self.changed} changed, {clock(time.monotonic() - self.started)}")
            for line in [*self.summary, *self.notices]:
                self._say(f"  {line}")
            return
        run = {
            "steps": self.steps,
            "changed": self.changed,
            "seconds": round(time.monotonic() - self.started, 1),
            "summary": self.summary,
            "notices": self.notices,
            "failures": self.failures,
        }
        # May name addresses and paths: for the person who ran it only.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
            json.dump(run, stream)
