"""The four-GPU benchmark, as far as it goes without a GPU: its parts, its plan, its report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # last: some of its names are also names of tests

import four_gpus

GIB = 2**30
LOAD: dict[str, Any] = {
    "fits": True,
    "context": 57_600,
    "load_s": 60.0,
    "weights": {f"cuda:{i}": 17 * GIB for i in range(4)},
    "devices": [{"device": f"cuda:{i}", "predicted": 23 * GIB, "measured": 22.9 * GIB} for i in range(4)],
    "cap": 24 * GIB,
    "decode_tokens_per_s": 30.0,
    "prefill_tokens_per_s": 4000.0,
}


def test_the_plan_refuses_16_bits_with_its_numbers(tmp_path: Path) -> None:
    shape = four_gpus.SHAPES["70b"]
    found = four_gpus.vllm_16(tmp_path, shape, ["hardware=4x24gb", "parallel.tensor=4"])
    assert (found["exit_code"], found["fits"], len(found["gpus"])) == (3, False, 4)
    assert all(gpu["weights"] > gpu["capacity"] for gpu in found["gpus"])
    assert any("cuda:0" in reason for reason in found["reasons"])


def test_the_report_of_some_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: dict[str, Any] = {
        "environment": {"gpus": ["NVIDIA H200"] * 4},
        "bandwidth": {"copy_bytes_per_s": dict.fromkeys(LOAD["weights"], 4e12)},
        "exl2-8": LOAD,
        "exl2-6": {"fits": False, "reasons": ["cuda:1 needs 30 GiB"]},
        "vllm-gptq": {"error": "OutOfMemoryError: x"},
        "sweep-one": {"seconds": 120.0},
        "sweep-all": {"seconds": 60.0},
    }
    for name, part in parts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    kept: dict[str, Any] = {}
    monkeypatch.setattr(four_gpus, "save", lambda name, value, where: kept.update(value, name=name, where=where))
    four_gpus.report(tmp_path)
    said = kept["summary"]
    assert (kept["name"], kept["where"]) == ("four_gpus", parts["environment"])
    assert said["exl2"]["exl2-8"]["inside_caps"]
    assert said["exl2"]["exl2-8"]["share_of_limit"] == pytest.approx(30 * 4 * 17 * GIB / 4e12, abs=1e-4)
    assert said["refused"] == {"exl2-6": ["cuda:1 needs 30 GiB"]}
    assert said["failed"] == {"vllm-gptq": "OutOfMemoryError: x"}
    assert said["sweep_all_over_one"] == 0.5
    assert said["gptq"] is None


def test_every_part_is_one_of_the_documentation() -> None:
    words = (four_gpus.__doc__ or "").replace(",", " ").replace(";", " ").split()
    assert set(four_gpus.parts(Path(), tiny=True)) <= set(words)
