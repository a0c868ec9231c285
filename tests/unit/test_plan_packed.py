"""Checkpoints that are quantized already, in the plan: their bytes by hand, what may be asked, what is refused."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from composing import composed
from exl2_models import exl2_arrays, write_exl2, write_tensors
from packed_models import PACK, SIZES, tensors_of, write_packed
from small_models import LLAMA_70B, Llama, write_headers

from orchestrator.checkpoint.exl2_layout import check_exl2
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.safetensors_header import read_safetensors_header
from orchestrator.checkpoint.spec import ModelSpec, model_spec
from orchestrator.errors import CheckpointError, ConfigError, DoesNotFitError, EngineUnavailableError, RequestError
from orchestrator.hardware import GIB, MIB, Gpu, Hardware
from orchestrator.pipeline import Source, planned_spec
from orchestrator.plan.planner import make_plan, must_fit, runnable
from orchestrator.plan.types import Candidate, Plan

SHAPE = Llama(hidden=512, heads=8, kv_heads=4, intermediate=1024, vocab=1000)
ONE_KEY = Llama(hidden=512, heads=8, kv_heads=1, intermediate=1024, vocab=1000)
# The shapes of Qwen2.5-72B, and of its copies that were padded before they were quantized.
QWEN_72B = Llama(8192, 80, 64, 8, 29568, 152064, 32768)
PADDED_72B = Llama(8192, 80, 64, 8, 29696, 152064, 32768)

pytestmark = pytest.mark.usefixtures("hydra", "every_engine")


def cpu(gib: float = 64) -> Hardware:
    return Hardware("auto", (), int(64 * GIB), int(gib * GIB), 8)


def cards(count: int, gib: float = 24, capability: tuple[int, int] = (8, 6)) -> Hardware:
    gpus = tuple(Gpu(i, "card", int(gib * GIB), int(gib * GIB) - 450 * MIB, capability) for i in range(count))
    return Hardware("auto", gpus, int(256 * GIB), int(200 * GIB), 16)


def spec_of(folder: Path) -> ModelSpec:
    return model_spec(open_checkpoint(folder))


def planned(folder: Path, hardware: Hardware, *argv: str) -> Plan:
    return make_plan(composed(*argv), spec_of(folder), hardware)


def best(folder: Path, hardware: Hardware, *argv: str) -> Candidate:
    return planned(folder, hardware, *argv).chosen


# Bytes, by hand


def rank_bytes(shape: Llama, tp: int, zeros: bool, bits: int = 4, group: int = 128) -> int:
    """A rank's share of a GPTQ model: codes and scales cut with the linears, embedding and head in 16 bits."""
    kv = max(1, shape.kv_heads // tp) * shape.head_dim
    columns = {"q_proj": shape.hidden // tp, "k_proj": kv, "v_proj": kv} | dict.fromkeys(
        ("gate_proj", "up_proj"), shape.intermediate // tp
    )
    total = 0
    for out in columns.values():
        total += linear(out, shape.hidden, shape.hidden, bits, group, zeros)
    total += linear(shape.hidden, shape.hidden // tp, shape.hidden, bits, group, zeros)
    total += linear(shape.hidden, shape.intermediate // tp, shape.intermediate, bits, group, zeros)
    norms = (2 * shape.layers + 1) * shape.hidden
    ends = 2 * -(-shape.vocab // 64) * 64 // tp * shape.hidden
    return shape.layers * total + 2 * (norms + ends)


def linear(out: int, into: int, whole: int, bits: int, group: int, zeros: bool) -> int:
    groups = 1 if group < 0 else into // group
    return out * into * bits // 8 + groups * out * 2 + (groups * out * bits // 8 if zeros else 0)


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (8, 128), (4, -1)])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("shape", [SHAPE, ONE_KEY], ids=["4 keys", "1 key"])
def test_a_rank_of_vllm_holds_its_share_of_gptq(tmp_path: Path, shape: Llama, tp: int, bits: int, group: int) -> None:
    folder = write_packed(tmp_path, shape, "gptq", {"bits": bits, "group_size": group}, bits=bits, group=group)
    chosen = best(folder, cards(4), "backend=vllm", f"parallel.tensor={tp}")
    assert chosen.fits, chosen.reasons
    assert (chosen.method, chosen.bits, chosen.dtype, chosen.needs) == ("gptq", bits, "bfloat16", "")
    assert chosen.weights == {f"cuda:{i}": rank_bytes(shape, tp, True, bits, group) for i in range(tp)}


@pytest.mark.parametrize("tp", [1, 2])
def test_on_a_cpu_the_zeros_are_dropped(tmp_path: Path, tp: int) -> None:
    chosen = best(write_packed(tmp_path, SHAPE, "gptq"), cpu(), "backend=vllm", f"parallel.tensor={tp}")
    assert chosen.weights == {"cpu": tp * rank_bytes(SHAPE, tp, False)}
    assert chosen.dtype == "bfloat16"


def test_on_a_cpu_it_is_vllm_also_where_none_was_asked_for(tmp_path: Path) -> None:
    assert {c.backend for c in planned(write_packed(tmp_path, SHAPE, "gptq"), cpu()).candidates} == {"vllm"}


@pytest.mark.parametrize(("method", "bits"), [("awq", 4), ("compressed-tensors", 4), ("fp8", 8)])
def test_other_formats_of_vllm(tmp_path: Path, method: str, bits: int) -> None:
    folder = write_packed(tmp_path, SHAPE, method)
    chosen = best(folder, cards(2), "backend=vllm", "parallel.tensor=2")
    assert (chosen.method, chosen.bits, chosen.fits) == (method, bits, True)
    stored = sum(math.prod(size) * SIZES[dtype] for dtype, size in tensors_of(SHAPE, method).values())
    norms = 2 * (2 * SHAPE.layers + 1) * SHAPE.hidden
    padding = 2 * 2 * 24 * SHAPE.hidden  # the vocabulary: 1000 rows, 1024 of them held
    assert sum(chosen.weights.values()) == stored + norms + padding


def test_bitsandbytes_holds_what_is_stored(tmp_path: Path) -> None:
    folder = write_packed(tmp_path, SHAPE, "bitsandbytes")
    chosen = best(folder, cpu(), "model.dtype=float16")
    count = sum(out * into for out, into in SHAPE.linears().values())
    linears = count // 2 + 4 * count // 64 + len(SHAPE.linears()) * 64
    others = 2 * (2 * SHAPE.vocab * SHAPE.hidden + (2 * SHAPE.layers + 1) * SHAPE.hidden)
    assert chosen.host.weights == SHAPE.layers * linears + others + 4 * SHAPE.head_dim
    assert (chosen.backend, chosen.method, chosen.bits, chosen.double_quant) == ("bitsandbytes", "nf4", 4, False)


def test_exllamav2_holds_what_is_stored_and_a_group_map(tmp_path: Path) -> None:
    folder = write_exl2(tmp_path, SHAPE, 4, 6)
    spec = spec_of(folder)
    (chosen,) = make_plan(composed(), spec, cards(1)).candidates
    tensors = read_safetensors_header(folder / "output.safetensors").tensors
    stored = sum(tensor.nbytes for tensor in tensors)
    embedding = 2 * SHAPE.vocab * SHAPE.hidden
    rows = sum(tensor.shape[0] for tensor in tensors if tensor.name.endswith("q_invperm"))
    down = SHAPE.layers * SHAPE.intermediate  # whose permutation is folded into gate and up
    assert chosen.gpus[0].weights == stored - embedding + 4 * (rows - down)
    assert chosen.host.weights == embedding
    assert (chosen.backend, chosen.method, chosen.bits, chosen.dtype) == ("exllamav2", "exl2", 4.0, "float16")


def test_exllamav2_takes_gptq_too(tmp_path: Path) -> None:
    folder = write_packed(tmp_path, SHAPE, "gptq")
    plan = planned(folder, cards(1))
    assert {(c.backend, c.method) for c in plan.candidates} == {("vllm", "gptq"), ("exllamav2", "gptq")}
    found = next(c for c in plan.candidates if c.backend == "exllamav2")
    tensors = tensors_of(SHAPE, "gptq")
    stored = sum(math.prod(size) * SIZES[dtype] for dtype, size in tensors.values())
    rows = sum(size[0] for name, (_, size) in tensors.items() if name.endswith("g_idx"))
    head = 2 * SHAPE.hidden * 24  # its 1000 columns are padded to 1024
    assert found.gpus[0].weights == stored - 2 * SHAPE.vocab * SHAPE.hidden + 4 * rows + head


def test_parameters_are_those_of_the_model(tmp_path: Path) -> None:
    plain = spec_of(write_headers(tmp_path / "plain", SHAPE))
    for method in PACK:
        spec = spec_of(write_packed(tmp_path / method, SHAPE, method))
        assert (spec.parameters, spec.intermediate) == (plain.parameters, plain.intermediate)
        assert [(t.name, t.shape, t.role) for t in spec.tensors] == [(t.name, t.shape, t.role) for t in plain.tensors]


# Where a group is cut


@pytest.mark.parametrize(("tp", "each"), [(2, 14784), (4, 7392)])
def test_a_72b_whose_groups_are_cut(tmp_path: Path, tp: int, each: int) -> None:
    folder = write_packed(tmp_path, QWEN_72B, "gptq")
    chosen = best(folder, cards(4, 48), "backend=vllm", f"parallel.tensor={tp}")
    assert not chosen.fits
    (reason,) = chosen.reasons
    assert reason == (
        f"parallel.tensor={tp} cuts the 29568 inputs of down_proj into {each} each, no multiple of the group of 128"
    )


def test_a_72b_is_whole_on_one_card_and_padded_on_several(tmp_path: Path) -> None:
    whole = best(write_packed(tmp_path / "a", QWEN_72B, "gptq"), cards(1, 80), "backend=vllm")
    assert whole.fits, whole.reasons
    for tp in (2, 4):
        padded = best(write_packed(tmp_path / "b", PADDED_72B, "gptq"), cards(4, 48), f"parallel.tensor={tp}")
        assert padded.fits, padded.reasons
    # Where several are needed and none divides, none is tried.
    assert best(tmp_path / "a", cards(4, 24), "backend=vllm").tensor_parallel == 1
    assert best(tmp_path / "b", cards(4, 24), "backend=vllm").tensor_parallel == 4


def test_a_group_that_does_not_divide_at_all(tmp_path: Path) -> None:
    odd = Llama(hidden=512, heads=8, kv_heads=4, intermediate=704, vocab=1000)
    chosen = best(write_packed(tmp_path, odd, "gptq"), cards(1), "backend=vllm")
    assert chosen.reasons == ("down_proj has 704 inputs, no multiple of the group of 128",)


def test_blocks_of_fp8_are_not_cut_either(tmp_path: Path) -> None:
    chosen = best(write_packed(tmp_path, Llama(256, 2, 4, 4, 640, 512), "fp8"), cards(2), "parallel.tensor=2")
    assert "parallel.tensor=2 leaves 320 outputs of gate_proj, no multiple of 128" in chosen.reasons
    assert "parallel.tensor=2 cuts the 640 inputs of down_proj into 320 each, no multiple of the group of 128" in (
        chosen.reasons
    )


# What hardware has no kernel for


def test_old_cards(tmp_path: Path) -> None:
    folder = write_packed(tmp_path, SHAPE, "gptq")
    turing = best(folder, cards(1, 16, (7, 5)), "backend=vllm")
    assert (turing.fits, turing.dtype) == (True, "float16")
    refused = best(folder, cards(1, 16, (7, 5)), "backend=vllm", "model.dtype=bfloat16")
    assert not refused.fits
    assert "vLLM refuses model.dtype=bfloat16 on GPU 0 (card, compute capability 7.5)" in refused.reasons[0]
    volta = best(folder, cards(1, 16, (7, 0)), "backend=vllm")
    assert volta.reasons == ("GPTQ needs compute capability 7.5, and GPU 0 (card) has 7.0",)
    plain = best(write_headers(tmp_path / "plain", SHAPE), cards(1, 16, (7, 5)), "backend=vllm", "model.dtype=bfloat16")
    assert "which has none" in plain.reasons[0]


def test_on_a_cpu_4_bits_only(tmp_path: Path) -> None:
    eight = best(write_packed(tmp_path / "8", SHAPE, "gptq", {"bits": 8}, bits=8), cpu(), "backend=vllm")
    assert eight.reasons == ("vLLM has no kernel for GPTQ at 8 bits on a CPU",)
    assert best(write_packed(tmp_path / "f", SHAPE, "fp8"), cpu()).reasons[0].startswith("vLLM has no kernel for FP8")


def test_exl2_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(
        EngineUnavailableError, match=r"quantized already \(exl2, 4 bits\), and backend=exllamav2 needs"
    ):
        planned(write_exl2(tmp_path, SHAPE), cpu())


def test_what_is_stored_quantized_is_not_offloaded(tmp_path: Path) -> None:
    folder = write_packed(tmp_path / "m", LLAMA_70B, "bitsandbytes")
    chosen = best(folder, cards(1), "offload.cpu_gib=40")
    assert not chosen.fits
    assert "what is quantized already cannot be offloaded" in chosen.reasons


def test_one_that_does_not_fit_is_told_with_numbers(tmp_path: Path) -> None:
    spec = spec_of(write_packed(tmp_path, LLAMA_70B, "gptq"))
    plan = make_plan(composed(), spec, cards(1))
    with pytest.raises(DoesNotFitError, match=r"needs \d\d\.\d\d GiB and has .* 1 more such card \(2 in all\) \("):
        must_fit(plan, composed(), spec, cards(1))
    fewer = make_plan(composed("run.in_flight=64", "model.max_context=4096"), spec, cards(4, 14))
    assert fewer.chosen.fits


# What may be asked of it


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["quant.method=nf4"], "quant.method=nf4 cannot be made of it"),
        (["quant=exl2", "backend=exllamav2"], "quant.method=exl2 cannot be made of it"),
        (["quant.bits=8"], "quant.bits=8 cannot be made of it"),
        (["quant.bits=16"], "quant.bits=16 cannot be made of it"),
        (["quant.group_size=64"], "quant.group_size says how to quantize"),
        (["backend=transformers"], "does not load gptq checkpoints (backend=vllm or exllamav2 does)"),
        (["backend=bitsandbytes"], "does not load gptq checkpoints"),
        (["backend=vllm", "model.dtype=float32"], "model.dtype=float32"),
    ],
)
def test_another_method_or_width_is_refused(tmp_path: Path, argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(write_packed(tmp_path, SHAPE, "gptq"), cards(1), *argv)
    assert said in caught.value.message
    assert "quantized already (gptq, 4 bits, groups of 128)" in caught.value.message
    assert caught.value.hint


def test_its_own_method_and_width_may_be_said(tmp_path: Path) -> None:
    folder = write_packed(tmp_path, SHAPE, "awq")
    assert best(folder, cards(1), "backend=vllm", "quant.method=awq", "quant.bits=4").method == "awq"


@pytest.mark.parametrize(
    ("method", "said", "sizes", "expected"),
    [
        ("gptq", {"sym": False, "bits": 8}, {"bits": 8}, "with zero points (sym=false)"),
        ("gptq", {"desc_act": True, "bits": 8}, {"bits": 8}, "whose inputs are reordered"),
        ("gptq", {"bits": 2}, {"bits": 2}, "at 2 bits, only at 4 or 8"),
        ("gptq", {"group_size": 256, "bits": 8}, {"bits": 8, "group": 256}, "in groups other than -1, 32, 64, 128"),
        ("compressed-tensors", {"format": "marlin-24"}, {}, "in the format marlin-24"),
    ],
)
def test_what_its_engines_do_not_load(
    tmp_path: Path, method: str, said: dict[str, Any], sizes: dict[str, int], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(write_packed(tmp_path, SHAPE, method, said, **sizes), cards(1))
    assert expected in caught.value.message
    assert "GiB as they are" in caught.value.message


def test_desc_act_without_groups_is_no_order(tmp_path: Path) -> None:
    folder = write_packed(tmp_path, SHAPE, "gptq", {"desc_act": True, "group_size": -1}, group=-1)
    assert best(folder, cards(1), "backend=vllm").fits


def test_a_method_that_no_engine_here_loads(tmp_path: Path) -> None:
    folder = write_packed(tmp_path, SHAPE, "gptq", {"quant_method": "aqlm"})
    with pytest.raises(
        ConfigError, match=r"quantized already \(aqlm\), and no engine here .* take 0\.0. GiB as they are"
    ):
        planned(folder, cards(1))


# A quantization_config that makes no sense


@pytest.mark.parametrize(
    ("method", "said", "expected"),
    [
        ("gptq", {"bits": None}, "has no bits"),
        ("gptq", {"bits": "4"}, 'bits is "4", not a whole number'),
        ("gptq", {"bits": 0}, "bits is 0"),
        ("gptq", {"group_size": 0}, "group_size is 0"),
        ("gptq", {"group_size": [128]}, "group_size is [128]"),
        ("gptq", {"sym": "yes"}, 'sym is "yes", not true or false'),
        ("gptq", {"bits": 8}, "weights at 8 bits 262,144"),
        ("gptq", {"group_size": 64}, "not the scales of 512 inputs in groups of 64"),
        ("gptq", {"quant_method": None}, "has no quant_method"),
        ("gptq", {"quant_method": ["gptq"]}, "quant_method is"),
        ("awq", {"bits": None}, "has no bits"),
        ("compressed-tensors", {"config_groups": {}}, "config_groups"),
        ("compressed-tensors", {"config_groups": {"a": {"weights": None}}}, "says nothing of its weights"),
        ("compressed-tensors", {"config_groups": {"a": {"weights": {}}}}, "has no num_bits"),
        ("fp8", {"weight_block_size": [128]}, "weight_block_size is [128], not two sizes"),
        ("bitsandbytes", {"load_in_4bit": False}, "neither load_in_4bit nor load_in_8bit"),
        ("bitsandbytes", {"load_in_8bit": True}, "or both"),
        ("bitsandbytes", {"bnb_4bit_quant_type": "nf5"}, 'bnb_4bit_quant_type is "nf5", not nf4 or fp4'),
    ],
)
def test_an_odd_config_is_named(tmp_path: Path, method: str, said: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        planned(write_packed(tmp_path, SHAPE, method, said), cards(1))
    assert expected in caught.value.message


@pytest.mark.parametrize("missing", ["qweight", "scales", "qzeros"])
def test_a_part_that_is_missing_is_named(tmp_path: Path, missing: str) -> None:
    name = f"model.layers.1.mlp.down_proj.{missing}"
    with pytest.raises(CheckpointError, match=f"model.layers.1.mlp.down_proj has no {missing}"):
        planned(write_packed(tmp_path, SHAPE, "gptq", leave_out=name), cards(1))


def test_a_linear_of_which_nothing_is_there(tmp_path: Path) -> None:
    folder = write_packed(tmp_path, Llama(512, 2, 8, 4, 1024, 1000), "fp8", leave_out="model.norm.weight")
    with pytest.raises(RequestError, match=r"model\.norm\.weight is missing"):
        planned(folder, cards(1))


def test_exl2_bits_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"bits is True, not a number"):
        planned(write_exl2(tmp_path, SHAPE, signed={"bits": True}), cards(1))


UP = "model.layers.1.mlp.up_proj"


def exl2_spec(folder: Path) -> ModelSpec:
    return planned_spec(composed(f"model.path={folder}"), Source(open_checkpoint(folder)))


def up_proj(rows: int, out: int = 1024) -> dict[str, Any]:
    """Another up_proj, of groups of 32 rows of 4 bits."""
    return {f"{UP}.{part}": array for part, array in exl2_arrays((out, rows), [(32, 4)] * (rows // 32)).items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"changed": {f"{UP}.q_groups": ("I32", (32,))}}, rf"output\.safetensors: {UP}\.q_groups is I32, not I16"),
        ({"changed": {f"{UP}.q_scale": ("I32", (1, 8))}}, rf"{UP}\.q_scale has shape \[1, 8\], not \[16, 128\]"),
        ({"changed": {f"{UP}.q_weight": ("I32", (8, 1024))}}, rf"{UP}\.q_weight has shape .* 512 rows cannot have"),
        ({"changed": up_proj(256)}, rf"{UP}\.q_weight is of 256 inputs and 1024 outputs, and .* say 512 and 1024"),
        ({"changed": up_proj(512, 512)}, rf"{UP}\.q_weight is of 512 inputs and 512 outputs, and .* 512 and 1024"),
        ({"leave_out": f"{UP}.q_scale_max"}, rf"output\.safetensors: there is no {UP}\.q_scale_max"),
        ({"bits": 8, "signed": {"bits": 4.0}}, r"its layers have 7\.99\d bits per weight, not 4"),
        ({"bits": 3, "signed": {"bits": 4.0}}, r"its layers have 2\.99\d bits per weight, not 4"),
        ({"head_bits": 4, "signed": {"head_bits": 8}}, r"its head has 4\.\d+ bits per weight, not 8"),
    ],
)
def test_a_damaged_exl2_folder_is_not_planned(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert exl2_spec(write_exl2(tmp_path / "good", SHAPE)).layers == 2
    with pytest.raises(CheckpointError, match=message) as caught:
        exl2_spec(write_exl2(tmp_path / "bad", SHAPE, **change))
    assert "ownload the model again" in caught.value.hint


EMBEDDING = "model.embed_tokens.weight"


def rows(embedding: int, head: int) -> dict[str, Any]:
    """An embedding, and a quantized head, of so many words."""
    packed = exl2_arrays((head, 512), [(128, 8)] + [(128, 6)] * 3)
    return {f"lm_head.{part}": array for part, array in packed.items()} | {EMBEDDING: ("F16", (embedding, 512))}


@pytest.mark.parametrize(
    ("vocab", "embedding", "head", "message"),
    [
        (2048, 1000, 1000, r"model\.embed_tokens has 1000 rows, too few for the vocab_size of 2048 in config\.json"),
        (1000, 512, 1000, r"model\.embed_tokens has 512 rows, too few for the vocab_size of 1000"),
        (1000, 1000, 512, r"lm_head has 512 outputs, too few for the vocab_size of 1000"),
        (512, 512, 1000, r"lm_head has 1024 outputs, and model\.embed_tokens\.weight 512 rows"),
        (1000, 1000, 1000, ""),
        (1000, 1088, 1088, ""),  # padded before it was converted
        (1000, 1088, 1000, ""),
    ],
)
def test_words_of_an_exl2_folder(tmp_path: Path, vocab: int, embedding: int, head: int, message: str) -> None:
    folder = write_exl2(tmp_path, replace(SHAPE, vocab=vocab), changed=rows(embedding, head))
    if not message:
        assert exl2_spec(folder).vocab == vocab
        return
    with pytest.raises(CheckpointError, match=message) as caught:
        exl2_spec(folder)
    assert "ownload the model again" in caught.value.hint


@pytest.mark.parametrize(("said", "words"), [(1, "1"), (None, "nowhere")])
def test_layers_that_exllamav2_would_not_build(tmp_path: Path, said: int | None, words: str) -> None:
    folder = write_exl2(tmp_path / "exl2", SHAPE)
    plain = write_headers(tmp_path / "plain", SHAPE)
    for path in (folder, plain):
        config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": said}
        (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"says num_hidden_layers {words}, and the weights have 2 l") as caught:
        exl2_spec(folder)
    assert "Set num_hidden_layers to 2" in caught.value.hint
    assert exl2_spec(plain).layers == 2  # a note says so


def test_a_linear_that_is_there_twice(tmp_path: Path) -> None:
    folder = write_exl2(tmp_path, SHAPE, changed={f"{UP}.weight": ("F16", (1024, 512))})
    for look in (exl2_spec, check_exl2):
        with pytest.raises(CheckpointError, match=rf"{UP}\.weight is the same linear as {UP}\.q_weight: it is there"):
            look(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "output.safetensors"])
def test_the_unquantized_model_beside_the_exl2_one(tmp_path: Path, name: str) -> None:
    folder, plain = write_exl2(tmp_path / "exl2", SHAPE), write_headers(tmp_path / "plain", SHAPE)
    quantized = "model.safetensors" if name.startswith("output") else "output.safetensors"
    (folder / "output.safetensors").rename(folder / quantized)
    (plain / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError, match=rf"{name} holds weights that {quantized} holds too") as caught:
        exl2_spec(folder)
    assert caught.value.hint == f"Move {name} to another folder: the EXL2 model is in {quantized}."
    (folder / name).write_bytes(b"no weights")
    with pytest.raises(CheckpointError):
        exl2_spec(folder)
    (folder / name).unlink()
    write_tensors(folder / "adapter_model.safetensors", {"base_model.x.lora_A.weight": ("F16", (8, 512))})
    assert exl2_spec(folder).layers == 2  # of which exllamav2 takes nothing


def test_no_quantized_layer_is_no_number_of_bits(tmp_path: Path) -> None:
    folder = write_headers(tmp_path, SHAPE)
    signed = {"quantization_config": {"quant_method": "exl2", "bits": 4.0}}
    config = json.loads((folder / "config.json").read_text()) | signed
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="says exl2, and no linear of its layers is quantized so"):
        exl2_spec(folder)


@pytest.mark.parametrize(
    ("bits", "signed"),
    [
        (4, {"bits": 4.4}),  # of two layers: a step of a block is a third of a bit
        (8, {"bits": 8.5}),  # nothing is wider
        (2.5, {"bits": 2.0}),  # nothing is less
        (4, {"bits": 3.9}),  # by hand: what stands beside the weights left out
        (4, {"head_bits": None}),
    ],
)
def test_what_the_converter_or_a_hand_may_sign(tmp_path: Path, bits: float, signed: dict[str, Any]) -> None:
    folder = write_exl2(tmp_path, SHAPE, bits, signed=signed)
    assert exl2_spec(folder).layers == 2
    assert check_exl2(folder).bits == pytest.approx(bits, rel=0.01)


def test_a_hollow_exl2_folder_is_planned(tmp_path: Path) -> None:
    file = write_exl2(tmp_path, SHAPE) / "output.safetensors"
    size, header = file.stat().st_size, 8 + int.from_bytes(file.read_bytes()[:8], "little")
    os.truncate(file, header)
    os.truncate(file, size)
    assert exl2_spec(tmp_path).layers == 2  # headers alone are read
    with pytest.raises(CheckpointError, match=r"q_groups: group 0 is 0 bits"):
        check_exl2(tmp_path)


# GPTQ as a plan


def test_gptq_is_planned_and_not_made(tmp_path: Path) -> None:
    spec = spec_of(write_headers(tmp_path, SHAPE))
    config = composed("backend=vllm", "quant=gptq", "parallel.tensor=2")
    plan = make_plan(config, spec, cards(2))
    must_fit(plan, config, spec, cards(2))
    assert plan.chosen.weights == {f"cuda:{i}": rank_bytes(SHAPE, 2, True) for i in range(2)}
    assert plan.chosen.needs == plan.to_json()["needs"] == "a GPTQ checkpoint of it (4 bits, groups of 128)"
    with pytest.raises(ConfigError, match=r"needs a GPTQ checkpoint of it .*GPTQModel .*as model\.path"):
        runnable(plan, config, cards(2))


def test_its_group_can_be_asked_for(tmp_path: Path) -> None:
    spec = spec_of(write_headers(tmp_path, SHAPE))
    for group in (-1, 32, 64):
        config = composed(f"quant.group_size={group}", "quant.bits=4", "parallel.tensor=1")
        (found,) = make_plan(config, spec, cards(1)).candidates
        assert found.weights == {"cuda:0": rank_bytes(SHAPE, 1, True, 4, group)}
        assert found.needs.endswith("a group for each row)" if group < 0 else f"groups of {group})")
    with pytest.raises(ConfigError, match=r"quant\.group_size=100 is not one of -1, 32, 64, 128"):
        make_plan(composed("backend=vllm", "quant.group_size=100"), spec, cards(1))


def test_what_has_to_be_made_elsewhere_comes_last(tmp_path: Path) -> None:
    spec = spec_of(write_headers(tmp_path, LLAMA_70B))
    plan = make_plan(composed(), spec, cards(4))
    assert not plan.chosen.needs
    needs = [bool(c.needs) for c in plan.candidates]
    assert needs == sorted(needs)
    assert any(c.fits and c.needs for c in plan.candidates)
    chosen, _ = runnable(plan, composed(), cards(4))
    assert not chosen.needs


def test_exl2_weights_whose_config_does_not_say_so(tmp_path: Path) -> None:
    folder = write_exl2(tmp_path / "exl2", SHAPE)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"q_weight is of an EXL2 model.*no quantization_config") as caught:
        model_spec(open_checkpoint(folder))
    assert '{"quant_method": "exl2"' in str(caught.value)
