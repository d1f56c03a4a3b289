"""How fast answers come by each way to the model, as ratios to a plain ``vllm serve`` on the same host.

Measures with vLLM's own ``bench serve``. A benchmark, not a test: it judges nothing. Bounded in questions and in time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference import catalog, engine, hardware, launcher, probe
from inference.catalog import Model
from inference.hardware import Gpus
from inference.planner import Wishes
from inference.problem import Problem

PLAIN = "vllm serve"
COLUMNS = {
    "tokens/s": ("output_throughput", 1.0),
    "TTFT p50": ("p50_ttft_ms", -1.0),
    "TTFT p99": ("p99_ttft_ms", -1.0),
    "ITL p50": ("p50_itl_ms", -1.0),
    "ITL p99": ("p99_itl_ms", -1.0),
}


@dataclass(frozen=True)
class Load:
    """What is asked: lengths in tokens, and the seconds that one way may take."""

    questions: int = 16
    at_a_time: int = 4
    question_tokens: int = 128
    answer_tokens: int = 64
    seconds: int = 600


@dataclass(frozen=True)
class Way:
    """One way to the model. ``url`` is an OpenAI endpoint with its /v1, or Dify's service API with its /v1."""

    name: str
    url: str
    key: str
    dify: bool = False


def client(way: Way, model: str, tokenizer: Path, load: Load, folder: Path) -> list[str]:
    """The command line of the measuring client; the key comes from the environment (OPENAI_API_KEY)."""
    base, path = way.url.removesuffix("/v1"), "/v1/chat-messages" if way.dify else "/v1/chat/completions"
    return [
        *[sys.executable, "-m", "inference.vllm_cli", "bench", "serve"],
        *["--backend", "dify" if way.dify else "openai-chat"],
        *["--base-url", base, "--endpoint", path],
        *["--model", model, "--tokenizer", str(tokenizer)],
        # Of the same lengths by every way, but other words: the engine's prefix cache must not know them yet.
        *["--dataset-name", "random", "--seed", str(sum(map(ord, way.name)))],
        *["--random-input-len", str(load.question_tokens), "--random-output-len", str(load.answer_tokens)],
        *["--num-prompts", str(load.questions), "--max-concurrency", str(load.at_a_time), "--num-warmups", "1"],
        *["--percentile-metrics", "ttft,itl,e2el", "--metric-percentiles", "50,99"],
        *["--ready-check-timeout-sec", "60", "--disable-tqdm"],
        *([] if way.dify else ["--ignore-eos", "--temperature", "0"]),
        *["--save-result", "--result-dir", str(folder), "--result-filename", "result.json"],
    ]


def measure(way: Way, model: str, tokenizer: Path, load: Load) -> dict[str, Any]:
    """What vLLM's benchmark found out about one way.

    Raises:
        Problem: it did not end in time, or no question was answered.
    """
    environment = {**os.environ, "OPENAI_API_KEY": way.key, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryDirectory(prefix="kit-bench-") as folder:
        command = client(way, model, tokenizer, load, Path(folder))
        try:
            done = subprocess.run(command, env=environment, capture_output=True, timeout=load.seconds)
        except subprocess.TimeoutExpired:
            raise Problem(
                f"{way.name} ({way.url}) did not answer {load.questions} questions in {load.seconds} s. "
                "Remedy: fewer questions or more seconds (--questions, --seconds)."
            ) from None
        result = Path(folder, "result.json")
        said = done.stderr.decode(errors="replace").strip().splitlines()
        if done.returncode or not result.is_file():
            raise Problem(f"{way.name} ({way.url}) could not be measured: {said[-1] if said else done.returncode}")
        found: dict[str, Any] = json.loads(result.read_text())
    if not found["completed"]:
        raise Problem(f"{way.name} ({way.url}) answered none of {load.questions} questions. Remedy: make check")
    return found


@contextlib.contextmanager
def plain_server(model: Model, weights: Path, state: Path, port: int, ready_seconds: int) -> Iterator[str]:
    """A ``vllm serve`` without anything that the kit sets but the model, its size and the address; its endpoint.

    Raises:
        Problem: it does not come up; the last lines of its log say why.
    """
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = [sys.executable, "-m", "inference.vllm_cli", "serve", str(weights)]
    command += ["--served-model-name", model.id, "--host", "127.0.0.1", "--port", str(port)]
    gpus, chosen = hardware.choose(hardware.find(), "auto", model.engines), None
    if gpus:  # without these two many a model does not fit into the GPUs
        chosen = launcher.settle(model, gpus, Wishes())
        command += [f"--tensor-parallel-size={chosen.tensor_parallel}", f"--max-model-len={chosen.max_model_len}"]
    settings = engine.Settings(weights, state, "127.0.0.1", port, plan=chosen, gpus=gpus.indices if gpus else ())
    environment = os.environ | engine.environment(model, settings)
    (state / "tmp").mkdir(mode=0o700, exist_ok=True)
    url = f"http://127.0.0.1:{port}/v1"
    file = state / "log"
    file.touch()
    file.chmod(0o600)  # as all that services write
    with file.open("wb") as log:
        # As supervisor starts services: what they leave behind is nobody else's.
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True, umask=0o077
        )
    try:
        end = time.monotonic() + ready_seconds
        while True:
            try:
                probe.ready(url, model.id, wait=5)
                break
            except probe.Silent:
                if process.poll() is not None or time.monotonic() > end:
                    last = (state / "log").read_text(errors="replace").strip().splitlines()[-3:]
                    raise Problem(
                        f"A plain vllm serve does not come up beside the deployed service; its log, {state / 'log'}, "
                        f"ends: {' | '.join(last)}. Remedy: the deployed service must have left memory for it, or "
                        "ARGS=--plain-port=0 to measure without it."
                    ) from None
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        for pid in [*engine.engine_processes(process.pid), *([process.pid] if process.poll() is None else [])]:
            os.kill(pid, signal.SIGKILL)


