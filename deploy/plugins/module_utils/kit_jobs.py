"""Run a graph of long commands side by side, detached from the caller, with their state on disk.

A build must survive the terminal that started it: the runner is a process of its own, its state is a file that
anybody may read, and a second caller follows the running jobs instead of starting them again.

Files in the state directory: ``lock`` (held while a runner lives), ``status.json``, ``<job>.log``.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

LOG_TAIL_LINES = 25


class JobState(TypedDict):
    """State of one job; times in seconds since the epoch, None while unknown."""

    state: str  # waiting | running | done | failed | present
    rc: int | None
    started: float | None
    ended: float | None


class Status(TypedDict):
    """What ``status.json`` holds."""

    runner: int
    finished: bool
    jobs: dict[str, JobState]


@dataclass
class Job:
    """One command. ``creates`` is the path that proves it was done; the command makes it as its last act."""

    name: str
    argv: list[str]
    creates: str
    title: str = ""
    directory: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)

    @property
    def pending(self) -> bool:
        """Whether the job's result is missing."""
        return not os.path.lexists(self.creates)


def parse_jobs(raw: list[dict[str, Any]]) -> list[Job]:
    """Jobs from task arguments.

    Raises:
        ValueError: a duplicate name, an unknown predecessor or a cycle, with the names.
    """
    jobs = [Job(**{key: value for key, value in job.items() if value is not None}) for job in raw]
    names = [job.name for job in jobs]
    if len(set(names)) != len(names):
        raise ValueError("two jobs have the same name: " + ", ".join(sorted({n for n in names if names.count(n) > 1})))
    for job in jobs:
        unknown = sorted(set(job.after) - set(names))
        if unknown:
            raise ValueError(f"job {job.name} waits for jobs that do not exist: {', '.join(unknown)}")
    done: set[str] = set()
    while len(done) < len(jobs):
        free = [job.name for job in jobs if job.name not in done and set(job.after) <= done]
        if not free:
            raise ValueError("jobs wait for each other: " + ", ".join(sorted(set(names) - done)))
        done.update(free)
    return jobs


def read_status(state_dir: Path) -> Status | None:
    """The state that the last runner wrote, or None."""
    try:
        status: Status = json.loads((state_dir / "status.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return status


def lock(state_dir: Path) -> int | None:
    """Take the runner's lock: its file descriptor, or None when another runner holds it."""
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(state_dir / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def last_line(log: Path) -> str:
    """The last line with text in it that a log shows, at most 160 characters."""
    try:
        with log.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - 4096))
            lines = stream.read().decode(errors="replace").replace("\r", "\n").splitlines()
    except FileNotFoundError:
        return ""
    return next((line.strip()[:160] for line in reversed(lines) if line.strip()), "")


def tail(log: Path, count: int = LOG_TAIL_LINES) -> list[str]:
    """The last lines of a log."""
    try:
        return log.read_text(errors="replace").splitlines()[-count:]
    except FileNotFoundError:
        return []


def run_graph(jobs: list[Job], state_dir: Path, parallel: int, handle: int) -> None:
    """Run the jobs whose result is missing; called in the detached process that holds ``handle``.

    After a failure nothing new starts, but what runs may finish: its work would be lost otherwise.
    """
    states: dict[str, JobState] = {
        job.name: JobState(state="waiting" if job.pending else "present", rc=None, started=None, ended=None)
        for job in jobs
    }
    running: dict[str, subprocess.Popen[bytes]] = {}

    def publish(finished: bool = False) -> None:
        temporary = state_dir / "status.json.new"
        temporary.write_text(json.dumps(Status(runner=os.getpid(), finished=finished, jobs=states)))
        temporary.replace(state_dir / "status.json")

    def ready(job: Job) -> bool:
        return states[job.name]["state"] == "waiting" and all(
            states[name]["state"] in ("done", "present") for name in job.after
        )

    def start(job: Job) -> None:
        with (state_dir / f"{job.name}.log").open("wb") as log:
            try:
                running[job.name] = subprocess.Popen(
                    job.argv,
                    cwd=job.directory,
                    env=job.environment or None,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                log.write(f"cannot start {job.argv[0]}: {error}\n".encode())
                states[job.name] = JobState(state="failed", rc=127, started=time.time(), ended=time.time())
                return
        states[job.name] = JobState(state="running", rc=None, started=time.time(), ended=None)

    publish()
    while True:
        failed = any(state["state"] == "failed" for state in states.values())
        for job in jobs:
            if not failed and len(running) < parallel and ready(job):
                start(job)
        publish()
        if not running:
            break
        for name, process in list(running.items()):
            rc = process.poll()
            if rc is None:
                continue
            del running[name]
            job = next(job for job in jobs if job.name == name)
            if rc == 0 and job.pending:
                with (state_dir / f"{name}.log").open("a") as log:
                    log.write(f"\nThe command ended well but did not make {job.creates}.\n")
                rc = 1
            states[name]["state"] = "failed" if rc else "done"
            states[name]["rc"] = rc
            states[name]["ended"] = time.time()
        time.sleep(0.2)
    publish(finished=True)
    os.close(handle)


def detach(jobs: list[Job], state_dir: Path, parallel: int, handle: int) -> None:
    """Start :func:`run_graph` in a process of its own that outlives this one."""
    # A poll must never read the state of an earlier run.
    (state_dir / "status.json").unlink(missing_ok=True)
    if os.fork():
        return
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if os.fork():
        os._exit(0)
    os.umask(0o077)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    code = 1
    try:
        run_graph(jobs, state_dir, parallel, handle)
        code = 0
    except BaseException as error:  # the last words of a process without a terminal
        (state_dir / "runner.log").write_text(f"{type(error).__name__}: {error}\n")
    finally:
        sys.stdout.flush()
        os._exit(code)
