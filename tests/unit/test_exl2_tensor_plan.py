"""ExLlamaV2's tensor parallel: what each GPU gets, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composing import composed, hydra_ready
from small_models import LLAMA_70B, Llama, write_headers

from orchestrator.backends.exl2_tensors import bytes_per_tensor
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import ModelSpec, model_spec
from orchestrator.errors import ConfigError, DoesNotFitError
from orchestrator.hardware import GIB, Gpu, Hardware
from orchestrator.plan import estimate as estimate_module
from orchestrator.plan import exl2_attention
from orchestrator.plan.exl2_attention import lacks
from orchestrator.plan.exl2_tensor import heads_of, shares, weights_of_ranks
from orchestrator.plan.exllamav2 import estimate
from orchestrator.plan.planner import make_plan, must_fit
from orchestrator.plan.types import Ask, Candidate


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    with hydra_ready():
        yield


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return model_spec(open_checkpoint(write_headers(tmp_path_factory.mktemp("70b"), LLAMA_70B)))


def machine(*gib: float) -> Hardware:
    gpus = tuple(Gpu(i, f"{g} GiB", int(g * GIB), int(g * GIB), (8, 6)) for i, g in enumerate(gib))
    return Hardware("auto", gpus, 128 * GIB, 128 * GIB, 8)


def plan(spec: ModelSpec, *gib: float, ranks: int = 2, method: str = "exl2", **settings: Any) -> Candidate:
    keys = {"parallel.tensor": ranks} | {name.replace("__", "."): value for name, value in settings.items()}
    return estimate(spec, machine(*gib), Ask("exllamav2", method, 4.0, "float16", False, 4096, 4096, 4, keys))


@pytest.mark.parametrize(
    ("units", "heads", "each"),  # as integer_split of exllamav2 0.3.2 gives them
    [(224, [4, 4], [112, 112]), (224, [3, 3, 2], [75, 74, 75]), (216, [3, 3, 2], [72, 72, 72]), (7, [1, 1], [4, 3])],
)
def test_what_is_over_goes_to_the_gpu_with_fewer_heads(units: int, heads: list[int], each: list[int]) -> None:
    assert shares(units, heads) == each


def test_heads_of_three_gpus(big: ModelSpec) -> None:
    assert heads_of(big, 3) == [3, 3, 2]


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_gpu_gets_the_same_part(big: ModelSpec, ranks: int) -> None:
    cards = [23.56] * 4
    cut, whole = plan(big, *cards, ranks=ranks), plan(big, *cards, ranks=1)
    assert cut.fits, cut.reasons
    assert cut.tensor_parallel == ranks
    assert len(cut.gpus) == ranks
    assert len({gpu.weights for gpu in cut.gpus}) == 1
    assert sum(gpu.kv_cache for gpu in cut.gpus) == sum(gpu.kv_cache for gpu in whole.gpus)
    # Norms and the permutations of each linear are on every GPU: that is all that there is more of.
    more = sum(gpu.weights for gpu in cut.gpus) - sum(gpu.weights for gpu in whole.gpus)
    norms, inputs = 2 * 161 * 8192, 80 * (6 * 8192 * 8 + 28672 * 4) + 8192 * 8
    assert more == pytest.approx((ranks - 1) * (norms + inputs), rel=0.01)
    assert cut.weights == {"cpu": cut.host.weights} | {gpu.device: gpu.weights for gpu in cut.gpus}


def test_uneven_heads(big: ModelSpec) -> None:
    found = plan(big, 24, 24, 24, ranks=3)
    first, second, third = (gpu.kv_cache for gpu in found.gpus)
    assert first == second == third * 3 / 2
    assert found.gpus[2].weights < found.gpus[0].weights


def test_a_quantized_cache_keeps_a_layer_in_16_bits(big: ModelSpec) -> None:
    plain, packed = plan(big, 24, 24), plan(big, 24, 24, cache__bits=4)
    assert packed.gpus[0].kv_cache == pytest.approx(plain.gpus[0].kv_cache * 4.5 / 16)
    assert packed.gpus[1].scratch - plain.gpus[1].scratch == 4 * 8 * 128 * 4096 * 4 // 2


def test_the_first_gpu_has_room_for_a_whole_module(big: ModelSpec) -> None:
    """Each module is loaded there before it is cut, and a half of it laid together for the other; where the cache is
    smaller, that is the peak."""
    short = replace(big, max_context=256)
    keys = {"parallel.tensor": 2}
    asked = Ask("exllamav2", "exl2", 4.0, "float16", False, 256, 4096, 1, keys)
    first, second = estimate(short, machine(24, 24), asked).gpus
    head = 8192 * 32000 * 6.344 / 8  # LLAMA_70B of the tests has 32,000 words
    mlp = 3 * 8192 * 28672 * 4 / 8
    score = 2 * 256 * (2 * 8192 + 16000)  # what the other one takes for it
    assert first.scratch - second.scratch == pytest.approx(1.5 * max(head, mlp) - first.kv_cache - score, rel=0.01)


REFUSED = [
    ({"architecture": "Qwen3ForCausalLM"}, 2, "exl2", "not of Qwen3ForCausalLM"),
    ({}, 2, "none", "quantized to EXL2 only"),
    ({}, 4, "exl2", "is for 4 GPUs, and there are 2"),
    ({"kv_heads": 1}, 2, "exl2", "more than the 1 key-value heads"),
    ({"intermediate": 28700}, 2, "exl2", "no multiple of 128"),
    ({"heads": 32}, 2, "exl2", "32 heads of 128 are not the 8192"),
    ({"vocab": 100}, 2, "exl2", "the vocabulary is too narrow"),
]


@pytest.mark.parametrize(("change", "ranks", "method", "reason"), REFUSED)
def test_what_is_refused(big: ModelSpec, change: dict[str, Any], ranks: int, method: str, reason: str) -> None:
    found = plan(replace(big, **change), 24, 24, ranks=ranks, method=method)
    assert not found.fits
    assert reason in " ".join(found.reasons)


def test_cards_without_flash_attn(big: ModelSpec) -> None:
    old = Hardware("auto", tuple(replace(gpu, capability=(7, 5)) for gpu in machine(24, 24).gpus), GIB, GIB, 8)
    ask = Ask("exllamav2", "exl2", 4.0, "float16", False, 4096, 4096, 1, {"parallel.tensor": 2})
    found = estimate(big, old, ask)
    assert not found.fits
    assert "needs compute capability 8.0, and GPU 0 has 7.5" in " ".join(found.reasons)


def test_without_flash_attn_there_is_one_answer_at_a_time(big: ModelSpec) -> None:
    old = tuple(replace(gpu, capability=(7, 5)) for gpu in machine(40, 40).gpus)
    found = estimate(
        big, replace(machine(40, 40), gpus=old), Ask("exllamav2", "exl2", 4.0, "float16", False, 4096, 4096, 4, {})
    )
    assert found.fits
    assert found.max_in_flight == 1
    assert sum(gpu.kv_cache for gpu in found.gpus) == 80 * 4 * 8 * 128 * 4096
    assert "one answer at a time" in found.notes[0]
    assert plan(big, 40, 40, ranks=1).notes == ()


def make_python(folder: Path, flash: str | None) -> str:
    """An interpreter, with a flash-attn of this version that cannot be imported beside it; None: without any."""
    packages = folder / "packages"
    if flash is not None:
        (packages / f"flash_attn-{flash}.dist-info").mkdir(parents=True)
        (packages / f"flash_attn-{flash}.dist-info" / "METADATA").write_text(f"Name: flash-attn\nVersion: {flash}\n")
        for name in ("flash_attn.py", "flash_attn_2_cuda.py"):
            (packages / name).write_text("raise ImportError('not to be imported')")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize(
    ("flash", "what"),
    [
        (None, "flash-attn is not installed in "),
        ("2.3.6", "flash-attn 2.3.6 is too old in "),
        ("2.5.7", ""),
        ("2.6", ""),
    ],
)
def test_an_interpreter_is_asked_for_flash_attn(tmp_path: Path, flash: str | None, what: str) -> None:
    python = make_python(tmp_path, flash)
    said = lacks(python)
    assert said.startswith(f"{what}{python}" if what else "")
    assert bool(said) is bool(what)
    if said:
        assert f"to add it: {python} -m pip install 'flash-attn>=2.6' --no-build-isolation" in said


def test_an_interpreter_without_pip_gets_it_from_uv(tmp_path: Path) -> None:
    python = Path(make_python(tmp_path, None))
    python.write_text(python.read_text().replace('"$@"', '-S "$@"'))  # no site-packages: no pip
    assert f"uv pip install --python {python} 'flash-attn>=2.6'" in lacks(str(python))


def test_flash_attn_that_is_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXLLAMA_NO_FLASH_ATTN", "1")
    assert "EXLLAMA_NO_FLASH_ATTN is set" in lacks(make_python(tmp_path, "2.7"))


def test_one_that_does_not_answer_is_not_held_against_a_plan(tmp_path: Path) -> None:
    assert lacks(str(tmp_path / "nowhere")) == ""


@pytest.fixture
def without_flash_attn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine whose exllamav2 is in an interpreter without flash-attn."""
    python = make_python(tmp_path, None)
    monkeypatch.setattr(estimate_module, "interpreter", lambda *_: python)
    monkeypatch.setattr(exl2_attention, "lacks", lacks)
    return python


