"""Choose the model's engine for a host: look at its GPUs, plan, and refuse what cannot be before anything is changed.

Returns ``hardware`` (cpu or cuda) and ``lock`` (its file in inference/locks, without .txt). The host plans again when
the service starts; that plan is the same, because nothing goes into it but the settings and the GPUs.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

# The kit's package for the model service lies beside deploy/; an action is imported as it is.
sys.path.append(str(Path(__file__).parents[3]))
from inference import catalog, hardware, launcher
from inference.planner import Plan, Wishes
from inference.problem import Problem
from inference.scale import Node

LOCKS = Path(__file__).parents[3] / "inference" / "locks"
# Triton, in which a part of the engine's GPU code is written, builds the way into each of its kernels with it.
COMPILERS = ("gcc", "clang")
# Billions of parameters: what has fewer proves the path and says little of use.
SMALL = 1.0
# In place of a small one, the first that the host's GPUs can take.
PROPOSED = ("kimi-vl-a3b-instruct", "qwen3-vl-8b", "qwen3-vl-4b")
# A C library that vLLM's CPU build is linked to, and that no wheel brings. A system without ldconfig doesn't tell.
NUMA = "libnuma.so.1"
# MiB that vLLM asks of /dev/shm for a queue between its processes (24 MiB by 10, v1/executor/multiproc_executor.py) and
# a little more; Docker gives its containers 64.
SHM = 256
LOOK = (
    f"if command -v {hardware.QUERY[0]} >/dev/null; then {shlex.join(hardware.QUERY)}; echo driver $?; fi; "
    f"for name in {' '.join(COMPILERS)}; do command -v $name >/dev/null && echo compiler; done; "
    f"case $(/sbin/ldconfig -p 2>/dev/null) in ''|*{NUMA}*) ;; *) echo without {NUMA};; esac; "
    "df -Pk /dev/shm 2>/dev/null | { read -r _; read -r _ size _ && echo shm $size; }; true"
)


class Seen(NamedTuple):
    """What a host has: GPUs, a C compiler, the library `NUMA`, and MiB of /dev/shm, None where it doesn't tell."""

    gpus: hardware.Gpus | None
    compiler: bool
    numa: bool
    shm: int | None


