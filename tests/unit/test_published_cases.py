"""Published models: what their files weigh, and what fits on common cards.

What is expected is worked out here from the models' published shapes and counts, and from what the engines are known
to take; none of it is read off the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from checkpoints import write_json
from composing import composed
from published_models import PUBLISHED
from published_sizes import (
    AWQ,
    BITSANDBYTES,
    DEEPSEEK_V3_FILES,
    EXL2_RUNS,
    GPTQ,
    LLAMA_1B_FILE,
    PLAIN,
    Bitsandbytes,
    Packed,
    Plain,
    Reported,
)

from orchestrator.checkpoint.bare import from_config
from orchestrator.checkpoint.spec import ModelSpec, model_spec
from orchestrator.config import Config
from orchestrator.errors import ConfigError, DoesNotFitError
from orchestrator.hardware import GIB, MIB, Hardware, detect
from orchestrator.plan import huggingface
from orchestrator.plan.planner import make_plan, must_fit
from orchestrator.plan.types import Candidate
from orchestrator.plan.vllm_shards import Packing

pytestmark = pytest.mark.usefixtures("hydra", "every_engine", "no_margins")

GB = 10**9
ENDLESS = 2**20  # tokens: a model whose context is bounded by memory only

SpecOf = Callable[..., ModelSpec]


@pytest.fixture(scope="module")
def spec_of(tmp_path_factory: pytest.TempPathFactory) -> SpecOf:
    @cache
    def of(name: str, context: int = ENDLESS) -> ModelSpec:
        folder = tmp_path_factory.mktemp("model")
        write_json(folder / "config.json", PUBLISHED[name][0] | {"max_position_embeddings": context})
        return model_spec(from_config(folder))

    return of


def machine(config: Config) -> Hardware:
    """The profile's cards as task=plan has them, in a machine with enough memory of its own."""
    return replace(detect(config.hardware, planning=True), host_total=512 * GIB, host_available=512 * GIB)


def planned(spec: ModelSpec, profile: str, *argv: str) -> Candidate:
    config = composed("task=plan", f"hardware={profile}", *argv)
    return make_plan(config, spec, machine(config)).chosen


def longest(spec: ModelSpec, profile: str, *argv: str) -> int:
    """The largest context that fits, in tokens, to a page; 0: none does."""
    config = composed("task=plan", f"hardware={profile}", "run.in_flight=1", *argv)
    hardware = machine(config)

    def fits(context: int) -> bool:
        asked = replace(config, model=replace(config.model, max_context=context))
        return make_plan(asked, spec, hardware).chosen.fits

    low, high = 0, ENDLESS // 256
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(256 * middle) else (low, middle)
    return 256 * low


def named(row: Any) -> str:
    return "-".join(str(part) for part in row)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes of files


@pytest.mark.parametrize("row", PLAIN, ids=named)
def test_unquantized_checkpoints_are_known_to_the_byte(spec_of: SpecOf, row: Plain) -> None:
    assert spec_of(row.name).nbytes + row.beside == row.size


def test_a_file_is_its_tensors_and_a_header(spec_of: SpecOf) -> None:
    header = LLAMA_1B_FILE - spec_of("Llama-3.2-1B").nbytes
    assert 100 * len(spec_of("Llama-3.2-1B").tensors) < header < 200 * len(spec_of("Llama-3.2-1B").tensors)


def test_deepseek_v3_as_it_is_published(spec_of: SpecOf) -> None:
    """Linears in 8 bits with a float32 for each 128 x 128 of them, the rest in 16; its last layer is there again."""
    spec = spec_of("DeepSeek-V3")

    def published(layer: int | None) -> float:
        tensors = (tensor for tensor in spec.tensors if layer is None or tensor.layer == layer)
        return sum(
            math.prod(tensor.shape) * (1 + 4 / 128**2 if tensor.role in ("linear", "expert") else 2)
            for tensor in tensors
        )

    embedding_and_head = 2 * 2 * 129280 * 7168
    ahead = published(60) + embedding_and_head + 2 * 2 * 7168 * 7168  # and the linear that joins two hidden states
    assert published(None) + ahead == pytest.approx(DEEPSEEK_V3_FILES, rel=0.001)


