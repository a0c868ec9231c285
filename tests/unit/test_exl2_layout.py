"""EXL2 files without a GPU: random ones decode to what was encoded, real bits per weight, every kind of damage."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exl2_models import exl2_arrays, groups_of, stored, write_exl2, write_tensors
from safetensors.numpy import load_file, save_file
from small_models import Llama

from orchestrator.checkpoint.exl2_layout import check_data, check_exl2, decode, packed_linears, read_groups, stored_bits
from orchestrator.checkpoint.safetensors_header import read_safetensors_header
from orchestrator.checkpoint.tensors import TensorInfo
from orchestrator.errors import CheckpointError
from orchestrator.plan.exl2_sizes import head_file_bytes

SHAPE = Llama(layers=2)
UP = "model.layers.1.mlp.up_proj"


def tensors_of(file: Path) -> dict[str, TensorInfo]:
    return {info.name: info for info in read_safetensors_header(file).tensors}


def word(number: int) -> int:
    """32 bits as the int32 that they are."""
    return number - 2**32 if number >= 2**31 else number


def encoded(seed: int) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """(the tensors of a random linear, its weights): each column of a group is one long number, cut into words."""
    dice = random.Random(seed)
    columns = 32 * dice.randint(1, 3)
    widths = sorted(dice.choices((2, 3, 4, 5, 6, 8), k=dice.randint(1, 4)), reverse=True)
    groups = [(dice.choice((32, 64, 128)), bits) for bits in widths]
    groups[-1] = (dice.choice((8, 32, 40)), groups[-1][1])  # the last one may be cut off
    order = list(range(sum(rows for rows, _ in groups)))
    dice.shuffle(order)  # stored row of each input row
    words, pairs, packed_scales, largest, rows_of = [], [], [], [], []
    for rows, bits in groups:
        pairs += [bits, len(words)]
        codes = [[dice.randrange(2**bits) for _ in range(columns)] for _ in range(rows)]
        streams = [sum(codes[row][column] << row * bits for row in range(rows)) for column in range(columns)]
        words += [[word(s >> 32 * i & 0xFFFFFFFF) for s in streams] for i in range(-(-rows * bits // 32))]
        roots = [dice.randint(1, 16) for _ in range(columns)]
        eights = [roots[i : i + 8] for i in range(0, columns, 8)]
        packed_scales.append([word(sum(root - 1 << 4 * i for i, root in enumerate(eight))) for eight in eights])
        largest.append(np.float16(dice.uniform(0.001, 1.0)))
        scales = [np.float16(root * root) * (largest[-1] * np.float16(1 / 256)) for root in roots]
        zero = 2 ** (bits - 1)
        rows_of += [[np.float16(c - zero) * s for c, s in zip(row, scales, strict=True)] for row in codes]
    arrays = {
        "q_weight": np.array(words, np.int32),
        "q_invperm": np.array(order, np.int32),
        "q_scale": np.array(packed_scales, np.int32),
        "q_scale_max": np.array(largest, np.float16),
        "q_groups": np.array(pairs, np.int16),
    }
    return arrays, np.array([rows_of[place] for place in order], np.float32)


@pytest.mark.parametrize("seed", range(12))
def test_random_weights_decode_to_what_was_encoded(seed: int, tmp_path: Path) -> None:
    arrays, weights = encoded(seed)
    write_tensors(tmp_path / "one.safetensors", {f"x.{part}": array for part, array in arrays.items()})
    (linear,) = packed_linears(tensors_of(tmp_path / "one.safetensors")).values()
    check_data(linear)
    np.testing.assert_array_equal(decode(linear), weights)
    assert linear.bits == pytest.approx(8 * sum(a.nbytes for a in arrays.values()) / weights.size)


@pytest.mark.parametrize(("bits", "head_bits"), [(3.0, 4), (4.0, 6), (4.65, 6), (8.0, 8)])
def test_real_bits_from_headers(bits: float, head_bits: int, tmp_path: Path) -> None:
    shape = Llama(hidden=512, intermediate=1024, vocab=1000)
    folder = write_exl2(tmp_path, shape, bits, head_bits)
    layers, head = stored_bits(tensors_of(folder / "output.safetensors"))
    assert layers == pytest.approx(bits, rel=0.005)
    assert head * 512 * 1024 / 8 == head_file_bytes(512, 1024, head_bits)  # 1000 columns are padded
    summary = check_exl2(folder)
    assert (summary.bits, summary.head_bits) == (layers, head)
    assert len(summary.linears) == 2 * 7 + 1
    groups = groups_of(shape, bits, head_bits)[UP]
    assert summary.linears[UP] == pytest.approx(stored((1024, 512), groups) / (512 * 1024))


def test_a_head_that_is_not_quantized_is_one_all_the_same(tmp_path: Path) -> None:
    folder = write_exl2(tmp_path, SHAPE)
    file = folder / "output.safetensors"
    tensors = {name: array for name, array in load_file(file).items() if not name.startswith("lm_head.")}
    assert any(name.startswith("model.layers.0.") for name in tensors)
    save_file(tensors | {"lm_head.weight": np.ones((SHAPE.vocab, SHAPE.hidden), np.float16)}, file)
    assert check_exl2(folder).head_bits == 16
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="there is no quantized head"):
        check_exl2(folder)


GOOD = exl2_arrays((256, 128), [(32, 4)] * 4)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("q_groups", np.array([4, 0, 4, 4, 4, 8, 7, 12], np.int16), "group 3 is 7 bits from row 12"),
        ("q_groups", np.array([4, 0, 4, 4, 4, 4, 4, 12], np.int16), "group 1 is 4 bits from row 4"),
        ("q_groups", np.array([4, 0, 4, 4, 4, 8, 6, 12], np.int16), "group 3 has 4 rows of words for 32 of 6 bits"),
        ("q_groups", np.array([4, 0, 4, 4, 3, 8, 4, 12], np.int16), "group 2 has 4 rows of words for 42 of 3 bits"),
        ("q_groups", np.array([4, 0, 4, 4], np.int16), r"q_groups has shape \[4\], not \[8\]"),
        ("q_groups", np.array([4, 0] * 4, np.int32), "q_groups is I32, not I16"),
        ("q_weight", ("I32", (99, 256)), "which 128 rows cannot have"),
        ("q_weight", ("I32", (16, 128)), r"q_scale has shape \[4, 32\], not \[4, 16\]"),
        ("q_invperm", np.zeros(128, np.int32), "is no order of 128 rows"),
        ("q_invperm", np.arange(1, 129, dtype=np.int32), "is no order of 128 rows"),
        ("q_scale_max", np.array([1, np.inf, 1, np.nan], np.float16), "2 of 4 are not finite"),
    ],
)
def test_damage(part: str, value: Any, message: str, tmp_path: Path) -> None:
    fixed = {f"{UP}.{name}": array for name, array in GOOD.items()}
    check_exl2(write_exl2(tmp_path / "good", SHAPE, changed=fixed), 4.1)
    with pytest.raises(CheckpointError, match=message):
        check_exl2(write_exl2(tmp_path / "bad", SHAPE, changed=fixed | {f"{UP}.{part}": value}), 4.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leave_out": f"{UP}.q_invperm"}, r"there is no model\.layers\.1\.mlp\.up_proj\.q_invperm"),
        ({"signed": {"bits": 5.0}}, r"its layers have 3\.99\d bits per weight, not 5"),
        ({"signed": {"head_bits": 9}}, "its head has .* bits per weight, not 9"),
        ({"signed": {"quant_method": "gptq"}}, "quant_method is gptq"),
    ],
)
def test_a_model_that_is_not_what_it_says(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_exl2(write_exl2(tmp_path, SHAPE, **change))
    with pytest.raises(CheckpointError, match="there is no quantized layer"):
        stored_bits({})


def test_groups_start_beyond_what_a_signed_number_holds(tmp_path: Path) -> None:
    rows = 8 * 2**15  # 8 bits: 65536 rows of words; the starts are unsigned for the engine
    arrays = exl2_arrays((32, rows), [(rows // 2, 4), (rows // 2 - 128, 4), (128, 4)])
    arrays["q_groups"] = np.array([4, 0, 4, rows // 16, 4, rows // 8 - 16], np.uint16).view(np.int16)
    write_tensors(tmp_path / "one.safetensors", {f"x.{part}": array for part, array in arrays.items()})
    (linear,) = packed_linears(tensors_of(tmp_path / "one.safetensors")).values()
    assert [group.rows.stop for group in read_groups(linear)] == [rows // 2, rows - 128, rows]
