"""How long the light commands take, whole processes: --help, a misspelt key, task=plan; and a second run.

The second run of the default command builds nothing: its time is the engine's load plus the answers.
usage: startup.py [ROUNDS]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import save

COMMANDS = {
    "help": ["--help"],
    "misspelt key": ["quant.bitz=4"],
    "plan, embedded": ["task=plan"],
    "plan, 4x24gb": ["task=plan", "hardware=4x24gb"],
}
BOUND_S = 1.0


def seconds(arguments: list[str], folder: str) -> float:
    """Wall time of one whole process."""
    command = [sys.executable, "-m", "orchestrator", *arguments]
    if "--help" not in arguments:
        command.append(f"paths.runs={folder}")
    started = time.perf_counter()
    subprocess.run(command, capture_output=True, check=False)
    return time.perf_counter() - started


def default_run(folder: str) -> dict[str, float | list[str]]:
    """One run of the default command: what it built, and where its time went."""
    command = [sys.executable, "-m", "orchestrator", f"paths.runs={folder}/runs", f"paths.artifacts={folder}/store"]
    started = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    wall = time.perf_counter() - started
    last = max(Path(folder, "runs").iterdir())
    result = json.loads((last / "result.json").read_text())
    measured = result["measured"]
    return {
        "stages_run": [name.split("-")[0] for name in result["stages_run"]],
        "wall_s": round(wall, 2),
        "load_s": round(measured["load_s"], 2),
        "answers_s": round(measured["answers_s"], 2),
        "rest_s": round(wall - measured["load_s"] - measured["answers_s"], 2),
    }


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    with tempfile.TemporaryDirectory() as folder:
        times = {name: [seconds(arguments, folder) for _ in range(rounds)] for name, arguments in COMMANDS.items()}
        runs = [default_run(folder) for _ in range(3)]
        bare = [seconds_of([sys.executable, "-c", "import torch"]) for _ in range(5)]
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    result = {
        "rounds": rounds,
        "median_s": medians,
        "worst_s": {name: round(max(values), 3) for name, values in times.items()},
        "import_torch_median_s": round(statistics.median(bare), 3),
        "first_run": runs[0],
        "later_runs": runs[1:],
        "bound_s": BOUND_S,
        "within_bound": all(value < BOUND_S for value in medians.values()),
    }
    print(save("startup", result).read_text())
    sys.exit(0 if result["within_bound"] else 1)


def seconds_of(command: list[str]) -> float:
    """Wall time of any command, for comparison."""
    started = time.perf_counter()
    subprocess.run(command, capture_output=True, check=False)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
