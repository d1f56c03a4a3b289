"""What is looked at on a host, on real sockets, processes, repositories and mounts."""

from __future__ import annotations

import hashlib
import http.server
import os
import platform
import pwd
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils import kit_preflight
from ansible.module_utils.kit_mirrors import Mirrors
from ansible.module_utils.kit_preflight import Account, Answer, Findings, Part, Source

ME = pwd.getpwuid(os.getuid())
ENVIRONMENT = {"PATH": os.environ["PATH"], "HOME": ME.pw_dir, "GIT_CONFIG_GLOBAL": "/dev/null"}
NAMED: dict[str, Any] = {"mode": "named", "named": {}, "recorded": {}, "kinds": [], "known": {}}
NO_MIRRORS = Mirrors(NAMED, {})
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can look at what another user may do")


@pytest.fixture
def findings() -> Findings:
    return Findings()


@pytest.fixture
def me() -> Account:
    return Account(ME.pw_name, ME.pw_dir, ME.pw_uid, ME.pw_gid)


def only(findings: Findings) -> Any:
    assert len(findings.problems) == 1, findings.problems
    return findings.problems[0]


# --- ports ----------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def start_listener(script: Path) -> tuple[subprocess.Popen[str], int]:
    """A process that runs from the script's folder and listens; its port."""
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(
        "import socket\nserver = socket.create_server(('127.0.0.1', 0))\n"
        "print(server.getsockname()[1], flush=True)\nserver.accept()\n"
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, int(process.stdout.readline())


def test_the_process_that_holds_a_port_is_named(findings: Findings, listener: socket.socket, tmp_path: Path) -> None:
    port = listener.getsockname()[1]
    kit_preflight.check_ports(findings, {"redis_port": port}, str(tmp_path))
    problem = only(findings)
    assert f"Port {port} (redis_port) is held by" in problem.what
    assert f"pid {os.getpid()}, user {ME.pw_name}" in problem.what
    assert f"kill {os.getpid()}" in problem.remedy
    assert "kit_port_base: " in problem.remedy


def test_our_own_listener_is_no_conflict(findings: Findings, tmp_path: Path) -> None:
    home = tmp_path / "dify-kit"
    process, port = start_listener(home / "runtime" / "service.py")
    try:
        kit_preflight.check_ports(findings, {"redis_port": port}, str(home))
        assert findings.problems == []
        kit_preflight.check_ports(findings, {"redis_port": port}, str(tmp_path / "dify"))  # a prefix of its name only
        assert f"pid {process.pid}" in only(findings).what
    finally:
        process.kill()
        process.wait()


def test_a_listener_on_ipv6_counts(findings: Findings, tmp_path: Path) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 loopback here")
    with server:
        kit_preflight.check_ports(findings, {"gateway_port": server.getsockname()[1]}, str(tmp_path))
    assert "gateway_port" in only(findings).what


def test_free_ports_pass(findings: Findings, listener: socket.socket, tmp_path: Path) -> None:
    port = listener.getsockname()[1]
    listener.close()
    kit_preflight.check_ports(findings, {"redis_port": port}, str(tmp_path))
    assert findings.problems == []


def test_a_process_that_proc_does_not_show_is_named_by_its_user() -> None:
    table = (
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        "   0: 0100007F:4588 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1 0 100 0\n"
        "   1: 0100007F:4589 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  1000        0 4712 1 0 20 4\n"
    )
    assert kit_preflight.listening([table]) == {0x4588: ("4711", 1000)}
    assert str(kit_preflight.Holder(None, "", "alice")) == "a process of user alice"


def test_the_suggested_ports_are_free() -> None:
    taken = {17901, 18007}
    assert kit_preflight.free_port_base(range(8), taken.__contains__, 17800) == 18100


def test_low_ports_are_refused_with_each_way_to_have_them(findings: Findings, tmp_path: Path) -> None:
    limit = tmp_path / "limit"
    limit.write_text("1024\n")
    ports = {"gateway_port": 80, "gateway_https_port": 443, "postgres_port": 17805}
    kit_preflight.check_low_ports(findings, ports, str(tmp_path), str(limit))
    assert [problem.where for problem in findings.problems] == ["gateway_port", "gateway_https_port"]
    remedy = findings.problems[1].remedy
    assert "ip_unprivileged_port_start=80" in remedy
    assert "--dport 443 -j REDIRECT --to-ports 17818" in remedy
    assert f"setcap cap_net_bind_service=+ep $(readlink -f {tmp_path}/runtime/bin/caddy)" in remedy
    limit.write_text("80\n")
    kit_preflight.check_low_ports(findings, ports, str(tmp_path), str(limit))
    assert len(findings.problems) == 2


def test_an_address_that_is_not_the_hosts(findings: Findings) -> None:
    kit_preflight.check_binds(findings, {"inference_bind": "127.0.0.1", "gateway_bind": "192.0.2.7"})
    assert "gateway_bind is 192.0.2.7" in only(findings).what


# --- sources --------------------------------------------------------------------------------------


class Registry(http.server.BaseHTTPRequestHandler):
    """Knows one page; its clock is the server's ``skew`` seconds off; HEAD may be refused."""

    def answer(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        head_refused = self.command == "HEAD" and self.path.startswith("/get-only")
        self.send_response_only(405 if head_refused else 200 if self.path.endswith("/page") else 404)
        self.send_header("Date", formatdate(time.time() + self.server.skew))  # type: ignore[attr-defined]
        self.end_headers()

    do_GET = do_HEAD = answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def registry() -> Iterator[Any]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    server.skew, server.asked = 0, []  # type: ignore[attr-defined]
    server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def http_source(url: str, name: str = "PyPI") -> Source:
    return Source(name, "http", url, "set kit_pypi_index")


def test_a_registry_that_answers(registry: Any) -> None:
    answer = kit_preflight.ask_http(http_source(f"{registry.url}/page"), {})
    assert answer.fault == ""
    assert answer.server_time is not None
    assert abs(answer.server_time - time.time()) < 5


def test_a_registry_that_only_knows_get(registry: Any) -> None:
    assert kit_preflight.ask_http(http_source(f"{registry.url}/get-only/page"), {}).fault == ""


def test_a_registry_without_the_page(registry: Any) -> None:
    assert kit_preflight.ask_http(http_source(f"{registry.url}/other"), {}).fault == "it answers 404 Not Found"


def test_a_registry_behind_the_builds_proxy(registry: Any) -> None:
    source = http_source("http://registry.invalid/page")
    assert kit_preflight.ask_http(source, {"http_proxy": registry.url}).fault == ""
    assert registry.asked == ["http://registry.invalid/page"]
    assert kit_preflight.ask_http(source, {"http_proxy": registry.url, "no_proxy": ".invalid"}).fault != ""


def test_a_source_that_does_not_answer(findings: Findings, me: Account) -> None:
    part = Part("API", ["/nowhere/*"], sources=["PyPI"])
    kit_preflight.check_sources(findings, [part], [http_source("http://127.0.0.1:1/page")], me, ENVIRONMENT, NO_MIRRORS)
    problem = only(findings)
    assert problem.what == "PyPI cannot be used: Connection refused. Needed for: API."
    assert problem.where == "http://127.0.0.1:1/page"
    assert problem.remedy == "set kit_pypi_index"


def test_only_what_missing_parts_need_is_asked(registry: Any, findings: Findings, me: Account, tmp_path: Path) -> None:
    (tmp_path / "web-1.16.0-x86_64-abc").mkdir()
    parts = [
        Part("web", [f"{tmp_path}/none", f"{tmp_path}/web-1.16.0-*"], sources=["npm"]),
        Part("API", [f"{tmp_path}/api-1.16.0-*"], sources=["PyPI"]),
    ]
    missing = [part for part in parts if part.missing]
    sources = [http_source(f"{registry.url}/npm/page", "npm"), http_source(f"{registry.url}/pypi/page", "PyPI")]
    kit_preflight.check_sources(findings, missing, sources, me, ENVIRONMENT, NO_MIRRORS)
    assert registry.asked == ["/pypi/page"]
    assert findings.problems == []


def test_one_of_several_addresses_will_do(registry: Any, findings: Findings, me: Account, tmp_path: Path) -> None:
    part = Part("model weights", ["/nowhere"], sources=["PyPI"])
    source = replace(http_source("http://127.0.0.1:1/hub"), others=[f"{registry.url}/page", "http://127.0.0.1:1/never"])
    kit_preflight.check_sources(findings, [part], [source], me, ENVIRONMENT, NO_MIRRORS)
    assert findings.problems == []
    file = tmp_path / "config.json"
    source = replace(source, others=[str(file)])
    kit_preflight.check_sources(findings, [part], [source], me, ENVIRONMENT, NO_MIRRORS)
    assert "none of its 2 addresses will do (http://127.0.0.1:1/hub: Connection refused; " in only(findings).what
    assert f"{file}: {me.name} cannot read that file" in only(findings).what
    file.touch()
    findings.problems.clear()
    kit_preflight.check_sources(findings, [part], [source], me, ENVIRONMENT, NO_MIRRORS)
    assert findings.problems == []


def test_a_page_that_strangers_may_not_see(registry: Any) -> None:
    source = http_source(f"{registry.url}/other")
    assert kit_preflight.ask_http(replace(source, fine=[404]), {}).fault == ""


@pytest.fixture
def repository(tmp_path: Path) -> str:
    path = tmp_path / "up" / "dify"
    git = ["git", "-C", str(path), "-c", "user.name=t", "-c", "user.email=t@t"]
    path.mkdir(parents=True)
    tmp_path.chmod(0o755)
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"], ["tag", "1.16.0"]):
        subprocess.run([*git, *command], check=True, env=ENVIRONMENT)
    return str(path)


def git_source(url: str, tag: str = "1.16.0") -> Source:
    return Source("Dify's repository", "git", url, "a mirror", tag)


def test_a_repository_through_insteadof(repository: str, me: Account) -> None:
    redirect = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{Path(repository).parent}/.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://code.invalid/langgenius/",
    }
    answer = kit_preflight.ask_git(git_source("https://code.invalid/langgenius/dify"), me, {**ENVIRONMENT, **redirect})
    assert answer.fault == ""
    assert f"git is configured to use file://{repository}" in answer.asked


def test_a_repository_without_the_tag(repository: str, me: Account) -> None:
    assert kit_preflight.ask_git(git_source(f"file://{repository}", "9.9.9"), me, ENVIRONMENT).fault == (
        "it has no tag 9.9.9"
    )


def test_a_repository_that_cannot_be_reached(me: Account) -> None:
    answer = kit_preflight.ask_git(git_source("http://127.0.0.1:1/langgenius/dify"), me, ENVIRONMENT)
    assert "Failed to connect" in answer.fault or "refused" in answer.fault
    assert "\n" not in answer.fault


def test_a_hanging_repository_is_given_up(
    me: Account, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Account.run, "__defaults__", (0.5,))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/dify"
    assert "no answer within" in kit_preflight.ask_git(git_source(url), me, ENVIRONMENT).fault


@pytest.mark.parametrize(("skew", "problems", "notices"), [(0, 0, 0), (-40, 0, 1), (400, 1, 0), (-4000, 1, 0)], ids=str)
def test_the_clock(findings: Findings, skew: int, problems: int, notices: int) -> None:
    now = 1_800_000_000.0
    kit_preflight.check_clock(findings, [Answer(), Answer(server_time=now - skew)], now)
    assert (len(findings.problems), len(findings.notices)) == (problems, notices)
    if problems:
        assert f"{abs(skew)} s {'fast' if skew > 0 else 'slow'}" in only(findings).what


def test_one_wrong_server_clock_is_not_the_hosts(findings: Findings) -> None:
    kit_preflight.check_clock(findings, [Answer(server_time=0.0), Answer(server_time=999.0)], 1000.0)
    assert findings.problems == []


# --- machine --------------------------------------------------------------------------------------

MEMINFO = "MemTotal: {total} kB\nMemFree: 1 kB\nMemAvailable: {free} kB\nSwapTotal: {swap} kB\nSwapFree: 0 kB\n"
WEB = Part("web bundle", ["/nowhere"], memory_mb=8400)


def memory(total_mb: int, free_mb: int, swap_mb: int) -> dict[str, int]:
    text = MEMINFO.format(total=total_mb * 1024, free=free_mb * 1024, swap=swap_mb * 1024)
    figures: dict[str, int] = kit_preflight.memory_mb(text, None)
    return figures


def test_enough_memory(findings: Findings) -> None:
    kit_preflight.check_memory(findings, memory(16000, 12000, 0), 6144, [WEB])
    assert (findings.problems, findings.notices) == ([], [])


def test_too_little_memory_for_the_build(findings: Findings) -> None:
    kit_preflight.check_memory(findings, memory(6200, 6000, 0), 6144, [WEB])
    problem = only(findings)
    assert "Building the web bundle takes 8.2 GB" in problem.what
    assert "fallocate -l 4G" in problem.remedy
    assert "kit_cache/builds" in problem.remedy


def test_swap_counts_and_so_does_a_build_that_is_there(findings: Findings) -> None:
    kit_preflight.check_memory(findings, memory(6200, 6000, 4000), 6144, [WEB])
    kit_preflight.check_memory(findings, memory(6200, 6000, 0), 6144, [])
    assert findings.problems == []


def test_too_little_memory_to_run(findings: Findings) -> None:
    kit_preflight.check_memory(findings, memory(4000, 3000, 0), 6144, [])
    assert "The services take about 6.0 GB" in only(findings).what


def test_memory_that_others_use_is_a_notice(findings: Findings) -> None:
    kit_preflight.check_memory(findings, memory(16000, 4000, 0), 6144, [WEB])
    assert findings.problems == []
    assert "3.9 GB are free" in findings.notices[0]


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/memory.max").write_text(f"{4 * 1024**3}\n")
    (tmp_path / "a/b/memory.max").write_text("max\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/a/b\n")
    limit = kit_preflight.cgroup_memory_limit(str(tmp_path), str(membership))
    assert limit == 4 * 1024**3
    text = MEMINFO.format(total=16 * 1024**2, free=12 * 1024**2, swap=0)
    assert kit_preflight.memory_mb(text, limit) == {"total": 4096, "available": 4096, "swap": 0}


@pytest.mark.parametrize(
    ("system", "machine", "libc", "what"),
    [
        ("Darwin", "arm64", ("", ""), "runs Darwin"),
        ("Linux", "riscv64", ("glibc", "2.36"), "riscv64"),
        ("Linux", "x86_64", ("", ""), "not glibc"),
        ("Linux", "x86_64", ("glibc", "2.17"), "2.17"),
    ],
)
def test_systems_that_nothing_prebuilt_runs_on(
    findings: Findings, system: str, machine: str, libc: tuple[str, str], what: str
) -> None:
    kit_preflight.check_system(findings, system, machine, libc, ["aarch64", "x86_64"], "2.28")
    assert what in only(findings).what


def test_this_system_passes(findings: Findings) -> None:
    libc = platform.libc_ver()
    kit_preflight.check_system(findings, "Linux", "x86_64", (libc[0], libc[1]), ["x86_64"], "2.28")
    assert findings.problems == []


def test_lacking_processor_features_are_named(findings: Findings) -> None:
    flags = kit_preflight.cpu_flags("flags\t\t: fpu sse avx2\n\nflags\t\t: fpu avx2\n")
    assert flags == {"fpu", "avx2"}
    kit_preflight.check_cpu(findings, flags, ["avx2", "avx512f"])
    assert "lacks avx512f," in only(findings).what


def test_umask_and_locale(findings: Findings) -> None:
    kit_preflight.check_umask(findings, 0o077)
    kit_preflight.check_locale(findings)
    assert findings.problems == []
    kit_preflight.check_umask(findings, 0o277)
    assert "umask 0277" in only(findings).what


# --- user, folders, disk --------------------------------------------------------------------------


def test_a_folder_of_ones_own_passes(findings: Findings, me: Account, tmp_path: Path) -> None:
    kit_preflight.check_folder(findings, me, "kit_home", str(tmp_path / "a" / "b"))
    kit_preflight.check_folder(findings, me, "kit_home", str(tmp_path))
    assert findings.problems == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; see the next test")
def test_a_folder_that_i_may_not_write(findings: Findings, me: Account, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    kit_preflight.check_folder(findings, me, "kit_home", str(tmp_path / "kit"))
    problem = only(findings)
    assert f"{ME.pw_name} cannot write to {tmp_path}, where kit_home is to be" in problem.what
    assert f"install -d -o {ME.pw_name} -m 700 {tmp_path}/kit" in problem.remedy


@needs_root
def test_a_folder_that_the_service_user_may_not_write(findings: Findings, tmp_path: Path) -> None:
    nobody = Account.find("nobody", "/nonexistent")
    kit_preflight.check_folder(findings, nobody, "kit_home", str(tmp_path / "kit"))
    assert "nobody cannot write to" in only(findings).what


@needs_root
def test_a_home_of_somebody_else(findings: Findings, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    kit_preflight.check_folder(findings, Account.find("nobody", "/nonexistent"), "kit_home", str(tmp_path))
    problem = only(findings)
    assert "belongs to root, but the kit runs as nobody" in problem.what
    assert f"chown -R nobody: {tmp_path}" in problem.remedy


@needs_root
def test_the_home_of_a_user_to_be_created(findings: Findings) -> None:
    account = Account.find("kit-nobody-yet", "/home/kit-nobody-yet")
    kit_preflight.check_folder(findings, account, "kit_home", "/home/kit-nobody-yet/dify-kit")
    kit_preflight.check_account(findings, account, "root", "/home/kit-nobody-yet")
    assert findings.problems == []


def test_a_folder_below_a_file(findings: Findings, me: Account, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kit_preflight.check_folder(findings, me, "kit_home", str(tmp_path / "file" / "kit"))
    assert f"{tmp_path}/file is not a folder" in only(findings).what


MOUNTED = """
import sys
sys.path.insert(0, sys.argv[1])
from module_utils.kit_preflight import Account, Findings, Part, check_disk, check_folder
findings = Findings()
check_folder(findings, Account("root", "/root", 0, 0), "kit_home", "/mnt/kit")
check_disk(findings, "/mnt/kit", "/mnt/cache", [Part("x", [], home_mb=9, cache_mb=9)])
print(*(problem.what for problem in findings.problems), sep="\\n")
"""


@needs_root
@pytest.mark.parametrize(
    ("options", "signs"),
    [
        ("noexec", ["mounted noexec"]),
        ("ro", ["mounted read-only"]),
        ("size=10m", ["kit_home (/mnt/kit) and kit_cache (/mnt/cache) need 18 MB more; 10 MB are free"]),
        ("nr_inodes=100", ["has room for 99 files only"]),
    ],
)
def test_mounts_that_do_not_do(options: str, signs: list[str]) -> None:
    mount = f'mount -t tmpfs -o {options} none /mnt && exec "$@"'
    plugins = Path(kit_preflight.__file__).parents[1]
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", sys.executable, "-c", MOUNTED, str(plugins)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "unshare failed" in done.stderr or "permission denied" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(signs)
    assert all(sign in line for sign, line in zip(signs, lines, strict=True)), lines


def test_the_service_user_is_not_root(findings: Findings) -> None:
    kit_preflight.check_account(findings, Account("root", "/root", 0, 0), "root", "/root")
    assert "kit_user is root" in only(findings).what


@pytest.mark.skipif(os.geteuid() == 0, reason="root can become anybody")
def test_an_ordinary_user_cannot_become_another(findings: Findings) -> None:
    kit_preflight.check_account(findings, Account("other", "/home/other", 4711, 4711), ME.pw_name, "/home/other")
    assert "who cannot become another user" in only(findings).what


@needs_root
def test_a_service_user_without_a_shell(findings: Findings) -> None:
    account = Account("daemon", "/usr/sbin", 1, 1, "/usr/sbin/nologin")
    kit_preflight.check_account(findings, account, "root", "/usr/sbin")
    assert "its shell is /usr/sbin/nologin" in only(findings).what


def test_a_home_that_is_not_the_users(findings: Findings, me: Account) -> None:
    if me.uid == 0:
        me = Account.find("nobody", "/nonexistent")
        me = Account(me.name, me.home, me.uid, me.gid, "/bin/sh")
    kit_preflight.check_account(findings, me, me.name, "/elsewhere")
    assert only(findings).remedy == f"kit_user_home: {me.home}"


def test_a_home_with_somebody_elses_files(findings: Findings, tmp_path: Path) -> None:
    (tmp_path / "var").mkdir()
    (tmp_path / ".hidden").mkdir()
    kit_preflight.check_home_is_ours(findings, str(tmp_path))
    kit_preflight.check_home_is_ours(findings, str(tmp_path / "absent"))
    assert findings.problems == []
    (tmp_path / "thesis.tex").write_text("")
    kit_preflight.check_home_is_ours(findings, str(tmp_path))
    assert "thesis.tex" in only(findings).what


def test_too_little_disk_adds_up_on_one_file_system(findings: Findings, tmp_path: Path) -> None:
    usage = os.statvfs(tmp_path)
    free_mb = usage.f_bavail * usage.f_frsize // 1024**2
    part = Part("model service", [], home_mb=free_mb * 2 // 3, cache_mb=free_mb * 2 // 3)
    kit_preflight.check_disk(findings, str(tmp_path / "home"), str(tmp_path / "cache"), [part])
    problem = findings.problems[0]
    assert f"kit_home ({tmp_path}/home) and kit_cache ({tmp_path}/cache) need" in problem.what
    assert "are free" in problem.what


def test_nothing_missing_needs_no_disk(findings: Findings, tmp_path: Path) -> None:
    kit_preflight.check_disk(findings, str(tmp_path), str(tmp_path), [])
    assert findings.problems == []


def test_socket_paths_that_the_kernel_cuts(findings: Findings, tmp_path: Path) -> None:
    longest = f"/{'x' * 150}"
    with pytest.raises(OSError, match="too long"), socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/{'x' * (kit_preflight.SOCKET_PATH_LIMIT)}")  # one more than fits
    kit_preflight.check_sockets(findings, ["/short", longest])
    problem = only(findings)
    assert "151 bytes, Linux allows 107" in problem.what
    assert "44 characters shorter" in problem.remedy


def test_missing_commands(findings: Findings) -> None:
    parts = [Part("API", [], commands=["git", "no-such-command"]), Part("web", [], commands=["no-such-command"])]
    kit_preflight.check_commands(findings, parts, os.environ["PATH"])
    problem = only(findings)
    assert problem.what == "The command no-such-command is missing. Needed for: API, web."


def test_missing_certificates(findings: Findings, tmp_path: Path) -> None:
    kit_preflight.check_certificates(findings, {"SSL_CERT_FILE": str(tmp_path / "none.crt")})
    assert "There are no root certificates at" in only(findings).what


def test_temporary_folders_are_writable(findings: Findings, me: Account) -> None:
    kit_preflight.check_temporary(findings, me)
    assert findings.problems == []


# --- Python ---------------------------------------------------------------------------------------

has_headers = pytest.mark.skipif(
    not Path(sysconfig.get_path("include"), "Python.h").exists(), reason="this Python lacks its headers"
)
OWN = f"{sys.version_info[0]}.{sys.version_info[1]}"


def python(path: str = "", version: str = OWN, download: str = "") -> dict[str, str]:
    return {"version": version, "path": path, "download": download}


@has_headers
def test_a_python_that_the_site_names(findings: Findings, me: Account) -> None:
    kit_preflight.check_python(findings, me, python(sys.executable), ENVIRONMENT)
    assert findings.problems == []


def test_a_python_of_another_version(findings: Findings, me: Account) -> None:
    kit_preflight.check_python(findings, me, python(sys.executable, "3.99", "http://127.0.0.1:1/"), ENVIRONMENT)
    problem = only(findings)
    assert f"{sys.executable}: is Python {OWN}" in problem.what
    assert problem.where == "runtime_python"
    assert "runtime_python: the path of a python3.99" in problem.remedy


@has_headers
def test_a_python_on_the_path(findings: Findings, me: Account, tmp_path: Path) -> None:
    (tmp_path / f"python{OWN}").symlink_to(sys.executable)
    tmp_path.chmod(0o755)
    kit_preflight.check_python(findings, me, python(), {**ENVIRONMENT, "PATH": str(tmp_path)})
    assert findings.problems == []


def test_a_python_that_can_be_downloaded(findings: Findings, me: Account, registry: Any) -> None:
    kit_preflight.check_python(findings, me, python("", "3.99", f"{registry.url}/page"), ENVIRONMENT)
    assert findings.problems == []


def test_no_python_at_all(findings: Findings, me: Account) -> None:
    kit_preflight.check_python(findings, me, python("", "3.99", "http://127.0.0.1:1/builds"), ENVIRONMENT)
    problem = only(findings)
    assert "http://127.0.0.1:1/builds: Connection refused" in problem.what
    assert "runtime_python_mirror" in problem.remedy


# --- another Dify ---------------------------------------------------------------------------------


def test_another_dify_is_noticed_and_ours_is_not(me: Account, tmp_path: Path) -> None:
    home = tmp_path / "dify-kit"
    command = [sys.executable, "-c", "import time; time.sleep(60)", "celery_entrypoint.celery"]
    environment = {"PATH": "/nonexistent"}
    home.mkdir()

    def started(folder: Path) -> subprocess.Popen[bytes]:
        # Popen returns as exec closes its pipe, a moment before /proc shows the new command line.
        process = subprocess.Popen(command, cwd=folder)
        deadline = time.monotonic() + 10
        while command[-1].encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return process

    ours = started(home)
    before = kit_preflight.foreign_dify(str(home), environment, me)
    theirs = started(Path("/"))
    try:
        assert not any(f"(pid {ours.pid})" in line for line in before)
        found = kit_preflight.foreign_dify(str(home), environment, me)
        assert len(found) == 1
        assert "another Dify runs on this host as" in found[0]
    finally:
        for process in (ours, theirs):
            process.kill()
            process.wait()


# --- sandbox --------------------------------------------------------------------------------------


ABLE: tuple[list[str], list[str]] = ([], [])
UNABLE = (["newuidmap is missing"], ["apt-get install --yes uidmap"])


def sandbox(
    monkeypatch: pytest.MonkeyPatch, mode: str, lacking: tuple[list[str], list[str]], **part: Any
) -> tuple[kit_preflight.Findings, dict[str, Any]]:
    monkeypatch.setattr(kit_preflight, "_lacking", lambda *_: (list(lacking[0]), list(lacking[1])))
    source = {"name": "the sandbox's source", "kind": "file", "url": "/x", "remedy": ""}
    wanted = {"mode": mode, "part": {"name": "sandbox", "present": ["/"], **part}, "source": source}
    found = kit_preflight.Findings()
    me = kit_preflight.Account.find(ME.pw_name, ME.pw_dir)
    return found, kit_preflight.check_sandbox(found, wanted, me, ENVIRONMENT)


@pytest.mark.parametrize("mode", ["none", "off", "external"])
def test_a_sandbox_that_is_not_wanted_here_is_not_looked_for(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    found, known = sandbox(monkeypatch, mode, UNABLE)
    assert (found.problems, found.notices, known["run"]) == ([], [], False)


@pytest.mark.parametrize("mode", ["auto", "userns"])
def test_a_sandbox_runs_where_the_host_can(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    found, known = sandbox(monkeypatch, mode, ABLE)
    assert (found.problems, found.notices, known) == ([], [], {"run": True, "commands": []})


def test_auto_goes_without_a_sandbox_and_says_what_would_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found, known = sandbox(monkeypatch, "auto", UNABLE)
    assert not known["run"]
    assert found.problems == []
    [notice] = found.notices
    assert "newuidmap is missing" in notice
    assert "apt-get install --yes uidmap" in notice


def test_userns_insists_and_gives_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = sandbox(monkeypatch, "userns", UNABLE)
    assert found.problems[0].remedy.splitlines()[1:] == UNABLE[1]


def test_root_does_it_itself_but_must_be_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    found, known = sandbox(monkeypatch, "root", UNABLE)
    assert (found.problems, known) == ([], {"run": True, "commands": UNABLE[1]})
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    found, _ = sandbox(monkeypatch, "root", UNABLE)
    assert "does not connect as root" in found.problems[0].what


def test_what_it_is_built_with_counts_only_until_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name == "gcc" else f"/usr/bin/{name}")
    assert sandbox(monkeypatch, "auto", ABLE)[1]["run"]
    found, known = sandbox(monkeypatch, "auto", ABLE, present=["/nowhere"])
    assert not known["run"]
    assert "gcc" in found.notices[0]


# --- all of it ------------------------------------------------------------------------------------


# The kit's own on this host.
STORES: dict[str, Any] = {
    "dify": True,
    "postgres": {
        "source": "wheel",
        "version": "",
        "archive": "",
        "archive_sha256": "",
        "newest": "18",
        "host": "127.0.0.1",
        "port": 5,
        "database": "dify",
        "extensions": ["vector"],
        "databases": {},
    },
    "redis": {"source": "wheel"},
    "storage": {"kind": "fs"},
    "vector": {"kind": "pgvector"},
}


def parameters(home: Path, **changes: Any) -> dict[str, Any]:
    user = ME.pw_name if os.geteuid() else "kit-nobody-yet"
    given: dict[str, Any] = {
        "user": user,
        "user_home": ME.pw_dir if os.geteuid() else "/home/kit-nobody-yet",
        "home": str(home / "dify-kit") if os.geteuid() else "/home/kit-nobody-yet/dify-kit",
        "cache": str(home / "cache") if os.geteuid() else "/home/kit-nobody-yet/cache",
        "environment": ENVIRONMENT,
        "ports": {},
        "sockets": [],
        "machines": ["aarch64", "x86_64"],
        "glibc": "2.28",
        "cpu_flags": [],
        "python": python(sys.executable),
        "services_mb": 100,
        "parts": [],
        "sandbox": {"mode": "off"},
        "sources": [],
        "agent_runtime": False,
        "docker": "",
        "docker_builds": False,
        "mode": "source",
        "move": False,
        "mirrors": NAMED,
        "binds": {"gateway_bind": "127.0.0.1"},
        "stores": STORES,
    }
    return {**given, **changes}


@pytest.mark.parametrize("allowed", [True, False])
def test_what_agents_commands_lack_comes_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, me: Account, allowed: bool
) -> None:
    answer: subprocess.CompletedProcess[str] = subprocess.CompletedProcess([], 0 if allowed else 1)
    monkeypatch.setattr(Account, "run", lambda *_: answer)
    lacks = kit_preflight.agent_runtime_lacks(me, {"PATH": str(tmp_path)})
    assert "tmux is not installed" in lacks
    assert "`apt-get install tmux`" in lacks
    assert ("namespaces" in lacks) is not allowed
    tmux = tmp_path / "tmux"
    tmux.touch(mode=0o755)
    lacks = kit_preflight.agent_runtime_lacks(me, {"PATH": str(tmp_path)})
    assert "tmux" not in lacks
    assert (lacks == "") is allowed


def test_a_sound_host_has_no_problem(tmp_path: Path) -> None:
    found, known = kit_preflight.examine(parameters(tmp_path), ME.pw_name)
    assert found.problems == []
    assert known == {
        "has_data": False,
        "has_vectors": False,
        "agent_runtime_lacks": "",
        "mirrors": {},
        "sandbox": {"run": False, "commands": []},
        "docker_bridge": "",
    }


def test_everything_that_is_wrong_comes_at_once(tmp_path: Path, listener: socket.socket) -> None:
    part = {"name": "API", "present": ["/nowhere"], "sources": ["PyPI"], "home_mb": 10**9, "commands": ["no-such"]}
    wrong = parameters(
        tmp_path,
        ports={"redis_port": listener.getsockname()[1]},
        sockets=["/" + "x" * 200],
        machines=["pdp11"],
        cpu_flags=["telepathy"],
        services_mb=10**9,
        parts=[part],
        sources=[{"name": "PyPI", "kind": "http", "url": "http://127.0.0.1:1/", "remedy": "a mirror"}],
    )
    found, _ = kit_preflight.examine(wrong, ME.pw_name)
    text = "\n".join(problem.what for problem in found.problems)
    for sign in ("redis_port", "201 bytes", "pdp11", "telepathy", "services take", "PyPI", "no-such", "more;"):
        assert sign in text, sign
    assert all(problem.remedy for problem in found.problems)


def test_data_of_an_earlier_run_is_seen(tmp_path: Path) -> None:
    (tmp_path / "dify-kit/var/postgres").mkdir(parents=True)
    given = {**parameters(tmp_path), "home": str(tmp_path / "dify-kit")}
    assert kit_preflight.examine(given, ME.pw_name)[1]["has_data"] is False
    (tmp_path / "dify-kit/var/postgres/PG_VERSION").write_text("16\n")
    assert kit_preflight.examine(given, ME.pw_name)[1]["has_data"] is True


def stores_problems(home: Path, mode: str = "source", **changes: Any) -> list[str]:
    """What is said of the parts on a host, with PostgreSQL's settings changed."""
    findings = Findings()
    stores = {**STORES, "postgres": {**STORES["postgres"], **changes}}
    account = Account.find(ME.pw_name, ME.pw_dir)
    kit_preflight.check_parts(findings, str(home), account, stores, ENVIRONMENT, mode)
    return [f"{problem.what} {problem.remedy}" for problem in findings.problems]


def test_a_part_that_begins_anew_beside_its_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "etc/env").mkdir(parents=True)
    (tmp_path / "etc/env/api.env").write_text(
        "DB_DATABASE='dify'\nDB_HOST='db.example.com'\nDB_PORT='5432'\nSTORAGE_TYPE='s3'\nS3_BUCKET_NAME='b'\n"
    )
    database, files = stores_problems(tmp_path)
    assert "Dify's data is in dify at db.example.com:5432" in database
    assert "Dify's files are in the bucket b" in files
    # Taken over.
    (tmp_path / "var/postgres/16").mkdir(parents=True)
    (tmp_path / "var/postgres/16/PG_VERSION").write_text("16\n")
    (tmp_path / "var/storage/privkeys").mkdir(parents=True)
    assert stores_problems(tmp_path) == []


def test_containers_that_begin_anew_beside_their_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "etc/env").mkdir(parents=True)
    (tmp_path / "etc/env/dify.env").write_text(
        "DB_DATABASE='dify'\nDB_HOST='db.example.com'\nDB_PORT='5432'\nSTORAGE_TYPE='s3'\nS3_BUCKET_NAME='b'\n"
    )
    own = {"source": "container", "host": "db_postgres"}
    assert stores_problems(tmp_path, **own) == [], "source mode has not run here"
    database, files = stores_problems(tmp_path, "compose", **own)
    assert "Dify's data is in dify at db.example.com:5432" in database
    assert f"{tmp_path}/var/compose/storage has none of them" in files
    (tmp_path / "var/compose/postgres/pgdata").mkdir(parents=True)
    (tmp_path / "var/compose/storage/privkeys").mkdir(parents=True)
    assert stores_problems(tmp_path, "compose", **own) == []


def test_files_are_not_left_in_the_other_mode(tmp_path: Path) -> None:
    """A site that changes its mode, and with it the place of its files."""
    (tmp_path / "etc/env").mkdir(parents=True)
    (tmp_path / "var/postgres/16").mkdir(parents=True)
    (tmp_path / "current").symlink_to("releases/1.16.0")
    told = tmp_path / "etc/env/api.env"
    told.write_text("DB_DATABASE='dify'\nDB_HOST='127.0.0.1'\nDB_PORT='5'\nSTORAGE_TYPE='opendal'\n")
    own = {"source": "container", "host": "db_postgres"}
    assert stores_problems(tmp_path, "compose", **own) == [], "the move copies them"
    told.write_text(told.read_text().replace("opendal", "s3") + "S3_BUCKET_NAME='b'\n")
    (files,) = stores_problems(tmp_path, "compose", **own)
    assert "Dify's files are in the bucket b" in files
    assert f"into {tmp_path}/var/compose/storage" in files


def test_a_postgres_that_cannot_read_the_data_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "var/postgres/16"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("16\n")
    assert stores_problems(tmp_path) == stores_problems(tmp_path, version="16") == []
    (said,) = stores_problems(tmp_path, version="18")
    assert f"The data in {data} is of PostgreSQL 16; PostgreSQL 18" in said
    for way_out in ('postgres_version: "16"', "pg_dumpall"):
        assert way_out in said
    (said,) = stores_problems(tmp_path, source="system", version="99")
    assert "PostgreSQL 99 is not installed" in said
    assert "apt-get install postgresql-99" in said
    (data / "PG_VERSION").unlink()
    (said,) = stores_problems(tmp_path, version="18", newest="17")
    assert "with 17 at most" in said


def test_an_archive_is_looked_into_before_it_is_unpacked(tmp_path: Path) -> None:
    def packed(*names: str) -> dict[str, str]:
        root = tmp_path / str(len(names))
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("# PostgreSQL 17\n")
        with tarfile.open(tmp_path / "pg.tar.gz", "w:gz") as tar:
            tar.add(root, "pgsql")
        digest = hashlib.sha256((tmp_path / "pg.tar.gz").read_bytes()).hexdigest()
        return {"source": "archive", "archive": str(tmp_path / "pg.tar.gz"), "archive_sha256": digest}

    server = ("bin/initdb", "bin/postgres", "share/postgresql/postgres.bki")
    (said,) = stores_problems(tmp_path, **packed(*server))
    assert "PostgreSQL 17 lacks the extension vector" in said
    whole = packed(*server, "share/postgresql/extension/vector.control")
    assert stores_problems(tmp_path, **whole) == []
    (said,) = stores_problems(tmp_path, **{**whole, "archive_sha256": "0" * 64})
    assert f"has the sha256 {whole['archive_sha256']}" in said
    (said,) = stores_problems(tmp_path, **packed("bin/psql"))
    assert "holds no PostgreSQL server" in said
    (said,) = stores_problems(tmp_path, **{**whole, "archive": "/nowhere.tar"})
    assert "cannot be read: No such file" in said


def test_the_data_of_the_other_mode_is_not_left_behind(tmp_path: Path) -> None:
    (tmp_path / "var/postgres/16").mkdir(parents=True)
    (tmp_path / "current").symlink_to("releases/1.16.0")

    def found(mode: str, move: bool = False) -> list[Any]:
        findings = kit_preflight.Findings()
        assert kit_preflight.check_mode(findings, str(tmp_path), mode, move) == bool(findings.problems)
        return list(findings.problems)

    assert found("source") == found("skip") == []
    assert found("compose", move=True) == []
    [problem] = found("compose")
    assert "dify_mode source" in problem.what
    assert 'make deploy MODE=compose ARGS="-e dify_move_data=yes"' in problem.remedy
    (tmp_path / "current").unlink()
    assert found("compose") == []
