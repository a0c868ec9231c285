"""bitsandbytes on the CPU: right answers before and after the first forward pass, and exact bytes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from asking import answer, load_engine, make_plan
from bitsandbytes import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from orchestrator.backends.hf_tensors import bytes_per_tensor, keep_4bit_layout
from orchestrator.backends.protocol import Request
from orchestrator.errors import EngineError

TOKENS = [104, 101, 108, 108, 111, 32, 116, 104, 101, 114, 101, 33] * 3
FORMS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]


def log_probabilities(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0, :-1].float().log_softmax(-1)


def scored(engine: Any) -> torch.Tensor:
    """The same from the engine's score, in the vocabulary's order."""
    score = engine.score(TOKENS, 512)
    top = torch.tensor(score.top_tokens)
    return torch.empty(top.shape).scatter_(-1, top, torch.tensor(score.top_logprobs))


def kl(wanted: torch.Tensor, got: torch.Tensor) -> float:
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def with_quantized_weights(folder: Path, quantize: Any) -> Any:
    """The float32 model, each linear but the head replaced by its weight there and back through bitsandbytes."""
    model = plain(folder)
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = quantize(module.weight.data)
    return model


def there_and_back_4bit(method: str, double: bool) -> Any:
    def quantize(weight: torch.Tensor) -> torch.Tensor:
        packed, state = F.quantize_4bit(weight, blocksize=64, quant_type=method, compress_statistics=double)
        return F.dequantize_4bit(packed, state).reshape(weight.shape)

    return quantize


def there_and_back_int8(weight: torch.Tensor) -> torch.Tensor:
    values, scales, _ = F.int8_vectorwise_quant(weight.half())
    return F.int8_vectorwise_dequant(values, scales)


@pytest.mark.parametrize(("method", "double"), FORMS)
def test_4bit_is_exact_before_and_after_its_first_pass(checkpoint: Path, method: str, double: bool) -> None:
    wanted = log_probabilities(with_quantized_weights(checkpoint, there_and_back_4bit(method, double)))
    engine = load_engine(make_plan(checkpoint, method, double_quant=double))
    packed = {name: p.clone() for name, p in engine._model.named_parameters()}
    before = engine.placement()

    for _ in range(2):
        torch.testing.assert_close(scored(engine), wanted, atol=2e-4, rtol=0)
        answer(engine, [Request("a", TOKENS, 3)])

    assert engine.placement() == before
    for name, parameter in engine._model.named_parameters():
        assert torch.equal(parameter, packed[name]), name
    # What reads the weights afterwards gets them right, too.
    linear = engine._model.model.layers[0].mlp.down_proj
    original = plain(checkpoint).model.layers[0].mlp.down_proj.weight
    read = F.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    assert torch.equal(read, there_and_back_4bit(method, double)(original.data))


@pytest.mark.skipif(not F.has_avx512bf16(), reason="only CPUs with AVX512-BF16 repack 4-bit weights")
@pytest.mark.parametrize(("method", "double"), FORMS)
def test_without_the_guard_something_goes_wrong(checkpoint: Path, method: str, double: bool) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=method,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=config
    )
    wanted = log_probabilities(with_quantized_weights(checkpoint, there_and_back_4bit(method, double)))
    linear = model.model.layers[0].mlp.down_proj
    read = F.dequantize_4bit(linear.weight.data, linear.weight.quant_state).clone()
    bytes_before = bytes_per_tensor(model)

    got = log_probabilities(model)

    assert kl(wanted, got) > 1e-5  # computed in bfloat16 although float32 was asked for
    assert bytes_per_tensor(model) != bytes_before
    garbage = F.dequantize_4bit(linear.weight.data, linear.weight.quant_state).float().reshape(read.shape)
    assert (garbage - read).norm() > 0.5 * read.norm()


def test_a_bitsandbytes_that_repacks_without_the_switch_is_refused() -> None:
    module = bnb.nn.Linear4bit(64, 64)
    keep_4bit_layout(module)
    assert module.support_avx512bf16_for_cpu is False
    del module.support_avx512bf16_for_cpu
    with pytest.raises(EngineError, match="has no support_avx512bf16_for_cpu"):
        keep_4bit_layout(module)


def test_int8_is_right_before_and_after_its_first_pass(checkpoint: Path) -> None:
    wanted = log_probabilities(with_quantized_weights(checkpoint, there_and_back_int8))
    engine = load_engine(make_plan(checkpoint, "int8"))
    before = engine.placement()
    first, second = scored(engine), scored(engine)
    assert torch.equal(first, second)
    assert engine.placement() == before
    # Activations are rounded to 8 bit as well: near, not equal. Weights of another row would give more than 1.
    assert kl(wanted, first) < 5e-3
    assert kl(log_probabilities(plain(checkpoint)), first) < 5e-3


def four_bit_bytes(rows: int, columns: int, double: bool) -> int:
    """Packed halves, a scale per 64 weights, the 16 levels.

    Doubled: the scales take a byte each, with a float for 256 of them, an offset and their own 256 levels.
    """
    count = rows * columns
    blocks = -(-count // 64)
    scales = blocks + 4 * -(-blocks // 256) + 4 + 4 * 256 if double else 4 * blocks
    return -(-count // 2) + scales + 4 * 16


@pytest.mark.parametrize(("method", "double"), [*FORMS, ("int8", False)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bytes_of_every_form_are_exact(checkpoint: Path, method: str, double: bool, dtype: str) -> None:
    engine = load_engine(make_plan(checkpoint, method, double_quant=double, dtype=dtype))
    model = plain(checkpoint)
    wide = 4 if dtype == "float32" else 2
    linears = {n: m for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    expected = 0
    for linear in linears.values():
        rows, columns = linear.weight.shape
        expected += rows * columns + 4 * rows if method == "int8" else four_bit_bytes(rows, columns, double)
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    expected += wide * sum(p.numel() for p in norms)
    expected += wide * 2 * 512 * 128  # embedding and head
    expected += 2 * 4 * 64 // 2  # the rotary frequencies, twice, always in float32
    placed = engine.placement()
    assert list(placed) == ["cpu"]
    assert sum(placed["cpu"].values()) == expected


def test_a_tied_head_is_counted_once(tied_checkpoint: Path) -> None:
    placed = load_engine(make_plan(tied_checkpoint, "nf4")).placement()["cpu"]
    assert placed["model.embed_tokens.weight"] == 512 * 128 * 4
    assert not [name for name in placed if name.startswith("lm_head")]


def test_a_checkpoint_that_is_quantized_already_is_loaded_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    engine = load_engine(make_plan(checkpoint, "nf4"))
    wanted = scored(engine)
    copy.deepcopy(engine._model).save_pretrained(tmp_path)
    engine._tokenizer.save_pretrained(tmp_path)
    again = load_engine(make_plan(tmp_path, "nf4"))
    assert torch.equal(scored(again), wanted)
    assert again.placement() == engine.placement()
