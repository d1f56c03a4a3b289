"""kit_services and kitctl with a real supervisord and real processes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import time
import urllib.request
from pathlib import Path

import pytest
from ansible.module_utils.kit_files import render_env
from ansible.module_utils.kit_supervisor import (
    Outcome,
    Service,
    ServiceProblem,
    Supervisor,
    program_conf,
    reconcile,
)

from .conftest import Home

# Answers with its environment and pid; notes the signal that ended it, after a moment of work.
SERVER = """
import http.server, json, os, signal, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"pid": os.getpid(), "environment": dict(os.environ), "cwd": os.getcwd()}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass  # the pipe of a dead supervisord would break

def ended(number, frame):
    time.sleep(0.2)
    with open("ended", "a") as file:
        file.write(f"{sys.argv[2]} {signal.Signals(number).name}\\n")
    sys.exit(0)

signal.signal(signal.SIGTERM, ended)
signal.signal(signal.SIGINT, ended)
print("serving", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
SECRET = "s3cret 'with' \"quotes\" $HOME\nand a second line"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclasses.dataclass
class Web:
    """A service that answers over HTTP."""

    home: Home
    name: str = "web"
    port: int = dataclasses.field(default_factory=free_port)

    def service(self, **changes: object) -> Service:
        root = self.home.root
        (root / "server.py").write_text(SERVER)
        env = root / f"etc/env/{self.name}.env"
        if not env.exists():
            env.write_text(render_env({"PASSWORD": SECRET}))
        service = Service(
            self.name,
            command=(str(self.home.python), str(root / "server.py"), str(self.port), self.name),
            env_file=f"etc/env/{self.name}.env",
            environment={"COLOUR": "green"},
            directory="var",
            ready={"http": f"http://127.0.0.1:{self.port}/"},
        )
        return dataclasses.replace(service, **changes)

    def ask(self) -> dict[str, object]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=5) as answer:
            result: dict[str, object] = json.load(answer)
            return result

    def endings(self) -> list[str]:
        path = self.home.root / "var" / "ended"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def web(home: Home) -> Web:
    return Web(home)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def until(condition: object, seconds: float = 15) -> None:
    """Poll: what is waited for happens in other processes."""
    end = time.monotonic() + seconds
    assert callable(condition)
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_starts_in_a_clean_environment_with_secrets_out_of_sight(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_THE_CALLER", "x")
    outcome = reconcile([web.service()], web.home.root)
    assert (outcome.started, outcome.restarted, outcome.changed) == (["web"], [], True)
    answer = web.ask()
    environment = answer["environment"]
    assert isinstance(environment, dict)
    assert environment["PASSWORD"] == SECRET
    assert environment["COLOUR"] == "green"
    assert set(environment) - {"LC_CTYPE"} == {"PATH", "HOME", "USER", "LOGNAME", "LANG", "PASSWORD", "COLOUR"}
    assert answer["cwd"] == str(web.home.root / "var")
    assert "s3cret" not in Path(f"/proc/{answer['pid']}/cmdline").read_text()
    for path in (web.home.root / "etc/conf.d").iterdir():
        assert "s3cret" not in path.read_text()
        assert path.stat().st_mode & 0o077 == 0
    assert (web.home.root / "var/log/web.log").stat().st_mode & 0o077 == 0
    assert (web.home.root / "var/run/supervisor.sock").stat().st_mode & 0o077 == 0


def test_second_run_changes_nothing_and_is_quick(web: Web) -> None:
    reconcile([web.service()], web.home.root)
    pid = web.ask()["pid"]
    begun = time.monotonic()
    assert reconcile([web.service()], web.home.root).changed is False
    assert time.monotonic() - begun < 2  # 0.02 s on a quiet machine
    assert web.ask()["pid"] == pid


def test_restarts_exactly_what_was_started_from_other_inputs(home: Home) -> None:
    one, two = Web(home, "one"), Web(home, "two")
    (home.root / "conf").write_text("1")

    def services() -> list[Service]:
        return [one.service(files=("conf",)), two.service()]

    reconcile(services(), home.root)
    two_pid = two.ask()["pid"]

    (home.root / "conf").write_text("2")
    assert reconcile(services(), home.root).restarted == ["one"]
    (home.root / "etc/env/one.env").write_text(render_env({"PASSWORD": "other"}))
    assert reconcile(services(), home.root).restarted == ["one"]
    environment = one.ask()["environment"]
    assert isinstance(environment, dict)
    assert environment["PASSWORD"] == "other"
    assert one.endings() == ["one SIGTERM"] * 2
    assert two.ask()["pid"] == two_pid


@pytest.mark.parametrize("applied", [False, True])
def test_a_run_killed_before_the_restart_is_made_up_for(web: Web, applied: bool) -> None:
    reconcile([web.service()], web.home.root)
    new = web.service(environment={"COLOUR": "blue"})
    (web.home.root / "etc/conf.d/web.conf").write_text(program_conf(new, web.home.root))
    if applied:  # killed between stopping and starting
        supervisor = Supervisor(web.home.root)
        supervisor.stop(["web"], 10)
        supervisor.drop("web")
    assert reconcile([new], web.home.root).changed
    environment = web.ask()["environment"]
    assert isinstance(environment, dict)
    assert environment["COLOUR"] == "blue"
    assert not reconcile([new], web.home.root).changed


def test_check_mode_foretells_and_touches_nothing(web: Web) -> None:
    foretold = reconcile([web.service()], web.home.root, check=True)
    assert foretold.started == ["web"]
    assert list((web.home.root / "etc/conf.d").iterdir()) == []
    reconcile([web.service()], web.home.root)
    pid = web.ask()["pid"]
    assert not reconcile([web.service()], web.home.root, check=True).changed
    assert reconcile([web.service(priority=3)], web.home.root, check=True).changed
    assert web.ask()["pid"] == pid


def test_kill_9_comes_back(web: Web) -> None:
    reconcile([web.service()], web.home.root)
    pid = web.home.pid("web")
    os.kill(pid, signal.SIGKILL)
    until(lambda: web.ask()["pid"] != pid)


# Hands its socket to a child that outlives it, as gunicorn does to workers that are still loading.
FAMILY = """
import os, subprocess, sys, time
if os.environ.get("CHILD"):
    time.sleep(1000)
import socket
sock = socket.create_server(("127.0.0.1", int(sys.argv[1])))
sock.set_inheritable(True)
subprocess.Popen([sys.executable, *sys.argv], env={"CHILD": "1"}, close_fds=False)
time.sleep(1000)
"""


def family(web: Web) -> Service:
    web.service()
    (web.home.root / "family.py").write_text(FAMILY)
    command = (str(web.home.python), str(web.home.root / "family.py"), str(web.port))
    return web.service(command=command, ready={"tcp": web.port})


def members(leader: int) -> list[int]:
    """The living processes of a group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def test_orphans_of_a_killed_service_do_not_hold_its_port(web: Web) -> None:
    service = family(web)
    reconcile([service], web.home.root)
    leader = web.home.pid("web")
    until(lambda: len(members(leader)) == 2)
    os.kill(leader, signal.SIGKILL)
    until(lambda: web.home.pid("web") != leader and len(members(web.home.pid("web"))) == 2)
    assert not members(leader)
    assert not reconcile([service], web.home.root).changed


def test_stop_ends_orphans_of_a_killed_service(web: Web) -> None:
    reconcile([family(web)], web.home.root)
    leader = web.home.pid("web")
    until(lambda: len(members(leader)) == 2)
    supervisord = Supervisor(web.home.root).rpc.getPID()
    os.kill(supervisord, signal.SIGKILL)  # else it would start the service again
    os.kill(leader, signal.SIGKILL)
    until(lambda: gone(leader) and gone(supervisord))
    assert len(members(leader)) == 1
    web.home.kitctl("stop")
    until(lambda: not members(leader))


def test_a_service_that_keeps_dying_fails_fast_with_its_last_words(web: Web) -> None:
    """And with the error that they follow from, however much came between."""
    script = (
        "import os, sys; print('VaultError: sealed by ' + os.environ['PASSWORD'], *range(50), sep='\\n', flush=True); "
        "sys.exit('cannot open the vault with ' + os.environ['PASSWORD'])"
    )
    web.service()
    (web.home.root / "etc/env/web.env").write_text(render_env({"PASSWORD": "s3cret-value"}))
    bad = web.service(command=(str(web.home.python), "-c", script), ready_seconds=120)
    begun = time.monotonic()
    with pytest.raises(ServiceProblem) as caught:
        reconcile([bad], web.home.root)
    assert time.monotonic() - begun < 30
    message = str(caught.value)
    assert "The service web keeps dying" in message
    assert "Its first error there:\n  | VaultError: sealed by (not shown)\n" in message
    assert "| cannot open the vault with (not shown)" in message
    assert str(web.home.root / "var/log/web.log") in message
    assert "Remedy: " in message
    # And with the cause mended, the same call brings it up.
    assert reconcile([web.service()], web.home.root).changed
    web.ask()


def test_a_program_that_is_missing_is_named(web: Web) -> None:
    with pytest.raises(ServiceProblem, match=r"cannot start /no/such/program: No such file or directory"):
        reconcile([web.service(command=("/no/such/program",))], web.home.root)


def test_a_taken_port_gives_the_right_remedy(web: Web) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", web.port))
        other.listen()
        with pytest.raises(ServiceProblem, match="another program holds its port"):
            reconcile([web.service(ready={})], web.home.root)


def test_every_unready_service_is_reported_at_once(home: Home) -> None:
    services = [Web(home, name).service(ready={"tcp": free_port()}, ready_seconds=2) for name in ("one", "two")]
    begun = time.monotonic()
    with pytest.raises(ServiceProblem) as caught:
        reconcile([*services, Web(home, "fine").service()], home.root)
    assert time.monotonic() - begun < 15
    message = str(caught.value)
    assert "The service one is not ready after 2 s" in message
    assert "The service two is not ready after 2 s" in message
    assert "fine" not in message
    assert "| serving" in message


def test_ready_command_gets_the_env_file(web: Web) -> None:
    ready = {"command": ["sh", "-c", 'test "$MARK" = yes'], "env_file": "etc/env/ready.env"}
    env = web.home.root / "etc/env/ready.env"
    env.write_text(render_env({"MARK": "yes"}))
    reconcile([web.service(ready=ready)], web.home.root)
    env.write_text(render_env({"MARK": "no"}))
    with pytest.raises(ServiceProblem, match="sh exits 1"):
        reconcile([web.service(ready=ready, ready_seconds=1)], web.home.root)


def test_absent_stops_and_forgets_and_stopped_comes_back(web: Web) -> None:
    reconcile([web.service()], web.home.root)
    assert reconcile([Service("web", state="stopped")], web.home.root).stopped == ["web"]
    assert not reconcile([Service("web", state="stopped")], web.home.root).changed
    assert reconcile([web.service()], web.home.root).started == ["web"]
    outcome = reconcile([Service("web", state="absent"), Service("never-was", state="absent")], web.home.root)
    assert outcome.stopped == ["web"]
    assert Supervisor(web.home.root).states() == {}
    assert list((web.home.root / "etc/conf.d").iterdir()) == []
    assert not reconcile([Service("web", state="absent")], web.home.root).changed


def test_absent_needs_no_supervisord(home: Home) -> None:
    assert reconcile([Service("web", state="absent")], home.root) == Outcome()
    assert not Supervisor(home.root).answers()


def test_what_a_dead_supervisord_left_is_stopped_gracefully_first(home: Home) -> None:
    """Else the old process would hold the port, and a database its data folder."""
    web, store = Web(home, "web"), Web(home, "store")
    services = [web.service(), store.service(priority=10, stop_signal="INT")]
    reconcile(services, home.root)
    old = [home.pid("web"), home.pid("store")]
    supervisord = Supervisor(home.root).rpc.getPID()
    os.kill(supervisord, signal.SIGKILL)
    until(lambda: gone(supervisord))
    assert web.ask()["pid"] == old[0]  # really orphaned, and alive

    outcome = reconcile(services, home.root)
    assert outcome.changed
    assert all(map(gone, old))
    assert web.endings() == ["web SIGTERM", "store SIGINT"]  # databases after what uses them
    assert {web.ask()["pid"], store.ask()["pid"]}.isdisjoint(old)
    assert not reconcile(services, home.root).changed


def test_supervisord_itself_is_restarted_for_its_own_configuration(web: Web) -> None:
    assert reconcile([], web.home.root).changed
    reconcile([web.service()], web.home.root)
    assert not reconcile([], web.home.root).changed
    old = Supervisor(web.home.root).rpc.getPID()
    time.sleep(0.05)
    with (web.home.root / "etc/supervisord.conf").open("a") as file:
        file.write("\n; new\n")
    assert reconcile([], web.home.root, check=True).changed
    assert not gone(old)
    assert reconcile([], web.home.root).changed
    assert gone(old)
    assert not reconcile([web.service()], web.home.root).changed


def test_a_reused_pid_is_left_alone(web: Web) -> None:
    (web.home.root / "var/run/pids").mkdir()
    (web.home.root / "var/run/pids/web").write_text(f"{os.getpid()} 1\n")
    reconcile([web.service()], web.home.root)
    web.ask()


def test_a_supervisord_without_its_socket_is_replaced(web: Web) -> None:
    reconcile([web.service()], web.home.root)
    old = Supervisor(web.home.root).rpc.getPID()
    (web.home.root / "var/run/supervisor.sock").unlink()
    assert reconcile([web.service()], web.home.root).changed
    assert gone(old)
    web.ask()


def test_shutdown_stops_databases_last_and_start_brings_all_back(home: Home) -> None:
    services = [
        Web(home, "store").service(priority=10),
        Web(home, "app").service(),
        Web(home, "door").service(priority=80),
    ]
    reconcile(services, home.root)
    assert Supervisor(home.root).shutdown() is True
    endings = Web(home).endings()
    assert sorted(endings) == ["app SIGTERM", "door SIGTERM", "store SIGTERM"]
    assert endings[-1] == "store SIGTERM"
    assert Supervisor(home.root).shutdown() is False

    started = home.kitctl("start")  # what the boot hook does
    assert started.returncode == 0, started.stderr
    assert not reconcile(services, home.root).changed


def test_status_tells_state_and_real_ports(home: Home) -> None:
    down = home.kitctl("status")
    assert down.returncode == 1
    assert "kitctl start" in down.stderr
    web = Web(home)
    reconcile([web.service()], home.root)
    status = home.kitctl("status")
    assert status.returncode == 0
    row = status.stdout.splitlines()[1].split()
    assert row[:2] == ["web", "running"]
    assert row[-1] == str(web.port)
    reconcile([Service("web", state="stopped")], home.root)
    stopped = home.kitctl("status")
    assert stopped.returncode == 3
    assert "stopped" in stopped.stdout


def test_restart_one_service_and_an_unknown_one(web: Web) -> None:
    reconcile([web.service()], web.home.root)
    pid = web.home.pid("web")
    assert web.home.kitctl("restart", "web").returncode == 0
    assert web.home.pid("web") != pid
    for command in ("restart", "debug"):
        unknown = web.home.kitctl(command, "wbe")
        assert unknown.returncode == 1
        assert unknown.stderr == "There is no service 'wbe' on this host. Known: web.\n"


def test_logs(web: Web) -> None:
    reconcile([web.service()], web.home.root)
    assert "serving" in web.home.kitctl("logs", "web", "-n", "50").stdout
    unknown = web.home.kitctl("logs", "../run/pids/web")
    assert unknown.returncode == 1
    assert "Known: supervisord, web" in unknown.stderr


def test_a_too_long_home_is_refused_with_the_remedy(server_venv: Path, tmp_path: Path) -> None:
    home = Home(tmp_path / ("x" * 90), server_venv)
    with pytest.raises(ServiceProblem, match=r"too long for a socket.*Remedy: choose a shorter kit_home"):
        reconcile([Web(home).service()], home.root)


def test_containers_that_never_started_are_in_nobodys_way(web: Web) -> None:
    """A first deploy that was refused before them: nothing can be asked of Compose, and all of it can be removed."""
    reconcile([web.service()], web.home.root)
    program = web.home.root / "runtime/bin/kit-compose"
    program.write_text("#!/bin/sh\necho couldn\\'t find env file: .env >&2\nexit 1\n")
    program.chmod(0o700)
    assert web.home.kitctl("status").returncode == 0
    assert web.home.kitctl("restart", "web").returncode == 0
    stopped = web.home.kitctl("stop")
    assert (stopped.returncode, stopped.stderr) == (0, "")
    settings = web.home.root / "etc/compose/.env"
    settings.parent.mkdir()
    settings.touch()
    assert "find env file" in web.home.kitctl("stop").stderr
    settings.unlink()
