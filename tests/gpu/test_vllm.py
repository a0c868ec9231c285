"""vLLM on real GPUs: the commands as a user types them; memory as the cap says, agreement with float32 on the CPU.

The running Python has vllm, or $ORCHESTRATOR_ENGINES is a folder where task=engine has made it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator import embedded

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
torch = pytest.importorskip("torch")
GIB = 2**30
EAGER = "+backend.engine_args.enforce_eager=true"  # no graphs, no compilation: a minute less


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return tmp_path_factory.mktemp("artifacts")


def run(folder: Path, store: Path, *options: str) -> dict[str, Any]:
    places = [f"paths.artifacts={store}", f"paths.runs={folder}"]
    if "ORCHESTRATOR_ENGINES" in os.environ:
        places.append(f"paths.engines={os.environ['ORCHESTRATOR_ENGINES']}")
    command = [sys.executable, "-m", "orchestrator", *places, "generation.max_tokens=32", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (run_folder,) = folder.iterdir()
    result: dict[str, Any] = json.loads((run_folder / "result.json").read_text())
    result["answers"] = [json.loads(line) for line in (run_folder / "answers.jsonl").read_text().splitlines()]
    return result


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory, store: Path) -> list[str]:
    """The greedy answers of transformers in float32 on the CPU."""
    options = ("backend=transformers", "quant.bits=32", "hardware=cpu")
    return [a["answer"] for a in run(tmp_path_factory.mktemp("cpu"), store, *options)["answers"]]


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_it_answers_within_a_24_gib_card(
    width: int, graphs: bool, tmp_path: Path, store: Path, on_cpu: list[str]
) -> None:
    if torch.cuda.device_count() < width:
        pytest.skip("too few GPUs")
    options = ["backend=vllm", f"parallel.tensor={width}", "hardware.memory_gib=24", "quant.bits=16"]
    result = run(tmp_path, store, *options, *([] if graphs else [EAGER]))
    devices = {f"cuda:{i}" for i in range(width)}
    assert set(result["measured"]["placement"]) == devices
    for gpu in result["plan"]["gpus"]:
        assert gpu["weights"] == pytest.approx(result["measured"]["placement"][gpu["device"]], rel=0.02, abs=1 << 20)
    assert len(result["measured"]["gpu_peak_bytes"]) == width
    for peak in result["measured"]["gpu_peak_bytes"]:
        assert 16 * GIB < peak < 24 * GIB  # vLLM makes cache of what is left under the cap
    same = [a["answer"] == b for a, b in zip(result["answers"], on_cpu, strict=True)]
    assert sum(same) >= len(same) // 2  # 16 bit: most greedy answers are those of float32


def test_float32_answers_are_those_of_the_cpu(tmp_path: Path, store: Path, on_cpu: list[str]) -> None:
    result = run(tmp_path, store, "backend=vllm", "quant.bits=32", "hardware.memory_gib=8", EAGER)
    same = [a["answer"] == b for a, b in zip(result["answers"], on_cpu, strict=True)]
    assert sum(same) >= len(same) - 1  # another order of additions: one tie may break


def test_the_second_gpu_is_taken_where_it_is_asked_for(tmp_path: Path, store: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    result = run(tmp_path, store, "backend=vllm", "hardware.gpus=[1]", "hardware.memory_gib=8", EAGER)
    assert set(result["measured"]["placement"]) == {"cuda:1"}


def test_a_pipeline_of_two_stages(tmp_path: Path, store: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    result = run(tmp_path, store, "backend=vllm", "parallel.pipeline=2", "hardware.memory_gib=8", EAGER)
    assert set(result["measured"]["placement"]) == {"cuda:0", "cuda:1"}


def test_an_fp8_cache_holds_twice_the_tokens(tmp_path: Path, store: Path) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    result = run(tmp_path, store, "backend=vllm", "cache.bits=8", "quant.bits=16", "hardware.memory_gib=8", EAGER)
    assert all(answer["answer"].strip() for answer in result["answers"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [1, 2])
def test_a_gptq_folder(bits: int, width: int, tmp_path: Path, store: Path) -> None:
    if torch.cuda.device_count() < width:
        pytest.skip("too few GPUs")
    from gptq_models import write_embedded_gptq

    folder = write_embedded_gptq(tmp_path, store, bits)
    options = (f"model.path={folder}", f"parallel.tensor={width}", f"prompts.file={embedded.PROMPTS}")
    result = run(tmp_path / "run", store, "backend=vllm", "hardware.memory_gib=8", EAGER, *options)
    assert (result["plan"]["method"], result["plan"]["bits"], result["stages_run"]) == ("gptq", bits, [])
    for gpu in result["plan"]["gpus"]:
        assert gpu["weights"] == pytest.approx(result["measured"]["placement"][gpu["device"]], rel=0.02, abs=1 << 16)
    assert any("`collections`" in answer["answer"] for answer in result["answers"])