def packed_bytes(spec: ModelSpec, row: Packed, beside: Callable[[tuple[int, ...]], int]) -> int:
    """Of a checkpoint whose linears are packed, with so many bytes beside the packed ones of each."""
    packing = Packing(row.bits, row.group, zeros=True)
    return sum(
        packing.nbytes(*tensor.shape[-2:], tensor.shape[-1]) + beside(tensor.shape)
        if tensor.role in ("linear", "expert")
        else 2 * math.prod(tensor.shape)
        for tensor in spec.tensors
    )


@pytest.mark.parametrize("row", GPTQ, ids=named)
def test_gptq_checkpoints(spec_of: SpecOf, row: Packed) -> None:
    """The group of each input beside; AutoGPTQ's also have a bias of zeros: then all digits of the cards are met."""
    spec = spec_of(row.name)
    assert packed_bytes(spec, row, lambda shape: 4 * shape[1]) / GB == pytest.approx(row.gigabytes, rel=0.005)
    with_bias = packed_bytes(spec, row, lambda shape: 4 * shape[1] + 2 * shape[0])
    assert with_bias / GB == pytest.approx(row.gigabytes, abs=0.0051)


@pytest.mark.parametrize("row", AWQ, ids=named)
def test_awq_packs_the_same_without_the_order_of_the_rows(spec_of: SpecOf, row: Packed) -> None:
    size = packed_bytes(spec_of(row.name), row, lambda shape: 0)
    assert size / GB == pytest.approx(row.gigabytes, abs=0.0051)


@pytest.mark.parametrize("row", BITSANDBYTES, ids=named)
def test_bitsandbytes_checkpoints(spec_of: SpecOf, row: Bitsandbytes) -> None:
    double = row.method == "nf4"
    tensors = spec_of(row.name).tensors
    size = sum(huggingface.tensor_bytes(tensor, row.method, row.dtype, double) for tensor in tensors)
    assert size == pytest.approx(row.size, rel=0.001)
    if isinstance(row.size, int):  # to the byte: the file has some bytes of description beside each linear
        linears = sum(tensor.role == "linear" for tensor in spec_of(row.name).tensors)
        assert 0 < row.size - size <= 200 * linears


# ---------------------------------------------------------------------------------------------------------------------
# Llama-3-70B


LLAMA_70B = 141_107_412_992  # bytes in 16 bits


def test_a_70b_in_16_bits_over_four_cards_is_refused(spec_of: SpecOf) -> None:
    config = composed("task=plan", "hardware=4x24gb", "backend=vllm", "parallel.tensor=4", "quant.bits=16")
    spec, hardware = spec_of("Llama-3-70B"), machine(config)
    plan = make_plan(config, spec, hardware)
    assert [gpu.device for gpu in plan.chosen.gpus] == [f"cuda:{i}" for i in range(4)]
    for gpu in plan.chosen.gpus:
        assert gpu.weights == pytest.approx(LLAMA_70B / 4, rel=1e-3)
        assert f"{gpu.weights / GB:.1f}" == "35.3"
        assert gpu.capacity == 24 * GIB - 450 * MIB
    with pytest.raises(DoesNotFitError) as refused:
        must_fit(plan, config, spec, hardware)
    needs = plan.chosen.gpus[0].total / GIB
    assert needs > LLAMA_70B / 4 / GIB > 32
    assert f"cuda:0 needs {needs:.2f} GiB and has 23.56 GiB free" in refused.value.message


def exl2_bytes(name: str, bits: float, head_bits: float = 6.34) -> float:
    """On the GPUs: all but the embedding, the head at its own width."""
    config, parameters = PUBLISHED[name]
    embedding: int = config["vocab_size"] * config["hidden_size"]
    return ((parameters - 2 * embedding) * bits + embedding * head_bits) / 8


def kv_width(name: str) -> int:
    """Elements of the keys of one token in one layer."""
    config = PUBLISHED[name][0]
    heads: int = config["num_attention_heads"]
    keys: int = config["hidden_size"] // heads * config.get("num_key_value_heads", heads)
    return keys


