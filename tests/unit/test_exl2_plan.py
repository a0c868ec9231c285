"""The memory model of ExLlamaV2, its settings, and where it appears in a plan."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from composing import composed, hydra_ready
from small_models import LLAMA_70B, Llama, write_headers

from orchestrator.backends.exl2_setup import CONTEXT_BYTES, visible_devices
from orchestrator.backends.exllamav2 import end_tokens
from orchestrator.backends.table import METHODS
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import ModelSpec, model_spec
from orchestrator.errors import ConfigError, EngineUnavailableError
from orchestrator.hardware import GIB, Gpu, Hardware
from orchestrator.plan.exl2_sizes import cache_bytes, head_file_bytes, linear_loaded_bytes
from orchestrator.plan.exllamav2 import estimate
from orchestrator.plan.planner import make_plan
from orchestrator.plan.types import Ask, Candidate

# Of a head of (8192, 128256), measured in bits per weight with exllamav2 0.3.2.
HEADS = {2: 2.727, 3: 3.278, 4: 4.430, 5: 5.188, 6: 6.344, 8: 8.032}


def machine(*gib: float, host: float = 64) -> Hardware:
    gpus = tuple(Gpu(i, f"{g} GiB", int(g * GIB), int(g * GIB), (8, 6)) for i, g in enumerate(gib))
    return Hardware("auto", gpus, int(host * GIB), int(host * GIB), 8)


def ask(
    bits: float = 4.0, context: int | None = None, in_flight: int = 1, method: str = "exl2", **settings: Any
) -> Ask:
    keys = {name.replace("__", "."): value for name, value in settings.items()}
    return Ask("exllamav2", "exl2", bits, "float16", False, context, 4096, in_flight, keys)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return model_spec(open_checkpoint(write_headers(tmp_path_factory.mktemp("70b"), LLAMA_70B)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return model_spec(open_checkpoint(write_headers(tmp_path_factory.mktemp("small"), Llama(tied=True))))


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    with hydra_ready():
        yield


@pytest.mark.parametrize("head_bits", HEADS)
def test_the_head_is_exact(head_bits: int) -> None:
    assert head_file_bytes(8192, 128256, head_bits) * 8 / (8192 * 128256) == pytest.approx(HEADS[head_bits], abs=5e-4)


def test_a_linear_on_the_gpu() -> None:
    # 128 padded columns of 4 bits and, per row, 4 bytes of group map; down_proj drops its permutations instead.
    assert linear_loaded_bytes((100, 256), 4.0, "model.layers.0.self_attn.q_proj.weight") == 128 * 256 // 2 + 4 * 256
    assert linear_loaded_bytes((100, 256), 4.0, "model.layers.0.mlp.down_proj.weight") == 128 * 256 // 2


@pytest.mark.parametrize(("bits", "width"), [(16, 4.0), (8, 2.125), (6, 1.625), (4, 1.125)])
def test_the_cache(small: ModelSpec, bits: int, width: float) -> None:
    keys = small.kv_heads * small.head_dim
    assert cache_bytes(small, bits) == (width * keys, 0 if bits == 16 else 4 * keys)


# bits -> (GiB of weights on all GPUs, GPUs that it takes)
BIG = {2.4: (19.3, 1), 4.0: (32.1, 2), 6.0: (48.0, 3), 8.0: (64.0, 4)}


@pytest.mark.parametrize("bits", BIG)
def test_a_70b_on_four_cards(big: ModelSpec, bits: float) -> None:
    plan = estimate(big, machine(23.56, 23.56, 23.56, 23.56), ask(bits, 4096 if bits > 3 else 2048))
    gib, cards = BIG[bits]
    assert plan.fits, plan.reasons
    assert sum(gpu.weights for gpu in plan.gpus) / GIB == pytest.approx(gib, rel=0.01)
    assert len(plan.gpus) == cards
    assert sum(gpu.kv_cache for gpu in plan.gpus) == 80 * 4 * 8 * 128 * plan.max_context
    assert plan.host.weights == 2 * 32000 * 8192
    group = "+".join(gpu.device for gpu in plan.gpus)
    assert plan.weights == {"cpu": plan.host.weights, group: sum(gpu.weights for gpu in plan.gpus)}
    assert plan.device_map == {"": group, "model.embed_tokens": "cpu"}
    for gpu in plan.gpus:
        assert gpu.total <= gpu.capacity
        assert gpu.runtime == CONTEXT_BYTES


def test_a_70b_does_not_fit_on_two_cards_at_8_bits(big: ModelSpec) -> None:
    plan = estimate(big, machine(23.56, 23.56), ask(8.0))
    assert not plan.fits
    assert plan.reasons[0].startswith("cuda:1 needs ")
    assert plan.reasons[0].endswith(" GiB and has 23.56 GiB free")


def test_the_context_is_cut_to_what_fits(big: ModelSpec) -> None:
    plan = estimate(big, machine(23.56), ask(2.4, in_flight=4))
    assert plan.fits
    assert 256 <= plan.max_context < 4096
    longer = estimate(big, machine(23.56), ask(2.4, in_flight=4, cache__bits=4))
    assert longer.max_context > 1.5 * plan.max_context


def test_unequal_cards_are_filled_in_order(big: ModelSpec) -> None:
    plan = estimate(big, machine(12, 40, 40), ask(4.0))
    assert [round(gpu.weights / GIB) for gpu in plan.gpus] == [9, 23]


def test_the_context_is_rounded_up_to_pages(small: ModelSpec) -> None:
    plan = estimate(small, machine(24), ask(4.0, 300, in_flight=3))
    assert plan.max_context == 300
    assert plan.gpus[0].kv_cache == 2 * 4 * 128 * 512 * 3
    assert plan.weights.keys() == {"cpu", "cuda:0"}


def test_a_split_by_hand(big: ModelSpec) -> None:
    plan = estimate(big, machine(24, 24, 24, 24), ask(4.0, 4096, parallel__gpu_split=[12, 14, 16]))
    assert plan.fits, plan.reasons
    assert plan.gpu_split == (12, 14, 16)
    assert [gpu.device for gpu in plan.gpus] == ["cuda:0", "cuda:1", "cuda:2"]
    for gpu, gib in zip(plan.gpus, plan.gpu_split, strict=True):
        assert gpu.weights < gib * GIB
    short = estimate(big, machine(24, 24), ask(4.0, 4096, parallel__gpu_split=[12, 14]))
    assert not short.fits
    said = short.reasons[0]
    assert "parallel.gpu_split=[12.0, 14.0] has no room for the weights" in said
    assert said.endswith("GiB are missing")
    [missing] = re.findall(r": (\d+\.\d\d) GiB are missing", said)
    enough = [12, 14 + float(missing) + 0.01]  # as good as told: the last GPU takes what the others left
    assert 5 < float(missing) < 12
    assert not estimate(big, machine(24, 24), ask(4.0, 4096, parallel__gpu_split=[12, 14 + float(missing) - 0.1])).fits
    assert not estimate(big, machine(24, 80), ask(4.0, 4096, parallel__gpu_split=enough)).reasons


def test_a_tiny_share_first_as_on_the_gpu_machine(small: ModelSpec) -> None:
    plan = estimate(small, machine(24, 24), ask(4.0, 2048, parallel__gpu_split=[0, 24]))
    assert plan.fits
    assert ([gpu.device for gpu in plan.gpus], plan.gpu_split) == (["cuda:1"], (24,))


@pytest.mark.parametrize("gib", [(24, 1, 24), (1, 24, 24), (24, 24, 1)])
def test_a_card_without_room_for_a_layer_is_left_out(big: ModelSpec, gib: tuple[float, ...]) -> None:
    plan = estimate(big, machine(*gib), ask(4.0, 2048))
    assert plan.fits, plan.reasons
    assert [gpu.device for gpu in plan.gpus] == [f"cuda:{i}" for i, size in enumerate(gib) if size > 1]
    assert sum(gpu.weights for gpu in plan.gpus) == sum(
        gpu.weights for gpu in estimate(big, machine(24, 24), ask(4.0, 2048)).gpus
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant.head_bits": 7}, "quant.head_bits=7 is not one of 2, 3, 4, 5, 6, 8"),
        ({"cache.bits": 5}, "cache.bits=5 is not one of 16, 8, 6, 4"),
        ({"parallel.gpu_split": [1, 2, 3]}, "is for 3 GPUs, and there are 2"),
        ({"parallel.gpu_split": "half"}, "parallel.gpu_split=half is neither auto nor a list of GiB"),
        ({"parallel.gpu_split": [0, 0]}, "parallel.gpu_split=[0, 0]: no GPU gets any"),
        ({"parallel.gpu_split": [-1, 9]}, "parallel.gpu_split=[-1, 9]: a GPU cannot take less than 0 GiB"),
        ({"parallel.gpu_split": [9, math.nan]}, "is neither auto nor a list"),
        ({"parallel.gpu_split": [9, "9"]}, "is neither auto nor a list"),
        ({"parallel.gpu_split": 22}, "is neither auto nor a list"),
        ({"quant.calibration.rows": 10}, "none is set"),
        ({"quant.calibration.length": 100}, "not a multiple of 128"),
        ({"quant.calibration.file": "nowhere.parquet"}, "is not a file"),
        ({"quant.measurement": "nowhere.json"}, "is not a file"),
    ],
)
def test_settings_that_cannot_be(small: ModelSpec, settings: dict[str, Any], message: str) -> None:
    keys = {name.replace(".", "__"): value for name, value in settings.items()}
    with pytest.raises(ConfigError, match=message.replace("[", r"\[").replace("]", r"\]")):
        estimate(small, machine(24, 24), ask(**keys))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "a", r"rows\.csv is not one of \.parquet, \.txt, \.jsonl"),
        ("rows.txt", "", r"rows\.txt is empty"),
        ("rows.txt", " \n\n", r"rows\.txt holds no text: only blank lines"),
        ("rows.jsonl", "\n{", r"rows\.jsonl line 2 is not JSON"),
        ("rows.jsonl", '{"text": "cut \\ud83d"}', "line 1 holds half of a surrogate pair, which is no character"),
        ("rows.parquet", "no parquet", r"rows\.parquet is no whole \.parquet file"),
        ("rows.parquet", "PAR", r"rows\.parquet is no whole \.parquet file"),
        ("rows.parquet", "PAR1 and cut", r"rows\.parquet is no whole \.parquet file"),
        (
            "rows.jsonl",
            '{"texts": "a"}',
            r'line 1 has no text\. It takes an object a line with "text", "prompt" or "mess',
        ),
        ("rows.jsonl", '{"messages": [{"role": "x", "content": "a"}]}', "line 1 has no text"),
    ],
)
def test_calibration_files_that_cannot_be(
    small: ModelSpec, tmp_path: Path, name: str, content: str, message: str
) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        estimate(small, machine(24), ask(quant__calibration__file=str(file)))


def test_without_a_gpu_it_is_not_there(small: ModelSpec) -> None:
    with pytest.raises(EngineUnavailableError, match="backend=exllamav2 needs a CUDA GPU") as caught:
        make_plan(composed("backend=exllamav2"), small, machine())
    assert "task=plan hardware=4x24gb" in caught.value.hint
    assert all(c.backend != "exllamav2" for c in make_plan(composed(), small, machine()).candidates)


def backends(candidates: tuple[Candidate, ...]) -> set[str]:
    return {candidate.backend for candidate in candidates}


def test_with_a_gpu_it_is(small: ModelSpec) -> None:
    found = make_plan(composed("quant.bits=4"), small, machine(24)).candidates
    assert [(c.backend, c.method) for c in found if not c.needs] == [
        ("bitsandbytes", "nf4"),
        ("exllamav2", "exl2"),
    ]
    every = make_plan(composed("backend=exllamav2"), small, machine(24)).candidates
    assert [(c.method, c.bits, c.dtype) for c in every] == [("exl2", b, "float16") for b in (8.0, 6.0, 4.0)]
    (plain,) = make_plan(composed("backend=exllamav2", "quant=none"), small, machine(24)).candidates
    assert (plain.method, plain.bits, plain.fits) == ("none", 16.0, True)
    assert backends(make_plan(composed("cache.bits=8"), small, machine(24)).candidates) == {"exllamav2", "vllm"}
    assert backends(make_plan(composed("cache.bits=6"), small, machine(24)).candidates) == {"exllamav2"}
    (odd,) = make_plan(composed("backend=exllamav2", "quant.bits=4.65"), small, machine(24)).candidates
    assert odd.bits == 4.65


def test_widths_and_dtypes_that_it_does_not_have(small: ModelSpec) -> None:
    with pytest.raises(ConfigError, match=r"exl2 at 2\.25 to 8 bits"):
        make_plan(composed("backend=exllamav2", "quant.bits=2"), small, machine(24))
    with pytest.raises(ConfigError, match=r"model\.dtype=bfloat16"):
        make_plan(composed("backend=exllamav2", "model.dtype=bfloat16"), small, machine(24))


def test_an_architecture_that_it_would_take_for_another(tmp_path: Path) -> None:
    from dataclasses import replace

    spec = replace(model_spec(open_checkpoint(write_headers(tmp_path, Llama()))), architecture="DeepseekV3ForCausalLM")
    with pytest.raises(ConfigError, match="does not know the architecture DeepseekV3ForCausalLM"):
        make_plan(composed("backend=exllamav2"), spec, machine(24))
    assert "exllamav2" not in backends(make_plan(composed(), spec, machine(24)).candidates)


def test_a_loss_depends_on_the_bits() -> None:
    losses = [METHODS["exl2"].loss_at(bits) for bits in (8, 6, 4, 2.25)]
    assert losses == sorted(losses)
    assert METHODS["int8"].loss < losses[0]
    assert METHODS["nf4"].loss < losses[2] < METHODS["fp4"].loss


def test_visible_devices() -> None:
    assert visible_devices(["cuda:1", "cuda:0"], {}) == "1,0"
    assert visible_devices(["cuda:1"], {"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"}) == "GPU-b"


def test_end_tokens(tmp_path: Path) -> None:
    ids = {"<end>": 9}.get
    assert end_tokens(tmp_path, ids) == frozenset()
    (tmp_path / "config.json").write_text('{"eos_token_id": [2, 3]}')
    assert end_tokens(tmp_path, ids) == {2, 3}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    assert end_tokens(tmp_path, ids) == {5, 9}