def test_a_plan_without_flash_attn_is_of_one_answer_at_a_time(big: ModelSpec, without_flash_attn: str) -> None:
    argv = ("backend=exllamav2", "quant.bits=4")
    found = make_plan(composed(*argv), big, machine(40, 40)).chosen
    assert found.fits
    assert found.max_in_flight == 1
    assert found.notes[0].startswith(f"one answer at a time: flash-attn is not installed in {without_flash_attn} (to")
    asked = make_plan(composed(*argv, "run.in_flight=4"), big, machine(40, 40)).chosen
    assert asked.max_in_flight == 1
    described = make_plan(composed(*argv), big, replace(machine(40, 40), described=True)).chosen
    assert (described.max_in_flight, described.notes) == (4, ())


def test_layers_are_not_cut_without_flash_attn(big: ModelSpec, without_flash_attn: str) -> None:
    config, cards = composed("backend=exllamav2", "quant.bits=4", "parallel.tensor=2"), machine(40, 40)
    plan = make_plan(config, big, cards)
    with pytest.raises(DoesNotFitError) as caught:
        must_fit(plan, config, big, cards)
    said = "parallel.tensor=2: exllamav2 cuts layers with flash-attn only; flash-attn is not installed in "
    assert f"{said}{without_flash_attn}" in caught.value.message
    assert "-m pip install 'flash-attn>=2.6' --no-build-isolation" in caught.value.message
    assert make_plan(config, big, replace(cards, described=True)).chosen.fits