def exl2_token(name: str, cards: int, cache_bits: int) -> float:
    """Bytes of one token of context: keys and values of every layer, and on each card the angles of a head.

    A quantized cache has 16 bits of scale for each 32 values, and on each card one layer in 16 bits as well.
    """
    config = PUBLISHED[name][0]
    angles: int = 2 * 2 * config["hidden_size"] // config["num_attention_heads"] * cards
    layers: int = config["num_hidden_layers"]
    keys = kv_width(name)
    if cache_bits == 16:
        return 2 * 2 * keys * layers + angles
    return 2 * keys * layers * (cache_bits + 0.5) / 8 + 2 * 2 * keys * cards + angles


def exl2_context(name: str, cards: int, bits: float, cache_bits: int) -> float:
    """Tokens that 24 GiB cards have room for with ExLlamaV2, were there no layers to place whole."""
    config = PUBLISHED[name][0]
    kept = 450 + 780 + 64 + 256  # MiB: by the driver, for the CUDA context, by autosplit on each card and while filling
    matrix = 2 * min(config["vocab_size"] * config["hidden_size"], 512 * MIB)  # dequantized for a matrix product
    step = 2048 * 8 * 2 * config["hidden_size"]  # hidden states, queries and the like of 2048 tokens
    left: float = cards * (24 * GIB - kept * MIB - matrix - step) - 128 * MIB - exl2_bytes(name, bits)
    return left / exl2_token(name, cards, cache_bits)


def exl2_longest(spec: ModelSpec, cards: int, bits: float, cache_bits: int) -> int:
    return longest(spec, f"{cards}x24gb", "backend=exllamav2", f"quant.bits={bits}", f"cache.bits={cache_bits}")


@pytest.mark.parametrize(
    ("name", "cards", "bits", "cache_bits", "thousands"),  # of tokens by exl2_context; 0: not even the weights fit
    [
        ("Llama-3-70B", 4, 4.0, 16, 170),
        ("Llama-3-70B", 4, 4.0, 4, 507),
        ("Llama-3-70B", 4, 6.0, 16, 118),
        ("Llama-3-70B", 4, 6.0, 8, 202),
        ("Llama-3-70B", 4, 8.0, 16, 66),
        ("Llama-3-70B", 4, 8.0, 4, 197),
        ("Llama-3-70B", 2, 4.0, 16, 32),
        ("Llama-3-70B", 2, 4.0, 4, 103),
        ("Llama-3-70B", 2, 6.0, 16, 0),
        ("Llama-3-70B", 2, 8.0, 4, 0),
        ("Llama-3-70B", 1, 4.0, 4, 0),
        ("Llama-2-13B", 1, 4.0, 16, 21),
        ("Llama-2-13B", 1, 6.0, 16, 17),
        ("Llama-2-13B", 1, 8.0, 16, 13),
        ("Llama-2-13B", 1, 8.0, 4, 43),
    ],
)
def test_context_that_exl2_has_room_for(
    spec_of: SpecOf, name: str, cards: int, bits: float, cache_bits: int, thousands: int
) -> None:
    room = max(0.0, exl2_context(name, cards, bits, cache_bits))
    assert round(room / 1000) == thousands
    assert 0.95 * room <= exl2_longest(spec_of(name), cards, bits, cache_bits) <= room


def test_a_4_bit_cache_holds_three_times_the_context(spec_of: SpecOf) -> None:
    """Not 16 / 4.5 = 3.6 times: each of four cards has a layer in 16 bits beside it."""
    plain, packed = (exl2_longest(spec_of("Llama-3-70B"), 4, 4.0, bits) for bits in (16, 4))
    assert packed / plain == pytest.approx(80 * 16 / (80 * 4.5 + 4 * 16), rel=0.03)


@pytest.mark.parametrize(("bits", "gigabytes"), [(2.4, 21.5), (4.0, 35.1), (4.65, 40.6), (6.0, 52.2), (8.0, 69.3)])
def test_weights_of_a_70b_in_exl2(spec_of: SpecOf, bits: float, gigabytes: float) -> None:
    """68.45 thousand million weights at so many bits, and a head of 1.05 at 6.34."""
    assert exl2_bytes("Llama-3-70B", bits) / GB == pytest.approx(gigabytes, abs=0.15)
    chosen = planned(spec_of("Llama-3-70B"), "4x24gb", "backend=exllamav2", f"quant.bits={bits}")
    assert sum(gpu.weights for gpu in chosen.gpus) == pytest.approx(exl2_bytes("Llama-3-70B", bits), rel=0.005)


