"""kit_jobs with real commands in real, detached processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.kit_jobs import Job, Status, detach, last_line, lock, parse_jobs, read_status, tail


def shell(tmp_path: Path, name: str, script: str, after: list[str] | None = None) -> Job:
    creates = tmp_path / f"{name}.done"
    return Job(name, ["/bin/sh", "-c", f"{script} && touch {creates}"], str(creates), after=after or [])


def begin(jobs: list[Job], state: Path, parallel: int = 3) -> None:
    handle = lock(state)
    assert handle is not None
    detach(jobs, state, parallel, handle)
    os.close(handle)  # the module ends here; the runner keeps its own copy


def wait(state: Path, until: Callable[[Status], bool], seconds: float = 20) -> Status:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        status = read_status(state)
        if status and until(status):
            return status
        time.sleep(0.05)
    raise AssertionError(f"not reached within {seconds} s: {read_status(state)}")


def test_jobs_run_side_by_side_and_in_order(tmp_path: Path) -> None:
    jobs = [
        shell(tmp_path, "web", "sleep 1"),
        shell(tmp_path, "api", "sleep 1"),
        shell(tmp_path, "after", f"test -e {tmp_path}/web.done", after=["web"]),
    ]
    begin(jobs, tmp_path / "state")
    status = wait(tmp_path / "state", lambda s: s["finished"])
    assert {job["state"] for job in status["jobs"].values()} == {"done"}
    starts = {name: job["started"] or 0 for name, job in status["jobs"].items()}
    assert abs(starts["web"] - starts["api"]) < 0.9
    assert starts["after"] >= (status["jobs"]["web"]["ended"] or 0)


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "web.done").touch()
    begin([shell(tmp_path, "web", "false")], tmp_path / "state")
    assert wait(tmp_path / "state", lambda s: s["finished"])["jobs"]["web"]["state"] == "present"


def test_failure_stops_new_jobs_but_lets_running_ones_finish(tmp_path: Path) -> None:
    jobs = [
        shell(tmp_path, "bad", "echo out of luck; exit 3"),
        shell(tmp_path, "long", "sleep 1"),
        shell(tmp_path, "next", "true", after=["bad"]),
    ]
    begin(jobs, tmp_path / "state")
    states = wait(tmp_path / "state", lambda s: s["finished"])["jobs"]
    assert (states["bad"]["state"], states["bad"]["rc"]) == ("failed", 3)
    assert states["long"]["state"] == "done"
    assert states["next"]["state"] == "waiting"
    assert tail(tmp_path / "state/bad.log") == ["out of luck"]


def test_success_without_the_promised_file_is_a_failure(tmp_path: Path) -> None:
    begin([Job("liar", ["/bin/true"], str(tmp_path / "never"))], tmp_path / "state")
    assert wait(tmp_path / "state", lambda s: s["finished"])["jobs"]["liar"]["state"] == "failed"
    assert "did not make" in last_line(tmp_path / "state/liar.log")


def test_a_command_that_cannot_start_is_named(tmp_path: Path) -> None:
    begin([Job("gone", ["/no/such/tool"], str(tmp_path / "never"))], tmp_path / "state")
    assert wait(tmp_path / "state", lambda s: s["finished"])["jobs"]["gone"]["rc"] == 127
    assert "/no/such/tool" in last_line(tmp_path / "state/gone.log")


def test_one_runner_at_a_time_and_its_death_frees_the_lock(tmp_path: Path) -> None:
    state = tmp_path / "state"
    begin([shell(tmp_path, "long", "sleep 30")], state)
    status = wait(state, lambda s: s["jobs"]["long"]["state"] == "running")
    assert lock(state) is None
    os.kill(status["runner"], signal.SIGKILL)
    deadline = time.monotonic() + 5
    while (handle := lock(state)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert handle is not None
    os.close(handle)
    after = read_status(state)
    assert after is not None
    assert not after["finished"]


@pytest.mark.parametrize(
    ("jobs", "complaint"),
    [
        ([{"name": "a"}, {"name": "a"}], "same name: a"),
        ([{"name": "a", "after": ["b"]}], "do not exist: b"),
        ([{"name": "a", "after": ["b"]}, {"name": "b", "after": ["a"]}], "wait for each other: a, b"),
    ],
)
def test_an_impossible_graph_is_refused(jobs: list[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_jobs([{"argv": ["true"], "creates": "/x", **job} for job in jobs])


def test_last_line_is_the_last_with_text(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\nProgress 10%\rProgress 20%\r\n\n")
    assert last_line(log) == "Progress 20%"
    assert last_line(tmp_path / "none") == ""