def test_what_cannot_be_cut_is_shown_with_the_sizes_of_whole_layers(big: ModelSpec) -> None:
    refused, whole = plan(big, 24, 24, ranks=3), plan(big, 24, 24, ranks=1)
    assert not refused.fits
    assert refused.gpus == whole.gpus


def test_whole_layers_by_hand_and_cut_layers_exclude_each_other(big: ModelSpec) -> None:
    with pytest.raises(ConfigError, match="Leave out one of them") as caught:
        plan(big, 24, 24, parallel__gpu_split=[20, 20])
    assert "parallel.gpu_split=[20.0, 20.0]" in str(caught.value)


def test_one_rank_is_the_usual_split(big: ModelSpec) -> None:
    assert plan(big, 24, 24, ranks=1).device_map == plan(big, 24, 24, ranks=1, parallel__gpu_split="auto").device_map
    assert plan(big, 24, 24, ranks=1).tensor_parallel == 1


def test_the_engine_gets_it_from_the_configuration(big: ModelSpec) -> None:
    config = composed("backend=exllamav2", "quant.bits=4", "parallel.tensor=2")
    assert make_plan(config, big, machine(24, 24)).chosen.tensor_parallel == 2


def test_a_small_model_is_too_narrow(tmp_path: Path) -> None:
    spec = model_spec(open_checkpoint(write_headers(tmp_path, Llama())))
    assert "too narrow" in " ".join(plan(spec, 24, 24).reasons)


def test_the_placement_has_every_rank(big: ModelSpec) -> None:
    """exllamav2 keeps a list, of one for each GPU, where a tensor was."""
    halves = [{"q_weight": torch.zeros(4, 4, dtype=torch.int32)} for _ in range(2)]
    linear = SimpleNamespace(key="model.layers.0.self_attn.q_proj", q_tensors=halves, submodules=None)
    norm = SimpleNamespace(key="model.norm", weight=[torch.zeros(8, dtype=torch.half)] * 2, submodules=None)
    found = bytes_per_tensor(SimpleNamespace(modules=[linear, norm]), [])
    # Both ranks are on the CPU here, where a name stands once.
    assert found["cpu"] == {"model.layers.0.self_attn.q_proj.q_weight": 64, "model.norm.weight": 16}


def test_no_rank_of_a_large_model_is_far_from_its_part(big: ModelSpec) -> None:
    ranks = weights_of_ranks(big, 4.0, 6, 3)
    assert max(ranks) / min(ranks) < 1.1
