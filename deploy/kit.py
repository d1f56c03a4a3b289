"""What the Makefile's targets do on the controller: run a playbook, the checks, or a command on a site's host.

Exit status: 0 done; 2 something must be mended, the message says what; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

DEPLOY = Path(__file__).resolve().parent
ROOT = DEPLOY.parent
BIN = Path(sys.executable).parent
MEND = 2


def clock(seconds: float) -> str:
    """``0.4`` -> ``0.4 s``, ``75`` -> ``1 min 15 s``."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def inventory(site: str) -> Path:
    """The folder of a site's inventory.

    Raises:
        SystemExit: there is none of that name; lists those there are.
    """
    folder = DEPLOY / "inventories" / site
    if not (folder / "hosts.yml").is_file():
        known = sorted(path.parent.name for path in (DEPLOY / "inventories").glob("*/hosts.yml"))
        fail(f"There is no site `{site}` ({folder}/hosts.yml).\nRemedy: SITE= one of {', '.join(known)}.")
    return folder


def fail(message: str) -> NoReturn:
    """Say what is wrong and end with status 2."""
    print(message, file=sys.stderr)
    raise SystemExit(MEND)


def site_state(folder: Path) -> dict[str, Any]:
    """What the last deploy wrote about the site: hosts, ports, services; no secrets."""
    try:
        state: dict[str, Any] = json.loads((folder / "site.json").read_text())
    except FileNotFoundError:
        fail(f"Nothing is deployed for this site yet ({folder}/site.json is missing).\nRemedy: make deploy")
    return state


def environment(run_file: str | None = None) -> dict[str, str]:
    """The caller's environment, made fit for Ansible."""
    env = {**os.environ, "ANSIBLE_CONFIG": str(DEPLOY / "ansible.cfg"), "ANSIBLE_HOME": str(ROOT / ".cache/ansible")}
    # Else a pipe or a log gets no line before some thousand are there: progress would show when all is over.
    env["PYTHONUNBUFFERED"] = "1"
    # Ansible refuses to start in a locale that is not UTF-8.
    env.setdefault("LC_ALL", "C.UTF-8")
    if run_file:
        env["KIT_RUN_FILE"] = run_file
    return env


def playbook(folder: Path, name: str, arguments: list[str]) -> tuple[int, dict[str, Any]]:
    """Run a playbook; its exit status and what the callback recorded."""
    with tempfile.TemporaryDirectory(prefix="kit-") as temporary:
        record = Path(temporary) / "run.json"
        status = subprocess.run(
            [str(BIN / "ansible-playbook"), "-i", str(folder), f"{name}.yml", *arguments],
            cwd=DEPLOY,
            env=environment(str(record)),
        ).returncode
        run: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {}
    return status, run


def checks(folder: Path, arguments: list[str]) -> int:
    """Run the host checks against the site; pytest's exit status."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(ROOT / "tests/hosts")]
    return subprocess.run([*command, "--site", str(folder), *arguments], cwd=ROOT, env=environment()).returncode


def deploy(folder: Path, arguments: list[str]) -> int:
    """Deploy, check, summarize."""
    begun = time.monotonic()
    status, run = playbook(folder, "site", arguments)
    if status:
        steps = [step["name"] for step in run.get("steps", [])]
        untouched = bool(run) and set(steps) <= {"preflight", "site", "inference", "provider"} and not run["changed"]
        print("\nNothing was changed." if untouched else "\nOnce it is mended, `make deploy` goes on from here.")
        return MEND
    if "--check" in arguments:
        print(f"\nCheck mode: {run['changed']} would change. Nothing was done.")
        return 0
    checking = time.monotonic()
    print("\nChecking the hosts")
    if checks(folder, ["-m", "not deep"]):
        print("\nDeployed, but a check failed (see above). Remedy: mend what it names, then `make deploy` again.")
        return MEND
    run["steps"].append({"name": "check", "seconds": round(time.monotonic() - checking, 1), "changed": 0})
    print(summary(folder, run, time.monotonic() - begun))
    return 0


def summary(folder: Path, run: dict[str, Any], seconds: float) -> str:
    """What a person wants to know at the end."""
    state = site_state(folder)
    lines = ["", "=" * 80, *run["summary"]]
    release = next((host["release"] for host in state["hosts"].values() if host["release"]), None)
    what = f"Dify {release}" if release else "Without Dify"
    lines += ["", f"{what}; {run['changed']} changed; {clock(seconds)} in all:"]
    merged: dict[str, float] = {}
    for step in run["steps"]:
        merged[step["name"]] = merged.get(step["name"], 0) + step["seconds"]
    lines.append("  " + ", ".join(f"{name} {clock(took)}" for name, took in merged.items() if took >= 0.05))
    if run["notices"]:
        lines += ["", "Worth knowing:", *(f"  - {notice}" for notice in run["notices"])]
    lines += [
        "",
        "Next:",
        "  make status                what runs",
        "  make logs SERVICE=api      what a service says" if release else "  make logs SERVICE=inference",
        "  make check                 test the hosts thoroughly",
        "=" * 80,
    ]
    return "\n".join(lines)


def on_hosts(folder: Path, arguments: list[str]) -> int:
    """Run the host's own ``kitctl`` as the service user, the terminal connected; the worst exit status."""
    worst = 0
    state = site_state(folder)
    hosts = state["hosts"] | state.get("workers", {})
    for name, host in hosts.items():
        command = as_service_user(host, [f"{host['kit_home']}/runtime/bin/kitctl", *arguments])
        if len(hosts) > 1:
            print(f"--- {name}")
        worst = max(worst, subprocess.run(command).returncode)
    return worst