@pytest.mark.parametrize("row", EXL2_RUNS, ids=named)
def test_what_the_author_of_exllamav2_ran(spec_of: SpecOf, row: Reported) -> None:
    asked = ("backend=exllamav2", f"quant.bits={row.bits}", "run.in_flight=1")
    assert planned(spec_of(row.name), row.profile, *asked, f"model.max_context={row.context}").fits


# ---------------------------------------------------------------------------------------------------------------------
# Llama-2-13B on one card


@pytest.mark.parametrize(("bits", "width"), [(4, 4.5), (8, 8.0)], ids=["nf4", "int8"])
def test_a_13b_under_bitsandbytes(spec_of: SpecOf, bits: int, width: float) -> None:
    embedding_and_head = 2 * 32000 * 5120
    weights = (PUBLISHED["Llama-2-13B"][1] - embedding_and_head) * width / 8 + 2 * embedding_and_head
    asked = ("backend=bitsandbytes", f"quant.bits={bits}")
    chosen = planned(spec_of("Llama-2-13B"), "1x24gb", *asked)
    assert chosen.fits
    assert chosen.gpus[0].weights == pytest.approx(weights, rel=0.001)
    # Of a token: the cache, and in a prefill four hidden states and three rows of the MLP; in int8 also a row in bytes
    # and one in 32 bits. A tenth of that for the allocator.
    prefill = 1.1 * (2 * (4 * 5120 + 3 * 13824 + 256) + (bits == 8) * (5120 + 4 * 13824))
    room = (24 * GIB - (450 + 780 + 64) * MIB - weights) / (40 * 2 * 2 * 5120 + prefill)
    assert longest(spec_of("Llama-2-13B"), "1x24gb", *asked) == pytest.approx(room, rel=0.04)  # there is a margin


@pytest.mark.parametrize("backend", ["vllm", "transformers", "exllamav2"])
def test_a_13b_in_16_bits_is_refused(spec_of: SpecOf, backend: str) -> None:
    chosen = planned(spec_of("Llama-2-13B"), "1x24gb", f"backend={backend}", "quant.bits=16", "quant.method=none")
    assert not chosen.fits
    assert sum(chosen.weights.values()) == pytest.approx(2 * PUBLISHED["Llama-2-13B"][1], rel=1e-3)
    card = chosen.gpus[0]
    assert card.total > card.weights + 4096 * 40 * 2 * 2 * 5120 > 28 * GB
    assert chosen.reasons == (f"cuda:0 needs {card.total / GIB:.2f} GiB and has 23.56 GiB free",)


# ---------------------------------------------------------------------------------------------------------------------
# vLLM over several cards


