"""A plan as a picture: where a card's memory goes, and how many conversations of what length the KV cache holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from inference.planner import show
from inference.planner.cards import GIB
from inference.planner.outcome import Plan
from inference.problem import Problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which people of every kind of colour vision can tell apart.
COLOURS = {
    "language model": "#0072B2",
    "vision tower, projector": "#56B4E9",
    "CUDA, NCCL": "#7F7F7F",
    "largest step": "#E69F00",
    "experts' workspace": "#F0C46C",
    "image tokens": "#CC79A7",
    "CUDA graphs": "#D55E00",
    "KV cache": "#009E73",
    "left free": "#E8E8E8",
}
WIDE = 0.05  # of the card: a part as wide as that has its figure inside; three times as wide, its name, too


def draw(plan: Plan, path: Path) -> None:
    """Write the picture; its format follows from the name's end (png, svg, pdf).

    Raises:
        Problem: matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise Problem(
            "Drawing needs matplotlib, which this Python lacks. Remedy: `make plan PLOT=...` brings it along."
        ) from None
    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot

    figure, (memory, users) = pyplot.subplots(
        2, 1, figsize=(10, 6.4), height_ratios=[1, 1.7], layout="constrained", dpi=150
    )
    cards = f"{plan.tensor_parallel} x {plan.card.title}" if plan.tensor_parallel > 1 else plan.card.title
    figure.suptitle(f"{plan.model.title} on {cards}", fontsize=15, fontweight="bold", x=0.01, ha="left")
    _memory(memory, plan)
    _conversations(users, plan)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise Problem(
            f"The picture cannot be written to {path}: {error}. Remedy: another PLOT=, as plan.png."
        ) from None
    finally:
        pyplot.close(figure)


def _memory(axes: Axes, plan: Plan) -> None:
    total = plan.memory.total / GIB
    left = 0.0
    for name, size, _ in show.parts(plan):
        gib = size / GIB
        axes.barh(0, gib, left=left, color=COLOURS[name], edgecolor="white", linewidth=0.8, label=f"{name} {gib:.2f}")
        if gib > WIDE * total:
            dark = name == "left free"
            colour = "#333333" if dark else "white"
            text = f"{name}\n{gib:.1f}" if gib > 3 * WIDE * total else f"{gib:.1f}"
            axes.text(left + gib / 2, 0, text, ha="center", va="center", color=colour, fontweight="bold")
        left += gib
    budget = plan.memory.budget / GIB
    axes.axvline(budget, color="#333333", linewidth=1.2, linestyle="--")
    share = f"gpu-memory-utilization {plan.gpu_memory_utilization:.2f} "
    axes.text(budget, 0.45, share, ha="right", va="bottom", fontsize=9)
    axes.set_xlim(0, total)
    axes.set_ylim(-0.42, 0.65)
    axes.set_yticks([])
    axes.set_xlabel("GiB on each card" if plan.tensor_parallel > 1 else "GiB on the card")
    axes.legend(
        loc="upper left", bbox_to_anchor=(-0.01, -0.32), ncols=5, frameon=False, fontsize=8.5, columnspacing=1.2
    )
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)


def _conversations(axes: Axes, plan: Plan) -> None:
    """Both axes in powers of two: the cache's bound is a straight line, cut off by max-num-seqs and max-model-len."""
    longest, most, tokens = plan.max_model_len, plan.max_num_seqs, plan.kv_cache_tokens
    lengths = [256 * (longest / 256) ** (step / 200) for step in range(201)]
    numbers = [min(most, tokens / length) for length in lengths]
    axes.plot(lengths, numbers, color=COLOURS["KV cache"], linewidth=2.5)
    axes.fill_between(lengths, numbers, 0.5, color=COLOURS["KV cache"], alpha=0.12)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(256, longest * 1.12)
    axes.set_ylim(0.5, most * 2.2)
    axes.axhline(most, color="#333333", linewidth=0.8, linestyle=":")
    axes.text(270, most * 1.08, f"max-num-seqs {most}", va="bottom", fontsize=9)
    axes.axvline(longest, color="#333333", linewidth=0.8, linestyle=":")
    axes.text(longest * 0.97, most * 1.08, f"max-model-len {longest:,}", ha="right", va="bottom", fontsize=9)
    end = min(most, tokens / longest)
    axes.plot([longest], [end], "o", color=COLOURS["KV cache"])
    axes.annotate(
        f"{tokens / longest:.1f} of the longest at the same time",
        (longest, end),
        xytext=(-8, -7),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=9,
    )
    axes.set_title(f"Conversations at the same time ({tokens:,} tokens of KV cache)", loc="left", fontsize=11)
    axes.set_xlabel("tokens of each conversation")
    axes.set_ylabel("conversations")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:.0f} Ki" if value >= 1024 else f"{value:.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
