"""Two engines behind vllm-router, as the role deploys them: load, a killed engine, the figures for Prometheus.

Takes two to three minutes on two cores and 8 GiB of memory.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dashboard
import pytest

from .conftest import REPO, Engine, Home, missing

KEY = "integration-test-key"
MODEL = "smollm2-135m"
PLAY = """
- hosts: localhost
  connection: local
  gather_facts: true
  tasks:
    - ansible.builtin.import_role: {name: inference, tasks_from: prepare, rolespec_validate: false}
    - kit_jobs:
        state_dir: "{{ kit_home }}/var/run/jobs"
        jobs: "{{ inference_router_jobs }}"
    - ansible.builtin.import_role: {name: inference, rolespec_validate: false}
"""


class Replicas:
    """The deployed service: one address, two engines."""

    def __init__(self, home: Home, port: int) -> None:
        self.home = home
        self.url = f"http://127.0.0.1:{port}"
        self.engines = [f"http://127.0.0.1:{port + 1}", f"http://127.0.0.1:{port + 2}"]
        self.metrics = f"http://127.0.0.1:{port + 3}/metrics"

    def ask(self, question: str, tokens: int = 24, *, stream: bool = False, key: str = KEY) -> str:
        """What the service sends back; raises what urllib raises, and EOFError for a stream that breaks off."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": question}], "temperature": 0}
        body |= {"max_tokens": tokens, "min_tokens": tokens, "stream": stream}
        text = self.get("/v1/chat/completions", body, key)
        if stream and not text.rstrip().endswith("data: [DONE]"):
            raise EOFError(text[-200:])
        return text

    def get(self, path: str, body: dict[str, Any] | None = None, key: str = KEY) -> str:
        """The text of an answer."""
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=300) as response:
            return str(response.read().decode())

    def answered(self) -> list[float]:
        """How many questions each engine has answered since it started; 0 for one that is down."""
        counts = []
        for engine in self.engines:
            try:
                with urllib.request.urlopen(f"{engine}/metrics", timeout=10) as response:
                    lines = response.read().decode().splitlines()
            except OSError:
                lines = []
            counts.append(
                sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total"))
            )
        return counts

    def settled(self, condition: Callable[[], bool], seconds: float) -> float:
        """Seconds until the condition held."""
        begin = time.monotonic()
        while not condition():
            assert time.monotonic() - begin < seconds, self.logs()
            time.sleep(0.2)
        return time.monotonic() - begin

    def logs(self) -> str:
        """The end of each service's log."""
        files = sorted((self.home.root / "var/log").glob("inference*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)


class Load:
    """People who ask one question after the other, until told to stop; what came of each, with its times.

    Every second one has the answers streamed.
    """

    def __init__(self, service: Replicas, people: int) -> None:
        self.service = service
        self.over = threading.Event()
        self.good: list[tuple[float, float]] = []
        self.failed: list[tuple[bool, float, str]] = []  # streamed, when asked, why
        self.pool = concurrent.futures.ThreadPoolExecutor(people)
        self.running = [self.pool.submit(self.person, number) for number in range(people)]

    def person(self, number: int) -> None:
        asked, stream = 0, bool(number % 2)
        while not self.over.is_set():
            asked += 1
            begin = time.monotonic()
            try:
                self.service.ask(f"Person {number} asks question {asked}.", stream=stream)
            except (OSError, EOFError, http.client.HTTPException) as error:
                reason = error.read().decode() if isinstance(error, urllib.error.HTTPError) else repr(error)
                self.failed.append((stream, begin, reason))
            else:
                self.good.append((begin, time.monotonic()))

    def stop(self) -> None:
        self.over.set()
        for person in self.running:
            person.result()
        self.pool.shutdown()


def free_ports(count: int) -> int:
    """The first of some neighbouring free ports."""
    for base in range(22900, 32000, count):
        try:
            for port in range(base, base + count):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return base
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def service(engine: Engine, server_venv: Path) -> Iterator[Replicas]:
    root = Path(tempfile.mkdtemp(prefix="kit-", dir="/tmp"))
    home = Home(root, server_venv)
    port = free_ports(4)
    (root / "runtime/bin/uv").symlink_to(Path(sys.executable).with_name("uv"))
    (root / "runtime/bin/python3.12").symlink_to(os.path.realpath(engine.python))
    settings = {
        "kit_home": str(root),
        "kit_cache": str(root / "cache"),
        "kit_become": False,
        "inference_source": str(REPO / "inference"),
        "inference_venv": str(engine.python.parents[1]),
        "inference_weights": str(engine.weights),
        "inference_api_key": KEY,
        "inference_port": port,
        "inference_replicas": 2,
        "inference_replica_port": port + 1,
        "inference_router_metrics_port": port + 3,
        "inference_max_model_len": 512,
        "inference_ready_seconds": 600,
    }
    site = root / "site"
    (site / "group_vars").mkdir(parents=True)
    (site / "group_vars/all.yml").symlink_to(REPO / "deploy/group_vars/all.yml")
    (site / "play.yml").write_text(PLAY)
    (site / "hosts.yml").write_text("kit: {hosts: {localhost: {ansible_connection: local}}}\n")
    program = str(Path(sys.executable).with_name("ansible-playbook"))
    ansible = [program, "-i", str(site / "hosts.yml"), str(site / "play.yml")]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(REPO / "deploy/ansible.cfg"), "LC_ALL": "C.UTF-8"}
    begin = time.monotonic()
    done = subprocess.run([*ansible, "-e", json.dumps(settings)], env=environment, capture_output=True, text=True)
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        print(f"two engines and the router: {time.monotonic() - begin:.0f} s")
        yield Replicas(home, port)
    finally:
        stopped = home.kitctl("stop")
        shutil.rmtree(root)
    assert stopped.returncode == 0, stopped.stderr


def test_one_address_for_both(service: Replicas) -> None:
    assert json.loads(service.get("/v1/models"))["data"][0]["max_model_len"] == 512
    before = service.answered()
    asked = itertools.count()

    def both_answer() -> bool:
        # The router leaves an engine out for some seconds where a busy machine made it miss a health check.
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: service.ask(f"{next(asked)}: what is the capital of France?"), range(16)))
        counts = [now - then for now, then in zip(service.answered(), before, strict=True)]
        print(f"answered: {counts}")
        return min(counts) > 2

    print(f"both engines had answered after {service.settled(both_answer, 60):.0f} s")


