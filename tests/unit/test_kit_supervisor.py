"""kit_services: the configuration it writes and the words it finds, without a supervisord (see tests/integration)."""

from __future__ import annotations

import configparser
import http.server
import shlex
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible.module_utils.kit_files import render_env
from ansible.module_utils.kit_supervisor import (
    Service,
    ServiceProblem,
    check_ready,
    explain,
    fingerprint,
    first_error,
    log_tail,
    program_conf,
    secrets_of,
)


def command_of(conf: str) -> list[str]:
    """The command as supervisor reads it: its parser drops inline comments, expands %% and splits like a shell."""
    parser = configparser.RawConfigParser(inline_comment_prefixes=(";", "#"))
    parser.read_string(conf)
    return shlex.split(parser["program:s"]["command"] % {})


@pytest.mark.parametrize(
    "argument", ["a b", "it's", 'say "x"', "100%", "a ;b", "x #y", "\\d+\\", '{"a": [1, ";"]}', "", "ü", "a\t;b"]
)
def test_any_argument_reaches_the_program_unchanged(tmp_path: Path, argument: str) -> None:
    conf = program_conf(Service("s", command=("/bin/x", argument), environment={"A": argument}), tmp_path)
    command = command_of(conf)
    assert command[-2:] == ["/bin/x", argument]
    assert f"A={argument}" in command


def test_a_line_break_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ServiceProblem, match="Remedy: put such a value into its env_file"):
        program_conf(Service("s", command=("x", "a\nb")), tmp_path)


def test_the_configuration_holds_no_secret(tmp_path: Path) -> None:
    (tmp_path / "x.env").write_text(render_env({"PASSWORD": "s3cret-value"}))
    assert "s3cret" not in program_conf(Service("s", command=("x",), env_file="x.env"), tmp_path)


def test_fingerprint_follows_every_input(tmp_path: Path) -> None:
    service = Service("s", command=("x",), env_file="x.env", files=("conf", "current"))
    seen = {fingerprint(service, tmp_path)}  # nothing is there yet
    for name in ("x.env", "conf"):
        for text in ("1", "2"):
            (tmp_path / name).write_text(text)
            seen.add(fingerprint(service, tmp_path))
    for release in ("r1", "r2"):
        (tmp_path / release).mkdir()
        (tmp_path / "current").unlink(missing_ok=True)
        (tmp_path / "current").symlink_to(release)
        seen.add(fingerprint(service, tmp_path))
    assert len(seen) == 7
    assert fingerprint(service, tmp_path) in seen


def test_log_tail_starts_where_this_start_began(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert log_tail(log) == []
    log.write_text("old\n")
    start = log.stat().st_size
    with log.open("a") as file:
        file.write("\n".join(f"new {number}" for number in range(30)) + "\n\n")
    assert log_tail(log, start) == [f"new {number}" for number in range(10, 30)]
    log.write_text("rotated\n")
    assert log_tail(log, 10_000) == ["rotated"]


def test_the_first_error_is_found_where_it_speaks(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert first_error(log) == ""
    log.write_text("OSError: of the start before\n")
    start = log.stat().st_size
    assert first_error(log, start) == ""
    with log.open("a") as file:
        file.write("Few file descriptors: this can cause errors like `OSError: too many open files`\n")
        file.write("Traceback (most recent call last):\n    raise ValueError('x is 1')\n")
        file.write("(Worker pid=1) ERROR 11-25 13:11:34 [core.py:953] MemoryError: for s3cret\nKeyError: 1\n")
        file.write("follows\n" * 5000)
    found = first_error(log, start, ("s3cret",))
    assert found == "(Worker pid=1) ERROR 11-25 13:11:34 [core.py:953] MemoryError: for (not shown)"


def test_log_tail_hides_the_env_files_secrets(tmp_path: Path) -> None:
    env = tmp_path / "x.env"
    env.write_text(render_env({"DB_PASSWORD": "pa'ss-word", "DB_URL": "postgres://u:pw@h/d", "MODE": "production"}))
    log = tmp_path / "x.log"
    log.write_text("connect with pa'ss-word to postgres://u:pw@h/d in production\n")
    assert log_tail(log, secrets=secrets_of(env)) == ["connect with (not shown) to (not shown) in production"]


def test_a_death_is_explained_by_the_services_own_command(tmp_path: Path) -> None:
    kit_exec = tmp_path / "runtime/bin/kit-exec"
    kit_exec.parent.mkdir(parents=True)
    kit_exec.write_text('#!/bin/sh\nshift\nexec "$@"\n')
    kit_exec.chmod(0o755)
    log = tmp_path / "var/log/s.log"
    log.parent.mkdir(parents=True)
    log.write_text("old: no memory\n")
    start = log.stat().st_size
    with log.open("a") as file:
        file.write(f"new: {'x' * 5000} no disk\n")
    command = ("sed", "-n", r"s/.*\(old\|new\).*no \(.*\)/there is no \2\nmore \2/p")
    assert explain(Service("s", explain=command), tmp_path, start) == ["there is no disk", "more disk"]
    assert explain(Service("s", explain=("false",)), tmp_path, start) == []
    assert explain(Service("s", explain=("/nonexistent",)), tmp_path, start) == []
    assert explain(Service("s"), tmp_path, start) == []


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers 200 only with the right header."""

    def do_GET(self) -> None:
        self.send_response(200 if self.headers["X-Key"] == "k" and self.path == "/h?a=1" else 401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def port() -> Iterator[int]:
    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_http_check(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    url = f"http://127.0.0.1:{port}/h?a=1"
    assert check_ready({"http": url, "headers": {"X-Key": "k"}}, tmp_path) == ""
    assert check_ready({"http": url}, tmp_path) == f"{url} answers 401 instead of 200"
    assert check_ready({"http": url, "status": [401, 200]}, tmp_path) == ""


def test_tcp_check(port: int, tmp_path: Path) -> None:
    assert check_ready({"tcp": port}, tmp_path) == ""
    assert check_ready({"tcp": 1}, tmp_path) == "1: Connection refused"
