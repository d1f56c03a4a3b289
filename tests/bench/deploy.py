"""How long a deploy takes by a throw-away user: cold, cached and with nothing to do. `make bench-deploy`, as root.

A benchmark, not a test: it judges nothing. Prints a Markdown table by step and writes it to build/bench-deploy.md.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.e2e.harness import ROOT, Outcome, Person

HOUR = 3600


def table(runs: dict[str, Outcome]) -> str:
    """Seconds by step, one column a run."""
    steps = list(dict.fromkeys(step for run in runs.values() for step in run.steps))
    lines = [f"| step | {' | '.join(runs)} |", f"|---|{'---:|' * len(runs)}"]
    for step in steps:
        lines.append(f"| {step} | {' | '.join(f'{run.steps.get(step, 0):.1f}' for run in runs.values())} |")
    lines.append(f"| **in all** | {' | '.join(f'**{run.seconds:.1f}**' for run in runs.values())} |")
    return "\n".join(lines)


def machine() -> str:
    """What the figures were measured on."""
    processor = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    name = processor[1] if processor else platform.machine()
    cores = len(os.sched_getaffinity(0))
    return f"{time.strftime('%Y-%m-%d')}, kit {commit}, {cores} cores ({name}), {memory:.0f} GiB; seconds"


def main() -> int:
    """Entry point."""
    if os.geteuid() != 0:
        print("Needs root, to make a throw-away user. Remedy: sudo make bench-deploy", file=sys.stderr)
        return 2
    person = Person("kit-bench")
    try:
        runs = {"cold": person.make("deploy", 2 * HOUR)}
        person.make('uninstall ARGS="-e kit_delete_data=yes"', 300)
        runs["cached"] = person.make("deploy", HOUR)
        runs["nothing to do"] = person.make("deploy", HOUR)
    finally:
        person.remove()
    text = f"{machine()}:\n\n{table(runs)}\n"
    target = ROOT / "build" / "bench-deploy.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text(text)
    print(f"\n{text}\nWritten to {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
