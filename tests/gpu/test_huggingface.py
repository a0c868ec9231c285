"""bitsandbytes and transformers on real GPUs: commands as typed, placement and peaks from result.json."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator import embedded
from orchestrator.calibration import NAME
from orchestrator.hardware import DRIVER_KEEPS, GIB, MIB

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
    (store / NAME).unlink(missing_ok=True)  # the margins are those of a card on which nothing was measured
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


def capped_to(capacity: float) -> str:
    """hardware.memory_gib of cards on which so many bytes are left beside the driver's and the margin."""
    free = min(capacity * 4 / 3, capacity + 300 * MIB)  # of a card of up to 15 GiB
    return f"hardware.memory_gib={(free + DRIVER_KEEPS) / GIB}"


def test_a_split_over_two_gpus_is_placed_as_planned(tmp_path: Path, store: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    # The whole needs 1.26 GiB on one card, margin and all, its halves 0.89 GiB on the larger.
    result = run(tmp_path, store, "backend=transformers", "quant.bits=32", capped_to(960 * MIB), "hardware.gpus=[0,1]")
    assert set(result["measured"]["placement"]) == {gpu["device"] for gpu in result["plan"]["gpus"]}


ONE = ["run.in_flight=1", "model.max_context=512", "generation.max_tokens=24"]


def offloaded(tmp_path: Path, store: Path, share: float, *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results without a cap, and with one that leaves room for a share of the weights on the GPU."""
    whole = run(tmp_path / "whole", store, *ONE, *options)
    gpu = whole["plan"]["gpus"][0]
    cap = capped_to(gpu["total"] - (1 - share) * gpu["weights"])
    folder = tmp_path / "offload"
    keys = [cap, f"offload.folder={folder}"]
    size = 0.003 if gpu["weights"] < 50 << 20 else 0.1
    part = run(tmp_path / "part", store, *ONE, *options, *keys, f"offload.cpu_gib={size}")
    assert list(folder.iterdir()) == []
    return whole, part


def check_offload(result: dict[str, Any]) -> None:
    placement, weights = result["measured"]["placement"], result["plan"]["weights"]
    assert set(placement) == set(weights) == {"cuda:0", "cpu", "disk"}
    assert placement["cuda:0"] == pytest.approx(weights["cuda:0"], rel=0.02)
    assert (placement["cpu"], placement["disk"]) == (weights["cpu"], weights["disk"])
    gpu = result["plan"]["gpus"][0]
    assert result["measured"]["gpu_peak_bytes"][0] <= gpu["total"] - gpu["runtime"]
    assert result["measured"]["decode_tokens_per_s"] < result["plan"]["most_tokens_per_s"] * 2  # files may be cached


@pytest.mark.parametrize("bits", [32, 16])
def test_offload_to_memory_and_disk_answers_as_the_whole_model(bits: int, tmp_path: Path, store: Path) -> None:
    whole, part = offloaded(tmp_path, store, 0.7, "backend=transformers", f"quant.bits={bits}")
    check_offload(part)
    assert [a["answer"] for a in part["answers"]] == [a["answer"] for a in whole["answers"]]


@pytest.mark.parametrize("bits", [4, 8])
def test_offload_beside_quantized_layers(bits: int, tmp_path: Path, store: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(embedded.BASE, tmp_path / "model", ignore=shutil.ignore_patterns("*.bin", "*.index.json"))
    config = LlamaConfig.from_pretrained(embedded.BASE)
    config.update({"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64})
    config.update({"intermediate_size": 4096, "num_hidden_layers": 24, "initializer_range": 0.02})
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(tmp_path / "model")
    options = [f"model.path={tmp_path / 'model'}", "prompts.text=What is a list?"]
    _, part = offloaded(tmp_path, store, 0.75, "backend=bitsandbytes", f"quant.bits={bits}", *options)
    check_offload(part)
    assert "not quantized" in part["plan"]["notes"][-1]
