"""Services of a host as supervisor programs: what is wanted, what runs, and the way from one to the other.

Supervisor itself is the memory: a program's command carries a fingerprint of everything it is started from, so a
difference between its configuration on disk and the one in force (`reloadConfig`) is exactly what must be restarted,
also after a run that was killed between writing and restarting.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import http.client
import os
import re
import shlex
import socket
import subprocess
import time
import urllib.parse
import xmlrpc.client
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ansible.module_utils.kit_files import Change, Entry, apply, parse_env

POLL_SECONDS = 0.05
# A service that has died this often since we started it will not come up by waiting longer.
MAX_DEATHS = 3
ALIVE = ("RUNNING", "STARTING", "BACKOFF", "STOPPING")
# How an error begins that ends a program in Python, Node, Go or PostgreSQL, after what a log puts before each line.
_ERROR = re.compile(r"(?:^|[])] |ERROR )[\w.]*(?:Error|Exception): |\b(?:panic|FATAL|fatal error): ")
_SECRET_NAME = re.compile(r"PASS|SECRET|KEY|TOKEN|CREDENTIAL|URL|URI|DSN")


class ServiceProblem(Exception):
    """Something that a person must mend; the text says what, where and how."""


@dataclasses.dataclass(frozen=True)
class Service:
    """One entry of kit_services; see there."""

    name: str
    state: str = "started"
    command: tuple[str, ...] = ()
    env_file: str = ""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    directory: str = ""
    stop_signal: str = "TERM"
    stop_seconds: int = 10
    priority: int = 50
    files: tuple[str, ...] = ()
    ready: dict[str, Any] = dataclasses.field(default_factory=dict)
    ready_seconds: int = 30
    explain: tuple[str, ...] = ()


class UnixTransport(xmlrpc.client.Transport):
    """XML-RPC over supervisord's unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = str(path)

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        """One connection a call: supervisord may have been restarted in between."""
        return _UnixConnection(self._path)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def fingerprint(service: Service, home: Path) -> str:
    """Changes whenever the process, started now, would read something else than before.

    Covers the content of the env file and of `files`. A folder counts by its real path: a link that is switched to
    another release is a change.
    """
    digest = hashlib.sha256()
    for name in ([service.env_file] if service.env_file else []) + list(service.files):
        path = home / name
        if path.is_dir():
            content = os.path.realpath(path).encode()
        else:
            content = path.read_bytes() if path.exists() else b"(missing)"
        digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def exec_command(home: Path, command: Iterable[str], env_file: str = "", extra: Iterable[str] = ()) -> list[str]:
    """The command behind kit-exec, which gives it a clean environment and keeps secrets out of argv."""
    env = ["--env-file", str(home / env_file)] if env_file else []
    return [str(home / "runtime" / "bin" / "kit-exec"), *extra, *env, "--", *command]


def program_conf(service: Service, home: Path, log_megabytes: int = 10, log_backups: int = 5) -> str:
    """The supervisor configuration of a service.

    Raises:
        ServiceProblem: for text that supervisor's file format cannot carry.
    """
    inputs = ["--service", service.name, "--inputs", fingerprint(service, home)]
    declared = [f"{name}={value}" for name, value in sorted(service.environment.items())]
    command = exec_command(home, service.command, service.env_file, inputs)
    command[command.index("--") : command.index("--")] = declared
    settings = {
        "command": " ".join(_quoted(service.name, part) for part in command),
        "directory": _escaped(service.name, str(home / service.directory)),
        "priority": service.priority,
        "autostart": "true",
        "autorestart": "true",
        "startsecs": 1,
        "startretries": 20,
        "stopsignal": service.stop_signal,
        "stopwaitsecs": service.stop_seconds,
        "killasgroup": "true",
        "redirect_stderr": "true",
        "stdout_logfile": _escaped(service.name, str(log_path(home, service.name))),
        "stdout_logfile_maxbytes": f"{log_megabytes}MB",
        "stdout_logfile_backups": log_backups,
    }
    lines = ["; Written by kit_services: the next deploy undoes changes made here.", f"[program:{service.name}]"]
    return "\n".join(lines + [f"{key} = {value}" for key, value in settings.items()]) + "\n"


def log_path(home: Path, name: str) -> Path:
    """Where a service's output goes."""
    return home / "var" / "log" / f"{name}.log"


def _escaped(name: str, text: str) -> str:
    if re.search(r"[\r\n\0]", text):
        raise ServiceProblem(
            f"The service {name} has a line break in {text!r}. Remedy: put such a value into its env_file."
        )
    return text.replace("%", "%%")


def _quoted(name: str, text: str) -> str:
    """For supervisor's shlex; a quote pair keeps ' ;' and ' #' from being read as the start of a comment."""
    return re.sub(r"([ \t])([;#])", r"\1''\2", shlex.quote(_escaped(name, text)))


