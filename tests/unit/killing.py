"""Kills a merge at random moments, again and again, until one run is let through. Prints what happened as JSON.

A process of its own: it forks one child per run (torch is imported once), so nothing else may have started threads.
usage: killing.py BASE ADAPTER FOLDER KILLS SEED
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch  # noqa: F401  (before the forks)

from orchestrator.checkpoint.adapter import open_adapter
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.stages.merge import merge

SHARD_BYTES = 2 * 2**20


def run(base: Path, adapter: Path, out: Path) -> None:
    merge(
        open_checkpoint(base),
        [(open_adapter(adapter), 1.0)],
        out,
        dtype="bfloat16",
        shard_size=SHARD_BYTES,
        progress=lambda *_: None,
    )


def start(base: Path, adapter: Path, out: Path) -> int:
    pid = os.fork()
    if pid == 0:
        run(base, adapter, out)
        os._exit(0)
    return pid


def wait_for(pid: int, out: Path, shards: int) -> None:
    while (
        len(list(out.glob("*.done"))) < shards
        and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    ):
        time.sleep(0.001)


def main() -> None:
    base, adapter, folder = map(Path, sys.argv[1:4])
    kills, random_ = int(sys.argv[4]), random.Random(int(sys.argv[5]))
    os.waitpid(start(base, adapter, folder / "whole"), 0)
    shards = len(list((folder / "whole").glob("*.safetensors")))
    killed, folders, left = 0, 0, []
    while killed < kills:
        folders += 1
        out = folder / f"killed{folders}"
        while True:
            pid = start(base, adapter, out)
            # So many shards further: moments alone would all be early, or late, on a machine that is busy.
            wait_for(pid, out, len(list(out.glob("*.done"))) + random_.randrange(shards // 2))
            time.sleep(random_.uniform(0, 0.03))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if os.WIFEXITED(status):  # it was faster
                break
            killed += 1
            left.append(len(list(out.glob("*.done"))))
            if killed >= kills:
                os.waitpid(start(base, adapter, out), 0)
                break
    print(json.dumps({"killed": killed, "folders": folders, "finished_shards": left}))


if __name__ == "__main__":
    main()
