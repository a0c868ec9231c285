"""A run that leases so many GiB of one GPU, and holds them until its standard input ends. It says what happens.

usage: holding.py NAME GIB [GPU ...]
"""

import sys

from orchestrator.config import HardwareConfig
from orchestrator.hardware import GIB, detect
from orchestrator.hardware.lease import Wanted, lease


def main() -> None:
    name, size, gpus = sys.argv[1], int(float(sys.argv[2]) * GIB), [int(index) for index in sys.argv[3:]]
    config = HardwareConfig(gpus=gpus or None)

    def say(text: str) -> None:
        print(text, flush=True)

    def choose() -> Wanted:
        found = detect(config, planning=False).gpus
        gpu = next((gpu for gpu in found if gpu.free >= size), None)
        if gpu is not None:
            chosen.append(gpu.index)
        return Wanted({gpu or found[0]: size}, gpu is not None)

    chosen: list[int] = []
    with lease(name, choose, say):
        say(f"GPU {chosen[-1]}")
        sys.stdin.read()


if __name__ == "__main__":
    main()