class Supervisor:
    """What the kit needs of supervisord under one home."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.rpc: Any = xmlrpc.client.ServerProxy(
            "http://localhost", UnixTransport(home / "var/run/supervisor.sock")
        ).supervisor

    def answers(self) -> bool:
        """Whether supervisord runs and can be talked to."""
        try:
            return bool(self.rpc.getState()["statename"] == "RUNNING")
        except (OSError, xmlrpc.client.Error, http.client.HTTPException):
            return False

    def outdated(self) -> bool:
        """Whether its own configuration was written after it started."""
        conf, pidfile = self.home / "etc/supervisord.conf", self.home / "var/run/supervisord.pid"
        return conf.exists() and pidfile.exists() and conf.stat().st_mtime > pidfile.stat().st_mtime

    def ensure(self) -> bool:
        """Have it running with its present configuration; True if it had to be started."""
        if self.answers():
            if not self.outdated():
                return False
            self._kitctl("stop")
        self._kitctl("supervise")
        return True

    def shutdown(self) -> bool:
        """Stop everything in order, and what a dead supervisord left behind; True if there was anything."""
        return "Everything is stopped" in self._kitctl("stop") if self.anything_runs() else False

    def anything_runs(self) -> bool:
        """Whether supervisord or a process that it once started is alive."""
        return self.answers() or any(_same_process(note) for note in (self.home / "var/run/pids").glob("*"))

    def states(self) -> dict[str, dict[str, Any]]:
        """Every program that supervisord has in force."""
        return {info["name"]: info for info in self.rpc.getAllProcessInfo()}

    def reload(self) -> tuple[set[str], set[str], set[str]]:
        """Programs on disk that are new, changed or gone against those in force. Nothing is applied."""
        try:
            added, changed, removed = self.rpc.reloadConfig()[0]
        except xmlrpc.client.Fault as fault:
            raise ServiceProblem(
                f"supervisord cannot read its configuration: {fault.faultString}\n"
                f"Remedy: remove the file that it names from {self.home}/etc/conf.d and deploy again."
            ) from fault
        return set(added), set(changed), set(removed)

    def stop(self, names: Iterable[str], seconds: float) -> set[str]:
        """Stop side by side and wait; supervisor itself kills what outlives its stop time. Returns what had run."""
        running = {name for name in names if self.states().get(name, {}).get("statename") in ALIVE}
        for name in running:
            self._try(lambda name=name: self.rpc.stopProcess(name, False))  # type: ignore[misc]
        end = time.monotonic() + seconds
        while alive := [name for name in running if self.states().get(name, {}).get("statename") in ALIVE]:
            if time.monotonic() > end:
                raise ServiceProblem(
                    f"{', '.join(alive)} cannot be stopped, not even by KILL. Remedy: look for processes in state D"
                    " (ps -eo pid,stat,cmd): usually a disk or network file system hangs."
                )
            time.sleep(POLL_SECONDS)
        return running

    def drop(self, name: str) -> None:
        """Forget a stopped program."""
        self._try(lambda: self.rpc.removeProcessGroup(name))

    def start(self, name: str) -> None:
        """Take the program as it is on disk into force and start it, without waiting."""
        self._try(lambda: self.rpc.addProcessGroup(name))
        self._try(lambda: self.rpc.startProcess(name, False))

    @staticmethod
    def _try(call: Callable[[], Any]) -> None:
        """Supervisord faults where nothing is to do (already added, started, gone); the result is checked later."""
        with contextlib.suppress(xmlrpc.client.Fault):
            call()

    def _kitctl(self, command: str) -> str:
        path = self.home / "runtime" / "bin" / "kitctl"
        try:
            done = subprocess.run([str(path), command], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        except OSError as error:
            raise ServiceProblem(
                f"{path} cannot run: {error.strerror}. Remedy: deploy with the roles runtime and services first."
            ) from error
        if done.returncode != 0:
            raise ServiceProblem((done.stderr.strip() or done.stdout.strip()) or f"{path} {command} failed.")
        return done.stdout


def _same_process(note: Path) -> bool:
    """Whether the process that kit-exec noted ("pid starttime") still runs."""
    try:
        pid, started = note.read_text().split()
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return False
    return fields[19] == started and fields[0] != "Z"


@dataclasses.dataclass
class Outcome:
    """What a reconciliation did, or with check mode would do."""

    files: list[Change] = dataclasses.field(default_factory=list)
    started: list[str] = dataclasses.field(default_factory=list)
    restarted: list[str] = dataclasses.field(default_factory=list)
    stopped: list[str] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    supervisord: bool = False

    @property
    def changed(self) -> bool:
        """Whether anything was done."""
        return bool(self.files or self.started or self.restarted or self.stopped or self.supervisord)


def reconcile(
    services: list[Service], home: Path, *, check: bool = False, log_megabytes: int = 10, log_backups: int = 5
) -> Outcome:
    """Make the services of the host what they should be, and wait until each one really answers.

    Raises:
        ServiceProblem: naming every service that did not become ready, with the last lines of its log.
    """
    outcome = Outcome()
    supervisor = Supervisor(home)
    wanted = {service.name: service for service in services if service.state == "started"}
    unwanted = {service.name for service in services if service.state != "started"}
    for service in services:
        change = apply(_conf_entry(service, home, log_megabytes, log_backups), base=home, check=check)
        if change:
            outcome.files.append(change)
    up = supervisor.answers()
    # Without services the call is about supervisord itself; only to stop services nobody needs to start it.
    if check or (unwanted and not wanted and not up):
        states = supervisor.states() if up and not supervisor.outdated() else {}
        outcome.started = [
            name for name in wanted if states.get(name, {}).get("statename") not in ("RUNNING", "STARTING")
        ]
        outcome.stopped = [name for name in unwanted if states.get(name, {}).get("statename") in ALIVE]
        outcome.supervisord = bool(wanted or not services) and not (up and not supervisor.outdated())
        return outcome

    log_starts = {name: _size(log_path(home, name)) for name in wanted}
    fresh = supervisor.ensure()
    added, changed, removed = supervisor.reload()
    states = supervisor.states()
    broken = {name for name in wanted if states.get(name, {}).get("statename") not in ("RUNNING", "STARTING")}
    to_restart = (changed | broken) & set(wanted) - added
    had_run = supervisor.stop(
        to_restart | unwanted, 30 + max([service.stop_seconds for service in services], default=0)
    )
    outcome.stopped = sorted(had_run & unwanted)
    outcome.restarted = sorted(had_run & changed & set(wanted))
    for name in changed & set(wanted) | removed & unwanted:
        supervisor.drop(name)
    for name in sorted(to_restart | added & set(wanted), key=lambda name: wanted[name].priority):
        supervisor.start(name)
    restarts = set(outcome.restarted)
    outcome.started = sorted(((to_restart | added) & set(wanted) | (set(wanted) if fresh else set())) - restarts)
    outcome.supervisord = fresh

    problems = []
    with concurrent.futures.ThreadPoolExecutor(max_workers=max(1, len(wanted))) as pool:
        waits = {name: pool.submit(await_ready, service, home, log_starts[name]) for name, service in wanted.items()}
        for name, wait in waits.items():
            try:
                outcome.seconds[name] = round(wait.result(), 1)
            except ServiceProblem as problem:
                problems.append(str(problem))
    if problems:
        raise ServiceProblem("\n".join(problems))
    return outcome


def _conf_entry(service: Service, home: Path, log_megabytes: int, log_backups: int) -> Entry:
    path = home / "etc" / "conf.d" / f"{service.name}.conf"
    if service.state == "started":
        return Entry(path, content=program_conf(service, home, log_megabytes, log_backups).encode())
    if service.state == "absent" or not path.exists():
        return Entry(path, state="absent")
    return Entry(path, content=path.read_bytes())  # stopped for now: it comes back as it was


def await_ready(service: Service, home: Path, log_start: int = 0) -> float:
    """Wait until supervisor calls the service running and its own check passes; returns the seconds it took.

    Raises:
        ServiceProblem: when the time is over, or at once when the service keeps dying.
    """
    rpc = Supervisor(home)
    begun = time.monotonic()
    pids: set[int] = set()
    looked_at = 0
    answer = "no check was made"
    while True:
        info = rpc.rpc.getProcessInfo(service.name)
        if info["pid"]:
            pids.add(info["pid"])
        deaths = len(pids) - (1 if info["pid"] else 0)
        waited = time.monotonic() - begun
        if info["statename"] == "FATAL" or deaths >= MAX_DEATHS:
            said = info["spawnerr"] or info["description"]  # both are blank between two starts
            why = f"keeps dying right after its start{f' ({said})' if said else ''}"
            raise _unready(service, home, log_start, why)
        if deaths > looked_at:
            # A cause that has a name does not go away by trying again, and a start may take minutes.
            if explain(service, home, log_start):
                raise _unready(service, home, log_start, "died right after its start")
            looked_at = deaths
        if info["statename"] in ("RUNNING", "STARTING"):
            answer = check_ready(service.ready, home)
            # RUNNING as well: another program could answer in place of one that has not failed yet.
            if not answer and info["statename"] == "RUNNING":
                return waited
        else:
            answer = f"its state is {info['statename']} ({info['spawnerr'] or info['description']})"
        if waited > service.ready_seconds:
            raise _unready(
                service, home, log_start, f"is not ready after {service.ready_seconds} s: {answer or 'it restarts'}"
            )
        time.sleep(POLL_SECONDS if waited < 2 else 5 * POLL_SECONDS)


def check_ready(ready: dict[str, Any], home: Path) -> str:
    """'' when ready, else what was seen. A check takes 10 s at most."""
    try:
        if ready.get("tcp"):
            socket.create_connection(("127.0.0.1", int(ready["tcp"])), timeout=5).close()
        if ready.get("http"):
            return _check_http(ready)
        if ready.get("command"):
            command = exec_command(home, map(str, ready["command"]), str(ready.get("env_file") or ""))
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=10,
                cwd=home,
            )
            if done.returncode != 0:
                said = (done.stderr.strip() or done.stdout.strip())[-300:]
                return f"{os.path.basename(str(ready['command'][0]))} exits {done.returncode}: {said}"
    except (OSError, http.client.HTTPException, subprocess.TimeoutExpired) as error:
        where = ready.get("http") or ready.get("tcp") or ready["command"][0]
        return f"{where}: {getattr(error, 'strerror', None) or error}"
    return ""


def _check_http(ready: dict[str, Any]) -> str:
    """GET without a proxy: what is asked lies on this host."""
    url = urllib.parse.urlsplit(str(ready["http"]))
    connection = http.client.HTTPConnection(url.hostname or "127.0.0.1", url.port or 80, timeout=10)
    try:
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        connection.request("GET", path, headers={str(k): str(v) for k, v in (ready.get("headers") or {}).items()})
        status = connection.getresponse().status
    finally:
        connection.close()
    wanted = [int(number) for number in ready.get("status") or [200]]
    return "" if status in wanted else f"{ready['http']} answers {status} instead of {' or '.join(map(str, wanted))}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def explain(service: Service, home: Path, log_start: int) -> list[str]:
    """Why a service died, by its own command: what is wrong and the remedy; empty where it doesn't know."""
    if not service.explain:
        return []
    try:
        done = subprocess.run(
            exec_command(home, service.explain),
            input=_log_text(log_path(home, service.name), log_start, 1_000_000),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            cwd=home,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []  # the log's last lines are shown all the same
    said = done.stdout.strip().splitlines()
    return said if done.returncode == 0 and len(said) == 2 else []


def _unready(service: Service, home: Path, log_start: int, why: str) -> ServiceProblem:
    log = log_path(home, service.name)
    secrets = secrets_of(home / service.env_file) if service.env_file else ()
    lines = log_tail(log, log_start, secrets)
    remedy = "mend what the log names, then run the same command again"
    if any("address already in use" in line.lower() for line in lines):
        remedy = "another program holds its port (ss -ltnp shows which): stop that one or choose another port"
    elif any("no space left on device" in line.lower() for line in lines):
        remedy = f"free space on the disk of {home} (df -h), then run the same command again"
    if cause := explain(service, home, log_start):
        why, remedy = f"{why}: {cause[0]}", cause[1]
    shown = "".join(f"\n  | {line}" for line in lines) or "\n  | (it wrote nothing)"
    # What follows from an error can be longer than what is shown, and hides it.
    first = first_error(log, log_start, secrets)
    begun = f"\nIts first error there:\n  | {first}" if first and first not in lines else ""
    return ServiceProblem(
        f"The service {service.name} {why}.{begun}\nThe last lines of {log}:{shown}\n"
        f"Remedy: {remedy}. More: {home}/runtime/bin/kitctl logs {service.name}"
    )


def secrets_of(env_file: Path) -> tuple[str, ...]:
    """Values of an env file that must not be repeated in a message."""
    if not env_file.exists():
        return ()
    values = parse_env(env_file.read_text(errors="replace"))
    return tuple(value for name, value in values.items() if len(value) >= 6 and _SECRET_NAME.search(name.upper()))


def log_tail(log: Path, start: int = 0, secrets: Iterable[str] = (), lines: int = 20) -> list[str]:
    """The last lines that were written after the byte `start`; from the beginning where the log was rotated since."""
    text = _hidden(_log_text(log, start, 20_000), secrets)
    return [line[:400] for line in text.splitlines() if line.strip()][-lines:]


def first_error(log: Path, start: int = 0, secrets: Iterable[str] = ()) -> str:
    """The first line after the byte `start` in which an error speaks; blank where none does."""
    text = _hidden(_log_text(log, start, 1_000_000), secrets)
    return next((line[:400] for line in text.splitlines() if _ERROR.search(line)), "")


def _hidden(text: str, secrets: Iterable[str]) -> str:
    """The text without secrets, also those of several lines."""
    for secret in secrets:
        text = text.replace(secret, "(not shown)")
    return text


def _log_text(log: Path, start: int, size: int) -> str:
    """What was written after the byte `start`, the last `size` bytes of it; all where the log was rotated since."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(start if start <= end else 0, end - size))
        return file.read().decode(errors="replace")