def as_service_user(host: dict[str, Any], command: list[str]) -> list[str]:
    """The command line that runs a command on a host as its service user, the terminal connected."""
    if host["become"]:
        command = ["su", "-s", "/bin/sh", host["kit_user"], "-c", f"cd / && exec {shlex.join(command)}"]
    if host["connection"] != "local":
        command = ["ssh", "-t", *host.get("ssh", []), host["address"], shlex.join(command)]
    return command


def bench(folder: Path, arguments: list[str]) -> int:
    """Measure each host's ways to the model, on the host itself; the worst exit status."""
    worst = 0
    for name, host in site_state(folder)["hosts"].items():
        if len(site_state(folder)["hosts"]) > 1:
            print(f"--- {name}")
        worst = max(worst, subprocess.run(as_service_user(host, bench_command(name, host, arguments))).returncode)
    return MEND if worst else 0


def switch(site: str, folder: Path, model: str, arguments: list[str]) -> int:
    """Deploy another model, and when it has answered, make it the site's: until then the old one is."""
    known = sorted(path.stem for path in (ROOT / "inference/catalog").glob("*.yml"))
    if model not in known:
        fail(f"There is no model {model!r} in inference/catalog.\nRemedy: MODEL= one of {', '.join(known)}.")
    settings = folder / "group_vars/kit/settings.yml"
    text = settings.read_text() if settings.exists() else "---\n"
    if re.search(r"^inference_endpoint\s*:\s*[\"']?external", text, re.MULTILINE):
        fail(f"The model of {site} is another server's (inference_endpoint: external).\nRemedy: change provider_model.")
    others = [
        str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
        for path in sorted(folder.rglob("*.yml"))
        if path != settings and re.search(r"^\s*inference_model\s*:", path.read_text(), re.MULTILINE)
    ]
    if others:
        fail(f"inference_model stands in {', '.join(others)}.\nRemedy: write {model} there, then make deploy.")
    status = deploy(folder, [*arguments, "-e", f"inference_model={model}"])
    if status or "--check" in arguments:
        return status
    line = f"inference_model: {model}\n"
    text, replaced = re.subn(r"^inference_model\s*:.*\n?", line, text, flags=re.MULTILINE)
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(text if replaced else text.rstrip("\n") + "\n" + line)
    print(f"\n{model} is now the model of the site {site} ({settings}).")
    print("What the old one has left: make prune-models")
    return 0


def prune_models(folder: Path, arguments: list[str]) -> int:
    """List or delete what earlier models and engines have left on each host; the worst exit status."""
    worst = 0
    for name, host in site_state(folder)["hosts"].items():
        service = noted(name, host, "model_service")
        cache = noted(name, service, "cache")
        if len(site_state(folder)["hosts"]) > 1:
            print(f"--- {name}")
        command = [service["python"], "-m", "inference", "prune", f"--home={host['kit_home']}"]
        command += [f"--cache={cache}", *arguments]
        worst = max(worst, subprocess.run(as_service_user(host, command)).returncode)
    return MEND if worst else 0


