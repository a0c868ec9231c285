"""Does the memory of a merge grow with the model? Peak resident memory of the merge stage, four times the layers.

Made-up Llama checkpoints (random float16 words, sharded .bin) of about 0.5 and 2 GB, with a rank-16 adapter on every
linear; each merged in a process of its own, whose peak is read from the kernel. Memory-mapped file pages count as
resident while they are mapped: both figures are given, the peak of everything and that of anonymous memory.
usage: merge_memory.py [FOLDER]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import save
from made_up import Shape, write_adapter, write_base

LAYERS = (6, 24)
BOUND = 1.10  # the larger model's peak over the smaller's


def merge_here(base: str, adapter: str, out: str) -> None:
    """The merge stage alone, in this process; prints its own peaks (bytes)."""
    from orchestrator.checkpoint.adapter import open_adapter
    from orchestrator.checkpoint.folder import open_checkpoint
    from orchestrator.stages.merge import merge

    peak = {"anonymous": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            anonymous = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
            peak["anonymous"] = max(peak["anonymous"], anonymous * 1024)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    Path(out).mkdir()
    started = time.perf_counter()
    opened = open_checkpoint(Path(base))
    merge(
        opened, [(open_adapter(Path(adapter)), 1.0)], Path(out), dtype=None, shard_size=10**9, progress=lambda *_: None
    )
    seconds = time.perf_counter() - started
    done.set()
    status = Path("/proc/self/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    print(json.dumps({"peak_resident": resident, "peak_anonymous": peak["anonymous"], "seconds": round(seconds, 2)}))


def main() -> None:
    work = Path(tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None))
    rows = []
    try:
        for layers in LAYERS:
            shape = Shape(2048, 5632, layers, 32, 8, 8192)
            size = write_base(work / f"base{layers}", shape, shard_bytes=2 * 10**8)
            write_adapter(work / f"adapter{layers}", shape)
            names = [str(work / f"{what}{layers}") for what in ("base", "adapter", "out")]
            command = [sys.executable, __file__, "--merge", *names]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"layers": layers, "base_bytes": size, **json.loads(done.stdout.splitlines()[-1])})
            print(json.dumps(rows[-1]), flush=True)
            shutil.rmtree(work / f"base{layers}")
    finally:
        shutil.rmtree(work)
    ratio = {key: round(rows[1][key] / rows[0][key], 3) for key in ("peak_resident", "peak_anonymous")}
    result = {"rows": rows, "ratio": ratio, "bound": BOUND, "within_bound": max(ratio.values()) <= BOUND}
    print(save("merge_memory", result))
    sys.exit(0 if result["within_bound"] else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--merge"]:
        merge_here(*sys.argv[2:5])
    else:
        main()
