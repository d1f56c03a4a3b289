"""The launcher against the real engine: its argument parser takes what every card gets, and deaths are named.

A minute and a half on two cores, beside the engine's installation, which all modules share.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible.module_utils.kit_supervisor import Service, ServiceProblem, reconcile

from inference import catalog, causes, launcher
from inference.engine import Settings, command, engine_processes
from inference.hardware import Gpus
from inference.planner import Wishes, card
from inference.problem import Problem

from .conftest import REPO, Engine, Home

MODEL = "smollm2-135m"
CARDS = ("t4", "a10", "a100-40g", "a100-80g", "rtx4090", "l40s", "h100", "h200", "b200", "rtx5090")
# As inference.vllm_cli puts `vllm serve` together; the CPU build knows the options of the others, too.
PARSE = """
import json, sys
from vllm.entrypoints.cli.serve import cmd_init
from vllm.utils.argparse_utils import FlexibleArgumentParser
[serve] = cmd_init()
parser = FlexibleArgumentParser(prog="vllm")
serve.subparser_init(parser.add_subparsers(dest="subparser"))
for name, argv in json.load(sys.stdin).items():
    try:
        options = parser.parse_args(["serve", *argv])
    except SystemExit:
        sys.exit(f"{name}: {argv}")
    print(json.dumps({
        "name": name, "dtype": options.dtype, "images": options.limit_mm_per_prompt,
        "attention": str(options.attention_backend), "prefill": str(options.attention_config),
        "vision": str(options.mm_encoder_attn_backend),
    }))
"""


def environment(root: Path, **more: str) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "HOME": str(root), "PYTHONPATH": str(REPO), "VLLM_API_KEY": "k" * 16, **more}


def test_the_engines_parser_takes_what_every_card_gets(engine: Engine, tmp_path: Path) -> None:
    told: dict[str, list[str]] = {}
    for model in map(catalog.load, catalog.ids()):
        for name in CARDS if "cuda" in model.engines else ():
            for count in (1, 4):
                try:
                    plan = launcher.settle(model, Gpus(card(name), tuple(range(count)), "580.1"), Wishes())
                except Problem:
                    continue  # refused: tests/unit/test_launcher.py
                settings = Settings(tmp_path, tmp_path, "127.0.0.1", 1, plan=plan, gpus=tuple(range(count)))
                told[f"{model.id} on {count} {name}"] = command(model, settings)[4:]
    assert len(told) > 50
    # The Kimi-VL plugin registers its reasoning parser when the engine loads it; the parser's choices come before that.
    done = subprocess.run(
        [str(engine.python), "-c", PARSE],
        input=json.dumps(told),
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    parsed = {line["name"]: line for line in map(json.loads, done.stdout.splitlines()) if "name" in line}
    assert parsed.keys() == told.keys()
    for name, line in parsed.items():
        argv = dict(argument.split("=", 1) for argument in told[name] if "=" in argument)
        assert line["dtype"] == argv["--dtype"]
        assert argv["--attention-backend"] in line["attention"], line
        assert argv.get("--mm-encoder-attn-backend", "None") in line["vision"], line
        if prefill := argv.get("--attention-config.mla_prefill_backend"):
            assert prefill in line["prefill"], line
        assert line["images"] == json.loads(argv.get("--limit-mm-per-prompt", "{}"))


def broken(weights: Path, target: Path, change: str) -> Path:
    """A copy of the weights' folder that lacks a part of its numbers (``cut``), or all of them (``gone``)."""
    target.mkdir(parents=True)
    for file in weights.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, target)
        elif change == "cut":
            (target / file.name).write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    return target


DEATHS = {
    "cut weights": "a file of weights is damaged",
    "no weights": "files of weights are missing",
    "a context that is too long": "a conversation of 90000 tokens needs 1.93 GiB of KV cache, and there are 1.0 GiB",
}


@pytest.fixture(scope="module")
def logs(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What each of `DEATHS` has left. All start at the same time: an engine's start keeps little more than one core."""
    root = tmp_path_factory.mktemp("deaths")
    longer = ['--hf-overrides={"max_position_embeddings": 100000}', "--max-model-len=90000"]
    starts = {
        "cut weights": [f"--weights={broken(engine.weights, root / 'cut', 'cut')}"],
        "no weights": [f"--weights={broken(engine.weights, root / 'gone', 'gone')}"],
        "a context that is too long": [f"--weights={engine.weights}", f"--arguments={json.dumps(longer)}"],
    }
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for number, (name, options) in enumerate(starts.items()):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            argv = [str(engine.python), "-m", "inference", "serve", MODEL, "--hardware=cpu", *options]
            argv += [f"--state={root / str(number)}", f"--port={port}"]
            with (root / f"{number}.log").open("wb") as log:
                running[name] = subprocess.Popen(
                    argv, env=environment(root), stdout=log, stderr=log, start_new_session=True
                )
        ends = {name: process.wait(300) for name, process in running.items()}
        assert 0 not in ends.values()
        yield {name: (root / f"{number}.log").read_text(errors="replace") for number, name in enumerate(starts)}
    finally:
        for process in running.values():
            for pid in [*engine_processes(process.pid), *([process.pid] if process.poll() is None else [])]:
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("death", DEATHS)
def test_a_death_is_named(logs: dict[str, str], death: str) -> None:
    cause = causes.explain(logs[death])
    assert cause is not None, logs[death][-3000:]
    assert cause[0] == DEATHS[death]


def test_a_taken_port_ends_the_deploy_at_the_first_death(engine: Engine, home: Home) -> None:
    (home.root / "etc/env/inference.env").write_text(f"VLLM_API_KEY='kkkkkkkkkkkkkkkk'\nPYTHONPATH='{REPO}'\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        python = str(engine.python)
        serve = [python, "-m", "inference", "serve", MODEL, f"--weights={engine.weights}", "--hardware=cpu"]
        service = Service(
            "inference",
            command=(*serve, f"--state={home.root / 'var/inference'}", f"--port={port}"),
            env_file="etc/env/inference.env",
            stop_seconds=5,
            ready={"command": [python, "-m", "inference", "ready", MODEL, f"--url=http://127.0.0.1:{port}/v1"]},
            ready_seconds=300,
            explain=("env", f"PYTHONPATH={REPO}", python, "-m", "inference", "explain"),
        )
        with pytest.raises(ServiceProblem) as problem:
            reconcile([service], home.root)
    said = str(problem.value)
    assert "inference died right after its start: another program holds the engine's port" in said
    assert "Remedy: `ss -ltnp` shows which" in said
    log = (home.root / "var/log/inference.log").read_text()
    assert log.count("Address already in use") <= 2, "it was waited for after its cause was known"
