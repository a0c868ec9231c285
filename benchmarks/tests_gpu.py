"""Plan and measurement of every run that the GPU tests made, into results/tests_gpu_NAME.json.

    tests_gpu.py NAME FOLDER [--on FILE]

NAME: which tests, e.g. exllamav2. FOLDER: pytest's --basetemp, in which the runs' result.json are. FILE: a JSON of the
environment that they ran in, where it was another machine; this one's otherwise.

For each run: bytes on one GPU as planned, as NVML counted them for the process, and as torch's allocator did; what is
between the two is the CUDA context, kernels and libraries' own memory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import save


def rows(folder: Path) -> list[dict[str, Any]]:
    """One for each GPU of each run that ended well."""
    found = []
    for file in sorted(folder.rglob("result.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        plan, measured = result.get("plan"), result.get("measured", {})
        if not plan or not plan.get("gpus"):
            continue
        planned = {gpu["device"]: gpu for gpu in plan["gpus"]}
        for device in measured.get("memory", []):
            gpu = planned.get(device["device"])
            if gpu is None or device["by"] != "process":
                continue
            found.append(
                {
                    "test": file.relative_to(folder).parts[0],
                    "device": device["device"],
                    "kind": device["kind"],
                    **{key: plan[key] for key in ("backend", "method", "bits", "cache_bits", "max_context")},
                    "planned": {key: gpu[key] for key in ("weights", "kv_cache", "scratch", "runtime", "total")},
                    "nvml": device["measured"],
                    "allocator_peak": device["own"],
                    "context_and_kernels": device["measured"] - device["own"],
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--on", type=Path)
    args = parser.parse_args()
    found = rows(args.folder)
    if not found:
        parser.error(f"no run with a GPU under {args.folder}")
    measured_on = json.loads(args.on.read_text(encoding="utf-8")) if args.on else None
    print(save(f"tests_gpu_{args.name}", {"what": "bytes a GPU", "runs": found}, measured_on), len(found), "runs")


if __name__ == "__main__":
    main()