def looked(output: str, gpus: bool = True) -> Seen:
    """What `LOOK` has printed; without ``gpus``, theirs is not read.

    Raises:
        Problem: there is a driver, but it doesn't work.
    """
    before, driver, after = output.rpartition("driver ")
    status, _, rest = after.partition("\n") if driver else ("", "", output)
    found = hardware.seen(int(status), before) if driver and gpus else None
    size = re.search(r"^shm (\d+)$", rest, re.M)
    return Seen(found, "compiler" in rest, f"without {NUMA}" not in rest, int(size[1]) // 1024 if size else None)


def choice(model: catalog.Model, settings: Mapping[str, Any], output: str) -> tuple[dict[str, Any], list[str]]:
    """What the host will run, and what is worth knowing about it.

    Raises:
        Problem: it cannot serve the model; says what would.
    """
    wish = str(settings["hardware"])
    gpus, compiler, numa, shm = looked(output, gpus=wish != "cpu")
    used = hardware.choose(gpus, wish, model.engines)
    notices = [better] if (better := proposal(model, settings, gpus)) else []
    if used is None:
        engine = model.engine("cpu")
        if not numa:
            raise Problem(
                f"The host has no {NUMA}, which vLLM's CPU build needs. Remedy: let an administrator install it "
                "(`apt-get install libnuma1`, `dnf install numactl-libs`), or set inference_endpoint: external."
            )
        check_shm(shm)
        if gpus and wish == "auto":
            notices.append(f"{model.id} runs on processors only; the host's {gpus.card.title} is not used.")
        return {"hardware": "cpu", "lock": "cpu", "dtype": str(settings["dtype"]) or engine.dtype}, notices
    if not compiler:
        raise Problem(
            f"The host has a GPU, but neither {' nor '.join(COMPILERS)}, with which Triton builds vLLM's GPU kernels "
            "when they are first used. Remedy: install gcc on the host, or set inference_hardware: cpu."
        )
    plan = planned(model, settings, used)
    if plan.tensor_parallel > 1:
        check_shm(shm)
    version = model.engine("cuda").version
    lock = f"cuda-{version}" if version else "cuda"
    if not (LOCKS / f"{lock}.txt").is_file():
        raise Problem(
            f"{model.id} needs vLLM {version}, for which the kit has no lock. "
            f"Remedy: inference/locks/{lock}.in, then `make inference-lock`; or another model."
        )
    notices += [*plan.notes, described(plan)]
    notices += [f"Not used beside it: {unused}." for unused in used.unused]
    return {"hardware": "cuda", "lock": lock, "dtype": plan.dtype}, notices


def check_shm(size: int | None) -> None:
    """An engine of several processes passes its work through shared memory; ``size`` is what there is, MiB.

    Raises:
        Problem: that is too little.
    """
    if size is not None and size < SHM:
        raise Problem(
            f"The host's /dev/shm has {size} MiB, and the engine's processes need {SHM}. Remedy: {hardware.MORE_SHM}."
        )


def planned(model: catalog.Model, settings: Mapping[str, Any], gpus: hardware.Gpus) -> Plan:
    """The plan for the site's wishes.

    Raises:
        Problem: it cannot be; says what would.
    """
    wishes = Wishes(
        goal=str(settings["goal"]),
        dtype=str(settings["dtype"]),
        max_model_len=int(settings["max_model_len"]),
        max_num_seqs=int(settings["max_num_seqs"]),
        images_per_prompt=None if int(settings["images_per_prompt"]) < 0 else int(settings["images_per_prompt"]),
        gpu_memory_utilization=float(settings["gpu_memory_utilization"]),
    )
    node = Node(**settings["node"]) if settings.get("node") else None
    return launcher.settle(model, gpus, wishes, int(settings["replicas"]), node)


def proposal(model: catalog.Model, settings: Mapping[str, Any], gpus: hardware.Gpus | None) -> str:
    """How a site with a small model gets more out of its host, in one line; empty where there is nothing to say."""
    if model.parameters >= SMALL:
        return ""
    for other in map(catalog.load, PROPOSED):
        try:
            if used := hardware.choose(gpus, "auto", other.engines):
                plan = planned(other, settings, used)
                return f"The host's GPUs can serve a larger model: `make model MODEL={other.id}`. {described(plan)}"
        except Problem:
            continue  # the next one is smaller
    real = "`make model MODEL=smolvlm-500m`, where a model hub can be reached"
    if model.built:
        return f"{model.id} has random weights, so that its answers mean nothing. What sees for real: {real}."
    if not model.images:
        return f"{model.id} does not see images. What does: {real}; MODEL=tiny-kimi-vl everywhere, with random weights."
    return ""


def described(plan: Plan) -> str:
    """The plan in one line."""
    kernels = launcher.backends(plan.model, plan.card.compute_capability)
    cards = f"{plan.tensor_parallel} x {plan.card.title}" if plan.tensor_parallel > 1 else plan.card.title
    return (
        f"{plan.model.id} on {cards}: {plan.dtype}, {kernels}; {plan.max_model_len} tokens of context, "
        f"{plan.max_num_seqs} questions at the same time"
        + (f", {plan.images_per_prompt} images with one" if plan.images_per_prompt else "")
        + "."
    )


class ActionModule(ActionBase):
    """``kit_engine: {model: ..., hardware: auto, goal: ..., dtype: ..., ...}``."""

    TRANSFERS_FILES = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        settings = dict(self._task.args)
        try:
            model = catalog.load(str(settings["model"]))
            output = self._low_level_execute_command(LOOK)["stdout"]
            chosen, notices = choice(model, settings, str(output))
        except Problem as problem:
            raise AnsibleActionFail(str(problem)) from None
        return {"changed": False, **chosen, "kit_notice": notices}
