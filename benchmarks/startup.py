"""How long the light commands take, whole processes: --help, a misspelt key, task=plan. usage: startup.py [ROUNDS]"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

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


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    with tempfile.TemporaryDirectory() as folder:
        times = {name: [seconds(arguments, folder) for _ in range(rounds)] for name, arguments in COMMANDS.items()}
        bare = [seconds_of([sys.executable, "-c", "import torch"]) for _ in range(5)]
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    result = {
        "rounds": rounds,
        "median_s": medians,
        "worst_s": {name: round(max(values), 3) for name, values in times.items()},
        "import_torch_median_s": round(statistics.median(bare), 3),
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
