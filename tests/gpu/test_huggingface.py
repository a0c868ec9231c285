"""bitsandbytes and transformers on real GPUs: commands as typed, placement and peaks from result.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")
WAYS = {
    "default": [],
    "nf4 double": ["backend=bitsandbytes", "quant=nf4", "quant.double=true"],
    "fp4": ["backend=bitsandbytes", "quant=fp4"],
    "int8": ["backend=bitsandbytes", "quant=int8"],
    "16 bit": ["backend=transformers", "quant.bits=16"],
    "32 bit": ["backend=transformers", "quant.bits=32"],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return tmp_path_factory.mktemp("artifacts")


def run(folder: Path, store: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "orchestrator", f"paths.artifacts={store}", f"paths.runs={folder}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (run_folder,) = folder.iterdir()
    result: dict[str, Any] = json.loads((run_folder / "result.json").read_text())
    result["answers"] = [json.loads(line) for line in (run_folder / "answers.jsonl").read_text().splitlines()]
    return result


@pytest.mark.parametrize("way", WAYS)
def test_it_answers_from_the_gpu_it_was_placed_on(way: str, tmp_path: Path, store: Path) -> None:
    result = run(tmp_path, store, *WAYS[way])
    assert all(answer["answer"].strip() for answer in result["answers"])
    assert set(result["measured"]["placement"]) == {"cuda:0"}
    assert result["plan"]["gpus"][0]["weights"] == pytest.approx(result["measured"]["placement"]["cuda:0"], rel=0.02)
    assert result["measured"]["gpu_peak_bytes"][0] <= result["plan"]["gpus"][0]["total"]


def test_greedy_answers_of_32_bit_are_those_of_the_cpu(tmp_path: Path, store: Path) -> None:
    options = ["backend=transformers", "quant.bits=32", "generation.max_tokens=24"]
    on_gpu = run(tmp_path / "gpu", store, *options)
    on_cpu = run(tmp_path / "cpu", store, *options, "hardware=cpu")
    same = [a["answer"] == b["answer"] for a, b in zip(on_gpu["answers"], on_cpu["answers"], strict=True)]
    assert sum(same) >= len(same) - 1  # TF32-free float32, another order of additions: one tie may break


def test_a_split_over_two_gpus_is_placed_as_planned(tmp_path: Path, store: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    # A cap that one card cannot hold the model's share of cache and scratch under.
    result = run(
        tmp_path, store, "backend=transformers", "quant.bits=32", "hardware.memory_gib=1.22", "hardware.gpus=[0,1]"
    )
    assert set(result["measured"]["placement"]) == {gpu["device"] for gpu in result["plan"]["gpus"]}