def floor_ms(model: Model, gpus: Gpus | None) -> float | None:
    """The least time between two tokens of a lone answer: every active weight is read once for each.

    None without a GPU, or for one whose memory's speed the planner does not know.
    """
    return launcher.settle(model, gpus, Wishes()).least_seconds_a_token * 1000 or None if gpus else None


def table(results: Mapping[str, Mapping[str, Any]], floor: float | None = None) -> str:
    """Markdown, one row a way: figures, and in brackets the ratio to the plain server, above 1 better than it.

    Args:
        results: by the ways' names, what vLLM's benchmark wrote.
        floor: least milliseconds between two tokens, for a column of its own.
    """
    plain = results.get(PLAIN)
    columns = [*COLUMNS, *(["ITL p50 to floor"] if floor else []), "failed"]
    lines = [f"| way | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name, result in results.items():
        cells = []
        for key, direction in COLUMNS.values():
            unit = " ms" if key.endswith("_ms") else ""
            text = f"{result[key]:.1f}{unit}"
            if plain and name != PLAIN and result[key] and plain[key]:
                text += f" ({(result[key] / plain[key]) ** direction:.2f})"
            cells.append(text)
        if floor:
            cells.append(f"{result['p50_itl_ms'] / floor:.1f}")
        cells.append(str(result["failed"]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(options: argparse.Namespace) -> None:
    """Measure as the command line says, and print the table.

    The deployed engines are stopped while the plain server is measured: side by side they would slow each other down,
    and a GPU's memory is given away only once. They are started again, whatever happens.

    Raises:
        Problem: a way could not be measured.
    """
    model = catalog.load(options.model)
    floor = floor_ms(model, hardware.choose(hardware.find(), "auto", model.engines))
    load = Load(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Load)})
    key = os.environ.get("VLLM_API_KEY", "")
    ways = [Way(name, url, key) for name, url in options.way]
    if options.dify:
        ways.append(Way("Dify", options.dify, os.environ.get("DIFY_APP_KEY", ""), dify=True))
    results = {}
    if options.plain_port:
        with (
            stopped(options.home, options.engines),
            plain_server(model, options.weights, options.state, options.plain_port, options.ready_seconds) as url,
        ):
            results[PLAIN] = _told(Way(PLAIN, url, key), options, load)
        for _, url in options.way:
            probe.ready(url, model.id, wait=options.ready_seconds)
    try:
        for way in ways:
            results[way.name] = _told(way, options, load)
    finally:  # what took minutes to measure is worth telling, also when a later way fails
        if results:
            print(
                f"{load.questions} questions of {load.question_tokens} tokens, {load.at_a_time} at a time, answers of "
                f"{load.answer_tokens} tokens; {model.id}\n\n{table(results, floor)}",
                flush=True,
            )


def _told(way: Way, options: argparse.Namespace, load: Load) -> dict[str, Any]:
    if not way.dify:
        probe.ready(way.url, options.model, wait=5)  # else only its time limit would end the benchmark
    begun = time.monotonic()
    result = measure(way, options.model, options.weights, load)
    print(f"measured {way.name} in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return result


@contextlib.contextmanager
def stopped(home: Path | None, services: Sequence[str]) -> Iterator[None]:
    """Without the deployed engines, services of supervisord in ``home``, which run again afterwards."""
    if not home:
        yield
        return
    control = [str(home / "runtime/venv/bin/supervisorctl"), "-c", str(home / "etc/supervisord.conf")]
    try:
        subprocess.run([*control, "stop", *services], check=True, stdout=subprocess.DEVNULL)
        yield
    finally:
        subprocess.run([*control, "start", *services], check=True, stdout=subprocess.DEVNULL)
