"""Converting and merging checkpoints: ours, transformers, PEFT and a plain copy, on the same files in one run.

Made-up Llama checkpoints of 1.1 and 3.2 billion parameters (float16, sharded .bin), an adapter of rank 16 on every
linear. Every contender is a whole process, its result on the disk (fsync) before its clock stops; the sources are in
the page cache for all of them. Peak memory: the kernel's (ru_maxrss, mapped file pages included), and that of
anonymous memory alone, sampled every 20 ms.
usage: checkpoints.py [--rounds N] [--models 1b,3b] [FOLDER]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import save
from made_up import ONE_B, THREE_B, Shape, write_adapter, write_base

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"1b": ONE_B, "3b": THREE_B}
TARGETS = {  # of medians; the first two: how much faster; the others: how many times the plain copy
    "convert: transformers / ours": (">=", 3.0),
    "merge: PEFT / ours": (">=", 3.0),
    "convert: ours / copy": ("<=", 1.5),
    "merge: ours / copy": ("<=", 2.5),
}

TRANSFORMERS = """
import sys, os, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
model.save_pretrained(sys.argv[2])
"""
PEFT = """
import sys, os, transformers, peft
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
model = peft.PeftModel.from_pretrained(model, sys.argv[3]).merge_and_unload()
model.save_pretrained(sys.argv[2])
"""
FLUSH = """
for name in os.listdir(sys.argv[2]):
    file = os.open(os.path.join(sys.argv[2], name), os.O_RDONLY)
    os.fsync(file)
"""


def ours(base: Path, out: Path, adapter: Path | None) -> list[str]:
    command = [sys.executable, "-m", "orchestrator", "task=convert", f"model.path={base}", f"output.path={out}"]
    command += [f"paths.artifacts={out.parent / 'store'}", f"paths.runs={out.parent / 'runs'}"]
    return command + ([f"model.adapter={adapter}"] if adapter else [])


def transformers(base: Path, out: Path, adapter: Path | None) -> list[str]:
    return [sys.executable, "-c", TRANSFORMERS + FLUSH, str(base), str(out)]


def peft(base: Path, out: Path, adapter: Path | None) -> list[str]:
    return [sys.executable, "-c", PEFT + FLUSH, str(base), str(out), str(adapter)]


def copy(base: Path, out: Path, adapter: Path | None) -> list[str]:
    return ["sh", "-c", 'mkdir "$2" && cp "$1"/* "$2" && sync "$2"/*', "sh", str(base), str(out)]


Contender = Callable[[Path, Path, "Path | None"], list[str]]
JOBS: dict[str, dict[str, Contender]] = {
    "convert": {"ours": ours, "transformers": transformers, "copy": copy},
    "merge": {"ours": ours, "PEFT": peft, "copy": copy},
}


def run(command: list[str]) -> dict[str, float]:
    """One process: wall time in s, CPU time in s, peaks in bytes."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=ROOT)
        peak = {"anonymous": 0}
        done = threading.Event()
        watcher = threading.Thread(target=watch, args=(process.pid, peak, done))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        done.set()
        watcher.join()
        if status:
            said.seek(0)
            raise SystemExit(f"{command[:4]} failed: {said.read().decode()[-2000:]}")
    peaks = {"peak_resident": usage.ru_maxrss * 1024, "peak_anonymous": peak["anonymous"]}
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, **peaks}


def watch(pid: int, peak: dict[str, int], done: threading.Event) -> None:
    status = Path(f"/proc/{pid}/status")
    while not done.wait(0.02):
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")]
        peak["anonymous"] = max(peak["anonymous"], *found, 0)


def measure(name: str, work: Path, rounds: int) -> dict[str, Any]:
    shape, base, adapter = MODELS[name], work / "base", work / "adapter"
    # In a process of its own: a contender's peak would begin at what its parent has in memory.
    making = multiprocessing.get_context("spawn").Process(target=make, args=(shape, base, adapter))
    making.start()
    making.join()
    size = sum(file.stat().st_size for file in base.glob("*.bin"))
    largest = max(2 * rows * columns for rows, columns in (*shape.linears().values(), (shape.vocab, shape.hidden)))
    result: dict[str, Any] = {"bytes": size, "largest_tensor": largest}
    for job, contenders in JOBS.items():
        runs: dict[str, list[dict[str, float]]] = {who: [] for who in contenders}
        for _ in range(rounds):
            for who, contender in contenders.items():
                subprocess.run(["sh", "-c", f'cat "{base}"/* > /dev/null; sync'], check=True)
                out = work / "out" / "result"
                out.parent.mkdir()
                runs[who].append(run(contender(base, out, adapter if job == "merge" else None)))
                shutil.rmtree(out.parent)
                print(name, job, who, json.dumps({k: round(v, 2) for k, v in runs[who][-1].items()}), flush=True)
        result[job] = {who: summary(rows) for who, rows in runs.items()}
    shutil.rmtree(work)
    return result


def make(shape: Shape, base: Path, adapter: Path) -> None:
    write_base(base, shape)
    write_adapter(adapter, shape)


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of times, the highest of peaks, and every wall time."""
    medians = {key: round(statistics.median(row[key] for row in rows), 2) for key in ("wall_s", "cpu_s")}
    peaks = {key: max(int(row[key]) for row in rows) for key in ("peak_resident", "peak_anonymous")}
    return {**medians, **peaks, "walls": [round(row["wall_s"], 2) for row in rows]}


def ratios(model: dict[str, Any]) -> dict[str, float]:
    """The four that have a target, of medians."""
    wall = {job: {name: row["wall_s"] for name, row in model[job].items()} for job in JOBS}
    convert, merge = wall["convert"], wall["merge"]
    return {
        "convert: transformers / ours": round(convert["transformers"] / convert["ours"], 2),
        "merge: PEFT / ours": round(merge["PEFT"] / merge["ours"], 2),
        "convert: ours / copy": round(convert["ours"] / convert["copy"], 2),
        "merge: ours / copy": round(merge["ours"] / merge["copy"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default="1b,3b")
    parser.add_argument("folder", nargs="?")
    asked = parser.parse_args()
    result: dict[str, Any] = {"rounds": asked.rounds, "targets": TARGETS, "models": {}}
    for name in asked.models.split(","):
        work = Path(tempfile.mkdtemp(dir=asked.folder))
        try:
            model = measure(name, work / name, asked.rounds)
        finally:
            shutil.rmtree(work)
        result["models"][name] = model | {"ratios": ratios(model)}
        print(name, result["models"][name]["ratios"], flush=True)
    if set(result["models"]) == set(MODELS):
        print(save("checkpoints", result))


if __name__ == "__main__":
    main()