@pytest.mark.parametrize(
    ("name", "profile", "cards", "gigabytes", "fits"),
    [
        ("Llama-2-13B", "1x24gb", 1, 26.0, False),
        ("Llama-2-13B", "2x24gb", 2, 13.0, True),
        ("Llama-3-70B", "4x24gb", 4, 35.3, False),
        ("Llama-3-70B", "8x24gb", 8, 17.6, True),
        ("Llama-3-70B", "4x40gb", 4, 35.3, True),
        ("Llama-3-70B", "2x80gb", 2, 70.6, True),
        ("Mixtral-8x7B", "4x24gb", 4, 23.4, False),  # 25.3 GB a card, of which vLLM and NCCL take 2.1
        ("Mixtral-8x7B", "8x24gb", 8, 11.7, True),
        ("Mixtral-8x7B", "4x40gb", 4, 23.4, True),
        ("Qwen2.5-72B", "4x24gb", 4, 36.4, False),
        ("Qwen2.5-72B", "4x40gb", 4, 36.4, True),
        ("Qwen2.5-72B", "8x40gb", 8, 18.2, True),
    ],
)
def test_16_bits_over_cards_in_vllm(
    spec_of: SpecOf, name: str, profile: str, cards: int, gigabytes: float, fits: bool
) -> None:
    asked = ("backend=vllm", f"parallel.tensor={cards}", "quant.bits=16")
    chosen = planned(spec_of(name), profile, *asked)
    assert (chosen.fits, chosen.tensor_parallel) == (fits, cards)
    assert 2 * PUBLISHED[name][1] / cards / GB == pytest.approx(gigabytes, abs=0.06)
    for gpu in chosen.gpus:
        assert gpu.weights == pytest.approx(2 * PUBLISHED[name][1] / cards, rel=0.002)
    size = {"24gb": 24, "40gb": 40, "80gb": 79.6}[profile.split("x")[1]]  # GiB: an H100 has 81,559 MiB
    # MiB: driver, CUDA context, kernels, NCCL, CUDA graphs
    kept = 450 + 700 + 448 + (900 if cards > 1 else 0) + 80 + 1.5
    left = size * GIB - kept * MIB - 2 * PUBLISHED[name][1] / cards
    step = 200_000 * (8192 if size > 70 else 2048)  # at most 0.2 MB for each token of one
    token = PUBLISHED[name][0]["num_hidden_layers"] * 2 * 2 * kv_width(name) / cards
    found = longest(spec_of(name), profile, *asked)
    assert (left - step) / token <= found <= left / token if fits else found == 0


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        (2, ()),
        (4, ()),
        (8, ()),
        (3, ("64 attention heads", "8 key-value heads")),  # 29,568 rows and 152,064 words are whole multiples of 3
        (5, ("64 attention heads", "8 key-value heads", "29568 rows of the MLP", "padded to 152064")),
        (6, ("64 attention heads", "8 key-value heads")),
    ],
)
def test_how_qwen_72b_can_be_split(spec_of: SpecOf, ranks: int, said: tuple[str, ...]) -> None:
    asked = ("backend=vllm", f"parallel.tensor={ranks}", "quant.bits=16")
    chosen = planned(spec_of("Qwen2.5-72B"), "8x80gb", *asked)
    assert chosen.fits == (not said)
    assert len(chosen.reasons) == len(said)
    for reason, words in zip(chosen.reasons, said, strict=True):
        assert words in reason


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures of experts


@pytest.mark.parametrize(
    ("profile", "fits"), [("2x24gb", False), ("8x24gb", True), ("1x80gb", False), ("2x80gb", True)]
)
def test_mixtral_under_bitsandbytes_saves_two_percent(spec_of: SpecOf, profile: str, fits: bool) -> None:
    """Of 46.7 thousand million parameters 45.1 are the experts', which stay in 16 bits."""
    attention = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    weights = 2 * PUBLISHED["Mixtral-8x7B"][1] - attention * (16 - 4.5) / 8
    assert weights / (2 * PUBLISHED["Mixtral-8x7B"][1]) == pytest.approx(0.98, abs=0.001)
    chosen = planned(spec_of("Mixtral-8x7B"), profile, "backend=bitsandbytes", "quant.bits=4")
    assert chosen.fits == fits
    assert sum(gpu.weights for gpu in chosen.gpus) == pytest.approx(weights, rel=1e-4)


def test_deepseek_v3_is_too_large_for_eight_cards(spec_of: SpecOf) -> None:
    spec = spec_of("DeepSeek-V3")
    parameters = PUBLISHED["DeepSeek-V3"][1]
    experts = 58 * 256 * 3 * 7168 * 2048
    assert spec.parameters == parameters
    assert spec.cache_elements(1) == 61 * (512 + 64)
    for backend, bits in (("transformers", 16), ("bitsandbytes", 4)):
        chosen = planned(spec, "8x80gb", f"backend={backend}", f"quant.bits={bits}", "run.in_flight=1")
        assert not chosen.fits
        assert 2 * experts < sum(gpu.weights for gpu in chosen.gpus) < 2.001 * parameters
        assert sum(gpu.kv_cache for gpu in chosen.gpus) == 2 * 61 * 576 * chosen.max_context
    for backend, why in (
        (
            "vllm",
            f"its weights take {2 * parameters / GIB:.2f} GiB as they are, its cache {61 * 576:,} elements a token",
        ),
        ("exllamav2", "does not know the architecture DeepseekV3ForCausalLM"),
    ):
        with pytest.raises(ConfigError, match="DeepseekV3ForCausalLM") as refused:
            planned(spec, "8x80gb", f"backend={backend}")
        assert why in refused.value.message