def bench_command(name: str, host: dict[str, Any], arguments: list[str]) -> list[str]:
    """``python -m inference bench`` for a host, with the keys from the files that only the service user can read.

    Raises:
        SystemExit: the host has no model service of its own.
    """
    home, service = host["kit_home"], noted(name, host, "model_service")
    if "inference" not in host["services"]:
        fail(
            f"{name} asks a model server that the kit does not run.\nRemedy: vLLM's own `vllm bench serve`, from there."
        )
    dify = host["dify_mode"] != "skip"
    engines: dict[str, int] = service["engines"]
    ways = [f"engine=http://127.0.0.1:{min(engines.values())}/v1"]
    if len(engines) > 1:
        ways.append(f"router=http://127.0.0.1:{host['ports']['inference']}/v1")
    return [
        f"{home}/runtime/bin/kit-exec",
        *["--env-file", f"{home}/etc/env/inference.env"],
        *(["--env-file", f"{home}/etc/env/sample-app.env"] if dify else []),
        "--",
        *[service["python"], "-m", "inference", "bench", host["model"], f"--weights={service['weights']}"],
        *[f"--state={home}/var/inference/bench", f"--plain-port={service['plain_port']}"],
        *[f"--home={home}", "--engines", *engines],
        *(f"--way={way}" for way in ways),
        *([f"--dify=http://127.0.0.1:{host['ports']['gateway']}/v1"] if dify else []),
        *arguments,
    ]


def noted(name: str, host: dict[str, Any], what: str) -> Any:
    """Something from a host's record.

    Raises:
        SystemExit: the last deploy was an older kit's, which did not note it.
    """
    if what not in host:
        fail(f"{name} was deployed by a kit that did not note its {what.replace('_', ' ')} yet.\nRemedy: make deploy")
    return host[what]


def targets(site: str, state: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """What Prometheus can scrape of a site, as its file_sd_configs want it, and what has to be known about it.

    Raises:
        SystemExit: the last deploy was an older kit's.
    """
    found, notes = [], []
    for name, host in state["hosts"].items():
        near = []
        for entry in noted(name, host, "metrics"):
            bind = entry["bind"]
            open_to_others = not bind.startswith("127.")
            address = host["address"] if open_to_others and host["connection"] != "local" else "127.0.0.1"
            labels = {"job": entry["job"], "site": site, "host": name}
            if entry["path"] != "/metrics":
                labels["__metrics_path__"] = entry["path"]
            found.append({"targets": [f"{address}:{entry['port']}"], "labels": labels})
            if not open_to_others:
                near.append(f"{entry['job']} ({entry['port']})")
        if near:
            notes.append(f"Only on {name} itself can be scraped: {', '.join(near)}. Run Prometheus or an agent there.")
    return found, notes


def metrics(site: str, folder: Path) -> int:
    """Print the targets, and on stderr what has to be known about them."""
    found, notes = targets(site, site_state(folder))
    print(json.dumps(found, indent=2))
    print("\n".join(notes), file=sys.stderr)
    return 0


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--site", default="local", help="folder name below deploy/inventories")
    parser.add_argument(
        "verb", choices=["deploy", "check", "model", "prune-models", "metrics", "bench", "play", "host"]
    )
    options, arguments = parser.parse_known_args()
    folder = inventory(options.site)
    try:
        if options.verb == "deploy":
            return deploy(folder, arguments)
        if options.verb == "check":
            return checks(folder, arguments)
        if options.verb == "model":
            model = arguments.pop(0) if arguments and not arguments[0].startswith("-") else ""
            return switch(options.site, folder, model, arguments)
        if options.verb == "prune-models":
            return prune_models(folder, arguments)
        if options.verb == "metrics":
            return metrics(options.site, folder)
        if options.verb == "bench":
            return bench(folder, arguments)
        if options.verb == "play":
            status, _run = playbook(folder, arguments[0], arguments[1:])
            return MEND if status else 0
        return on_hosts(folder, arguments)
    except KeyboardInterrupt:
        print("\nInterrupted. Builds go on in the background; `make deploy` goes on from here.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