@pytest.mark.parametrize("key", ["wrong", ""])
@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/v1/chat/completions", "/list_workers", "/remove_worker?url=http://x", "/workers", "/metrics"],
)
def test_the_key_guards_the_routers_own_doors_too(service: Replicas, path: str, key: str) -> None:
    ask = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
    body = ask if "completions" in path else {} if "remove" in path else None
    with pytest.raises(urllib.error.HTTPError) as refused:
        service.get(path, body, key)
    assert refused.value.code == 401


def test_the_key_is_on_no_command_line_and_in_no_log(service: Replicas) -> None:
    for name in ("inference", "inference-1", "inference-2"):
        assert KEY.encode() not in Path(f"/proc/{service.home.pid(name)}/cmdline").read_bytes()
    assert KEY not in service.logs()


def test_the_benchmark_measures_both_ways(service: Replicas, engine: Engine) -> None:
    """That it runs, not how fast: the figures are for people."""
    command = [str(engine.python), "-m", "inference", "bench", MODEL, f"--weights={engine.weights}"]
    command += [f"--state={service.home.root}/bench", f"--way=engine={service.engines[0]}/v1"]
    command += [f"--way=router={service.url}/v1", "--questions=4", "--question-tokens=16", "--answer-tokens=8"]
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(REPO),
        "VLLM_API_KEY": KEY,
        "HOME": str(service.home.root),
    }
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows == ["way", "---", "engine", "router"]
    assert all(line.endswith("| 0 |") for line in done.stdout.splitlines()[-2:])


def test_a_killed_engine_is_not_missed_and_comes_back(service: Replicas) -> None:
    before = service.answered()
    load = Load(service, 6)
    try:
        service.settled(lambda: len(load.good) >= 6, 300)
        pid = service.home.pid("inference-1")
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        service.settled(lambda: sum(begin > killed for begin, _ in load.good) >= 12, 600)
        back = service.settled(lambda: service.home.pid("inference-1") != pid and service.answered()[0] > 0, 600)
    finally:
        load.stop()
    in_flight = [reason for stream, begin, reason in load.failed if begin <= killed and stream]
    print(
        f"{len(load.good)} answered, the slowest in {max(end - begin for begin, end in load.good):.0f} s; "
        f"{len(in_flight)} broke off; the killed engine answers again {back:.0f} s later; "
        f"{before} -> {service.answered()}"
    )
    # An answer that has begun to stream cannot go on elsewhere; every other question is asked again.
    assert len(in_flight) == len(load.failed), load.failed
    assert len(in_flight) <= 3


def test_has_the_figures_that_the_dashboard_asks_for(service: Replicas) -> None:
    """After the test before: the router has tried again by now."""
    for url, row in (
        (f"{service.engines[0]}/metrics", "Model service (vLLM)"),
        (service.metrics, "Router (vllm-router)"),
    ):
        with urllib.request.urlopen(url, timeout=30) as response:
            text = response.read().decode()
        assert missing(dashboard.asked(dashboard.ROWS[row]), text) == []
    assert Counter(line.split("{")[0] for line in text.splitlines())["vllm_router_worker_health"] == 2
