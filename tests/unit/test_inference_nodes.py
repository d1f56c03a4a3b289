"""Nodes of an engine end together: real processes, without an engine in them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NODE = """
import subprocess, sys, time
from inference import nodes
nodes.watch(int(sys.argv[1]), "127.0.0.1", int(sys.argv[2]))
# As the engine's other processes: of this group, and not ended by its end.
print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
time.sleep(60)
"""
Start = Callable[[int], subprocess.Popen[str]]


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def start(port: int) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def start(rank: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", NODE, str(rank), str(port)]
        node = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(node)
        return node

    yield start
    for node in started:
        if node.poll() is None:
            os.killpg(node.pid, signal.SIGKILL)
        node.communicate()


def child(node: subprocess.Popen[str]) -> int:
    assert node.stdout
    return int(node.stdout.readline())


def ended(pid: int) -> bool:
    """Whether a process of which nobody waits for the end has ended, or does so at once."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def joined(port: int, peers: int) -> None:
    """Wait until so many nodes are connected to rank 0."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        established = [line for line in lines if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "01"]
        if len(established) >= peers:
            time.sleep(0.2)  # until the greeting is read, too
            return
        time.sleep(0.05)
    raise AssertionError("the nodes did not find each other")


@pytest.mark.parametrize("dies", [0, 1, 2])
def test_all_end_when_one_does(start: Start, port: int, dies: int) -> None:
    nodes = [start(rank) for rank in (1, 0, 2)]  # in whatever order
    children = [child(node) for node in nodes]
    joined(port, 2)
    assert [node.poll() for node in nodes] == [None] * 3
    os.killpg(nodes[dies].pid, signal.SIGKILL)
    for index, node in enumerate(nodes):
        if index != dies:
            assert node.wait(10) == -signal.SIGKILL
            assert ended(children[index])


def test_a_stranger_at_the_door_ends_nobody(start: Start, port: int) -> None:
    first, second = start(0), start(1)
    child(first)
    child(second)
    joined(port, 1)
    for greeting in (b"", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(greeting)
    time.sleep(0.5)
    assert (first.poll(), second.poll()) == (None, None)
