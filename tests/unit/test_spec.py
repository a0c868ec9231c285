"""ModelSpec of every architecture in the table: against transformers' own models, and against published counts."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architecture_models import BASE, MODELS, tiny
from checkpoints import CONFIG, Q_PROJ, model_tensors, save, write_adapter, write_json, write_model
from published_models import PUBLISHED
from safetensors import safe_open
from safetensors.torch import load_file

from orchestrator.checkpoint.adapter import open_adapter
from orchestrator.checkpoint.adapter_match import targets
from orchestrator.checkpoint.architectures import ARCHITECTURES
from orchestrator.checkpoint.bare import from_config, open_to_plan
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import ModelSpec, model_spec
from orchestrator.errors import CheckpointError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """label -> (model, folder)."""
    found = {}
    for label in MODELS:
        folder = tmp_path_factory.mktemp("model")
        model = tiny(label)
        model.save_pretrained(folder)
        found[label] = (model, folder)
    return found


def of(folder: Path) -> ModelSpec:
    return model_spec(open_checkpoint(folder))


def stored(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def language(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in spec.tensors if tensor.role != "vision"}


def test_every_architecture_that_transformers_has_is_here() -> None:
    tried = {name if name.endswith("Generation") else f"{name}ForCausalLM" for name, _ in MODELS.values()}
    remote = {"InternLMForCausalLM", "InternLM2ForCausalLM", "QWenLMHeadModel"}
    assert tried == set(ARCHITECTURES) - remote
    assert not any(hasattr(transformers, name) for name in remote)


@pytest.mark.parametrize("label", MODELS)
def test_sizes_are_those_of_the_model(saved: dict[str, tuple[Any, Path]], label: str) -> None:
    model, folder = saved[label]
    spec, config = of(folder), model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None)
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads) == (3, 32, 4, heads)
    assert (spec.vocab, spec.max_context, spec.dtype, spec.intermediate) == (80, 64, "F32", 48)
    held = sum(p.numel() for p in model.parameters())
    held += sum(buffer.numel() for name, buffer in model.named_buffers() if "e_score" in name)
    assert spec.parameters == held == sum(math.prod(shape) for shape in stored(folder).values())
    assert spec.tied == model.config.tie_word_embeddings
    assert not spec.notes


@pytest.mark.parametrize("label", MODELS)
def test_roles_are_those_of_the_modules(saved: dict[str, tuple[Any, Path]], label: str) -> None:
    model, folder = saved[label]
    sizes: Counter[str] = Counter()
    for tensor in of(folder).tensors:
        sizes[tensor.role] += math.prod(tensor.shape)
    wanted: Counter[str] = Counter()
    seen = set()
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            eyes = any(part in name for part in ("visual", "vision_tower", "multi_modal"))
            weight = isinstance(module, torch.nn.Linear) and kind == "weight"
            role = "expert" if parameter.dim() == 3 else "linear" if weight else "other"
            role = "embedding" if "embed_tokens" in name else "head" if name == "lm_head" else role
            wanted["vision" if eyes else role] += parameter.numel()
        wanted["other"] += 4 * hasattr(module, "e_score_correction_bias")
    assert sizes == +wanted


@pytest.mark.parametrize("label", MODELS)
def test_the_cache_is_what_transformers_keeps(saved: dict[str, tuple[Any, Path]], label: str) -> None:
    model, folder = saved[label]
    spec, tokens = of(folder), 9
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 3 + tokens)[None], past_key_values=cache, use_cache=True)
    assert len(cache.layers) == len(spec.layer_caches) == spec.layers
    for layer, said in zip(cache.layers, spec.layer_caches, strict=True):
        # transformers keeps a token less than the window: the query that comes next is the last one of it.
        length = tokens if said.window is None else min(tokens, said.window - 1)
        assert layer.keys.numel() + layer.values.numel() == said.elements * length
        assert layer.is_sliding == (said.kind == "sliding")


@pytest.mark.parametrize("label", MODELS)
def test_shapes_derived_from_the_config_are_those_that_are_stored(
    saved: dict[str, tuple[Any, Path]], label: str, tmp_path: Path
) -> None:
    folder = saved[label][1]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    there, derived = of(folder), model_spec(open_to_plan(tmp_path))
    assert language(derived) == language(there)
    assert {t.name: (t.role, t.layer) for t in derived.tensors} == {
        t.name: (t.role, t.layer) for t in there.tensors if t.role != "vision"
    }
    assert derived.layer_caches == there.layer_caches
    assert any("derived from config.json" in note for note in derived.notes)
    with pytest.raises(CheckpointError, match="no weights"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("label", MODELS)
def test_what_transformers_adds_to_the_weights(saved: dict[str, tuple[Any, Path]], label: str) -> None:
    model, folder = saved[label]
    body = [
        buffer
        for name, buffer in model.named_buffers()
        if "e_score" not in name and not any(part in name for part in ("visual", "vision_tower"))
    ]
    spec = of(folder)
    held = sum(buffer.numel() * buffer.element_size() for buffer in body)
    assert spec.rotary_bytes + 4 * spec.scaled_embedding == held


@pytest.mark.parametrize("label", ["mixtral", "qwen2 moe", "qwen3 moe, every second layer", "deepseek v3"])
def test_experts_that_are_stored_together(saved: dict[str, tuple[Any, Path]], label: str, tmp_path: Path) -> None:
    model, folder = saved[label]
    model.save_pretrained(tmp_path, save_original_format=False)
    one, other = of(folder), of(tmp_path)
    assert any(len(tensor.shape) == 3 for tensor in other.tensors)
    for field in ("parameters", "experts", "experts_per_token", "expert_intermediate", "intermediate", "layer_caches"):
        assert getattr(one, field) == getattr(other, field)
    assert (one.experts, one.experts_per_token) == (4, 2)
    sizes = [sum(t.nbytes for t in spec.tensors if t.role == "expert") for spec in (one, other)]
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("label", ["gemma3 with eyes", "qwen2-vl"])
def test_the_image_encoder_is_counted_apart(saved: dict[str, tuple[Any, Path]], label: str) -> None:
    model, folder = saved[label]
    spec = of(folder)
    text = sum(p.numel() for p in model.model.language_model.parameters())
    text += 0 if spec.tied else model.lm_head.weight.numel()
    assert spec.vision_bytes == 4 * (spec.parameters - text)
    assert {tensor.layer for tensor in spec.tensors if tensor.role == "vision"} == {None}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_size(name: str, tmp_path: Path) -> None:
    config, parameters = PUBLISHED[name]
    write_json(tmp_path / "config.json", config)
    spec = model_spec(from_config(tmp_path))
    assert spec.parameters == parameters
    assert spec.nbytes == 2 * parameters


# Architectures of remote code, which transformers does not have

REMOTE: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "InternLMForCausalLM": (
        {"bias": True},
        {"model.layers.1.self_attn.o_proj.bias": (32,), "model.layers.1.mlp.up_proj.weight": (48, 32)},
    ),
    "InternLM2ForCausalLM": (
        {"bias": False, "num_key_value_heads": 2},
        {
            "model.tok_embeddings.weight": (80, 32),
            "model.layers.1.attention.wqkv.weight": (64, 32),
            "model.layers.1.attention.wo.weight": (32, 32),
            "model.layers.1.feed_forward.w2.weight": (32, 48),
            "model.layers.1.ffn_norm.weight": (32,),
            "output.weight": (80, 32),
        },
    ),
    "QWenLMHeadModel": (
        {"intermediate_size": 96, "kv_channels": 8, "seq_length": 64, "max_position_embeddings": None},
        {
            "transformer.wte.weight": (80, 32),
            "transformer.h.1.attn.c_attn.weight": (96, 32),
            "transformer.h.1.attn.c_attn.bias": (96,),
            "transformer.h.1.mlp.w1.weight": (48, 32),
            "transformer.h.1.mlp.c_proj.weight": (32, 48),
            "transformer.ln_f.weight": (32,),
        },
    ),
}


@pytest.mark.parametrize("name", REMOTE)
def test_names_of_remote_code(name: str, tmp_path: Path) -> None:
    more, wanted = REMOTE[name]
    values = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
    write_json(tmp_path / "config.json", {**values, "architectures": [name], **more})
    derived = model_spec(open_to_plan(tmp_path))
    assert wanted.items() <= language(derived).items()
    tensors = {tensor.name: torch.zeros(tensor.shape) for tensor in derived.tensors}
    eyes = {"transformer.visual.conv1.weight": torch.zeros(4, 3, 2, 2)} if name == "QWenLMHeadModel" else {}
    save(tmp_path / "model.safetensors", tensors | eyes)
    there = of(tmp_path)
    for field in ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "layer_caches", "max_context"):
        assert getattr(there, field) == getattr(derived, field)
    assert language(there) == language(derived)
    assert (there.heads, there.head_dim, there.intermediate, there.max_context, there.notes) == (4, 8, 48, 64, ())
    assert there.vision_bytes == (4 * 48 if eyes else 0)


def test_draft_layers_are_left_out(saved: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    folder = saved["deepseek v3"][1]
    tensors = load_file(folder / "model.safetensors")
    drafts = {name.replace("layers.2", "layers.3"): t.clone() for name, t in tensors.items() if "layers.2" in name}
    save(tmp_path / "model.safetensors", tensors | drafts)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    spec = of(tmp_path)
    assert (spec.layers, spec.parameters) == (3, of(folder).parameters)
    assert any("predict tokens ahead" in note for note in spec.notes)


def test_the_headers_win_in_every_kind_of_layer(saved: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    wrong = {"num_experts": 9, "moe_intermediate_size": 7, "num_key_value_heads": 1, "head_dim": 4}
    spec = changed(saved["qwen3 moe"][1], tmp_path / "moe", num_local_experts=None, **wrong)
    assert (spec.experts, spec.expert_intermediate, spec.kv_heads, spec.head_dim) == (4, 24, 2, 16)
    assert [key for key in wrong if any(f"says {key} " in note for note in spec.notes)] == list(wrong)
    wrong = {"kv_lora_rank": 9, "qk_rope_head_dim": 2, "qk_nope_head_dim": 3, "v_head_dim": 5, "q_lora_rank": 6}
    spec = changed(saved["deepseek v3"][1], tmp_path / "mla", num_attention_heads=2, **wrong)
    assert (spec.heads, spec.head_dim, spec.layer_caches[0].elements) == (4, 14, 20)
    assert len(spec.notes) == 6


def changed(folder: Path, copy: Path, **config: Any) -> ModelSpec:
    """The spec of a copy with another config.json."""
    copy.mkdir()
    (copy / "model.safetensors").symlink_to(folder / "model.safetensors")
    write_json(copy / "config.json", json.loads((folder / "config.json").read_text()) | config)
    return of(copy)


# The longest context, of 64 positions


def yarn(factor: float | None = 4.0, original: int | None = 64) -> dict[str, Any]:
    return {"type": "yarn", "factor": factor, "original_max_position_embeddings": original}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"rope_scaling": yarn()}, 256),
        ({"rope_scaling": {**yarn(), "type": None, "rope_type": "yarn"}}, 256),
        ({"rope_scaling": yarn(original=16)}, 64),  # the positions are stretched ones already
        ({"rope_scaling": yarn(original=8)}, 64),  # never less than config.json says
        ({"rope_scaling": yarn(original=None)}, 256),
        ({"rope_scaling": yarn(), "original_max_position_embeddings": 16}, 64),
        ({"rope_scaling": yarn(factor=None)}, 64),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 128),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.5}}, 160),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 0.5}}, 64),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}}, 64),
        ({"rope_scaling": {"type": "longrope", "factor": 8.0}}, 64),
        ({"rope_scaling": {"type": "su", "factor": 8.0}}, 64),
        ({"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}}, 64),
        ({"rope_parameters": {**yarn(), "rope_theta": 1e6}}, 256),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": yarn()}, 256),
        ({"rope_parameters": {"full_attention": yarn(), "sliding_attention": {"rope_type": "default"}}}, 256),
    ],
)
def test_rope_scaling_makes_the_context_longer(
    saved: dict[str, tuple[Any, Path]], tmp_path: Path, config: dict[str, Any], tokens: int
) -> None:
    spec = changed(saved["qwen2"][1], tmp_path / "copy", **{"rope_parameters": None, **config})
    assert (spec.max_context, spec.notes) == (tokens, ())


@pytest.mark.parametrize(
    ("label", "key", "rope"),
    [
        ("deepseek v3", "rope_scaling", yarn(original=16)),
        ("gemma3", "rope_scaling", {"rope_type": "linear", "factor": 8.0}),
        ("gemma3", "rope_parameters", {"full_attention": {"rope_type": "linear", "factor": 8.0}}),
    ],
)
def test_scaling_that_the_positions_count_already(
    saved: dict[str, tuple[Any, Path]], tmp_path: Path, label: str, key: str, rope: dict[str, Any]
) -> None:
    assert changed(saved[label][1], tmp_path / "copy", **{"rope_parameters": None, key: rope}).max_context == 64


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("factor", ["4", 0, -1, True, [4], 1e300, 10**400, 2**39])
def test_a_factor_that_is_none_is_named(
    saved: dict[str, tuple[Any, Path]], tmp_path: Path, key: str, factor: object
) -> None:
    config = {"rope_parameters": None, key: {"rope_type": "linear", "factor": factor}}
    with pytest.raises(CheckpointError, match=rf"{key}\.factor is ") as caught:
        changed(saved["llama"][1], tmp_path / "copy", **config)
    assert "\n" not in str(caught.value)


def test_other_strange_values_of_rope_scaling(saved: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r'rope_scaling is "yarn", not an object'):
        changed(saved["llama"][1], tmp_path / "text", rope_scaling="yarn")
    with pytest.raises(CheckpointError, match=r"rope_scaling\.original_max_position_embeddings is -1, not a positive"):
        changed(saved["llama"][1], tmp_path / "negative", rope_scaling=yarn(original=-1))
    assert changed(saved["llama"][1], tmp_path / "type", rope_scaling={"type": ["x"], "factor": 2}).max_context == 64


@pytest.mark.parametrize(("label", "tokens"), [("llama", 2048), ("mistral", 131072), ("gemma3", 131072)])
def test_a_length_that_is_assumed_is_said(
    saved: dict[str, tuple[Any, Path]], tmp_path: Path, label: str, tokens: int
) -> None:
    spec = changed(saved[label][1], tmp_path / "copy", max_position_embeddings=None)
    assert spec.max_context == tokens
    assert any(f"does not say max_position_embeddings: {tokens}" in note for note in spec.notes)


# Weights that are quantized already: linears of 4 bits in groups of 16


def _gptq(out: int, into: int) -> dict[str, torch.Tensor]:
    return {
        "qweight": torch.zeros(into // 8, out, dtype=torch.int32),
        "qzeros": torch.zeros(into // 16, out // 8, dtype=torch.int32),
        "scales": torch.zeros(into // 16, out).half(),
        "g_idx": torch.zeros(into, dtype=torch.int32),
    }


def _awq(out: int, into: int) -> dict[str, torch.Tensor]:
    return _gptq(out, into) | {"qweight": torch.zeros(into, out // 8, dtype=torch.int32)}


def _exl2(out: int, into: int) -> dict[str, torch.Tensor]:
    out = -(-out // 32) * 32
    return {
        "q_weight": torch.zeros(into // 8, out, dtype=torch.int32),
        "q_invperm": torch.zeros(into, dtype=torch.int32),
        "q_scale": torch.zeros(1, out // 8, dtype=torch.int32),
        "q_scale_max": torch.zeros(1).half(),
        "q_groups": torch.zeros(2, dtype=torch.int16),
    }


def _compressed(out: int, into: int) -> dict[str, torch.Tensor]:
    return {
        "weight_packed": torch.zeros(out, into // 8, dtype=torch.int32),
        "weight_scale": torch.zeros(out, into // 16).half(),
        "weight_shape": torch.tensor([out, into]),
    }


def _fp8(out: int, into: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.zeros(out, into).to(torch.float8_e4m3fn), "weight_scale_inv": torch.zeros(1, 1)}


def _nf4(out: int, into: int) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.zeros(out * into // 2, 1, dtype=torch.uint8),
        "weight.absmax": torch.zeros(out * into // 64),
    }


GROUPS = {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
PACKED = {
    "gptq": (_gptq, {"quant_method": "gptq", "bits": 4}, True),
    "gptq v2": (_gptq, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, True),
    "awq": (_awq, {"quant_method": "awq", "bits": 4}, True),
    "exl2": (_exl2, {"quant_method": "exl2", "bits": 4.0}, False),  # 16 columns are stored as 32
    "compressed-tensors": (_compressed, {"quant_method": "compressed-tensors", **GROUPS}, True),
    "fp8": (_fp8, {"quant_method": "fp8"}, True),
    "bitsandbytes": (_nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}, False),
    "unheard of": (_gptq, {"quant_method": ["x"]}, False),
}


@pytest.mark.parametrize("method", PACKED)
def test_dimensions_of_packed_weights(method: str, tmp_path: Path) -> None:
    pack, quantization, readable = PACKED[method]
    tensors = {}
    for name, tensor in model_tensors(dtype=torch.float16).items():
        module = name.removesuffix(".weight")
        packed = pack(*tensor.shape) if "proj" in name else {"weight": tensor}
        tensors |= {f"{module}.{part}": value for part, value in packed.items()}
    right = of(write_model(tmp_path / "right", tensors, config={"quantization_config": quantization}))
    assert (right.heads, right.kv_heads, right.head_dim, right.intermediate, right.hidden) == (4, 2, 8, 48, 32)
    assert (right.quantization, right.dtype) == (quantization, "F16")
    wrong = {"intermediate_size": 24, "quantization_config": quantization}
    spec = of(write_model(tmp_path / "wrong", tensors, config=wrong))
    assert spec.intermediate == (48 if readable else 24)
    assert any(("packed shapes" if readable else "config.json's") in note for note in spec.notes)


@pytest.mark.parametrize("dtype", ["bool", "int64", "int8", "uint8", "float8_e4m3fn", "float8_e5m2"])
def test_weights_that_nothing_computes_in_are_refused(tmp_path: Path, dtype: str) -> None:
    tensors = model_tensors()
    linears = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items() if "proj" in name}
    folder = write_model(tmp_path, tensors | linears)
    name = next(info.dtype for info in open_checkpoint(folder).tensors.values() if info.dtype != "F32")
    with pytest.raises(
        CheckpointError, match=rf"layers\.0\.\S+_proj\.weight is {name}, .* no quantization_config"
    ) as error:
        of(folder)
    assert error.value.hint is not None
    assert "FP8 or packed" in error.value.hint


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_an_embedding_or_a_head_of_integers_is_refused(tmp_path: Path, name: str) -> None:
    tensors = model_tensors()
    with pytest.raises(CheckpointError, match=f"{name} is I8"):
        of(write_model(tmp_path, tensors | {name: tensors[name].to(torch.int8)}))


@pytest.mark.parametrize("pack", [_fp8, _nf4])
def test_packed_weights_whose_config_has_lost_them_are_named_by_their_dtype(tmp_path: Path, pack: Any) -> None:
    tensors = {}
    for name, tensor in model_tensors().items():
        parts = pack(*tensor.shape) if "proj" in name else {"weight": tensor}
        tensors |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in parts.items()}
    with pytest.raises(CheckpointError, match=r"proj\.weight is (F8_E4M3|U8), "):
        of(write_model(tmp_path, tensors))


def test_buffers_of_integers_are_no_weights(tmp_path: Path) -> None:
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4, dtype=torch.int64),
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "model.layers.0.self_attn.q_proj.g_idx": torch.zeros(32, dtype=torch.int32),
        "model.position_ids": torch.zeros(1, 8, dtype=torch.int64),
    }
    assert of(write_model(tmp_path, model_tensors() | buffers)).dtype == "F32"


def test_an_adapter_is_held_against_a_config_alone(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", CONFIG)
    adapter = open_adapter(write_adapter(tmp_path / "lora"))
    assert list(targets(adapter, open_to_plan(tmp_path))) == [f"{Q_PROJ}.weight"]
    write_json(tmp_path / "config.json", {**CONFIG, "hidden_size": 48, "head_dim": 8})
    with pytest.raises(CheckpointError, match="trained on 32 inputs, this model has 48"):
        targets(adapter, open_to_plan(tmp_path))


def test_quantized_weights_cannot_be_made_up(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {**CONFIG, "quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(CheckpointError, match="of quantized weights, and there are none"):
        open_to_plan(tmp_path)


# A config.json that makes no sense, with weights and without


@pytest.mark.parametrize(
    ("model", "key", "value"),
    [
        ("llama", "hidden_size", "32"),
        ("llama", "num_attention_heads", -4),
        ("llama", "num_attention_heads", 5),
        ("llama", "num_key_value_heads", [2]),
        ("llama", "num_key_value_heads", 3),
        ("llama", "vocab_size", 2**60),
        ("llama", "vocab_size", 80.0),
        ("llama", "num_hidden_layers", True),
        ("llama", "num_hidden_layers", 10**6),
        ("llama", "max_position_embeddings", "long"),
        ("llama", "attention_bias", "yes"),
        ("llama", "dtype", 7),
        ("llama", "dtype", "int4"),
        ("llama", "text_config", [1]),
        ("mistral", "sliding_window", -1),
        ("mistral", "sliding_window", {"size": 4}),
        ("gemma2", "layer_types", "full_attention"),
        ("gemma2", "layer_types", ["full_attention"]),
        ("gemma2", "layer_types", ["linear_attention"] * 3),
        ("gemma2", "layer_types", [["full_attention"]] * 3),
        ("mixtral", "num_local_experts", 10**9),
        ("qwen3 moe", "mlp_only_layers", "0"),
        ("qwen3 moe", "decoder_sparse_step", 0),
        ("deepseek v3", "kv_lora_rank", None),
        ("deepseek v3", "q_lora_rank", [12]),
        ("deepseek v3", "first_k_dense_replace", "1"),
    ],
)
def test_a_strange_value_is_named(
    saved: dict[str, tuple[Any, Path]], tmp_path: Path, model: str, key: str, value: object
) -> None:
    values = json.loads((saved[model][1] / "config.json").read_text())
    if key in ("num_attention_heads", "num_key_value_heads"):
        values.pop("head_dim", None)
    write_json(tmp_path / "config.json", values | {key: value})
    with pytest.raises(CheckpointError) as caught:
        model_spec(open_to_plan(tmp_path))
    named = {"num_hidden_layers": "layers", "num_local_experts": "experts"}
    assert named.get(key, key) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_beyond_reason_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {**CONFIG, "vocab_size": 2**39, "hidden_size": 2**39, "head_dim": 8})
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight would take"):
        open_to_plan(tmp_path)


def test_an_unknown_architecture_is_told_with_what_is_known(tmp_path: Path) -> None:
    folder = write_model(tmp_path, config={"architectures": ["NovelForCausalLM"]})
    with pytest.raises(CheckpointError, match=r"NovelForCausalLM is not supported; its 21 tensors take 0\.00 GiB"):
        of(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="NovelForCausalLM is not supported"):
        open_to_plan(folder)


@pytest.mark.parametrize("label", ["qwen2 moe", "deepseek v3", "gemma3 with eyes"])
def test_no_value_of_any_key_is_more_than_an_error(
    saved: dict[str, tuple[Any, Path]], tmp_path: Path, label: str
) -> None:
    strange = (None, "4", -1, 0, 7, 2**39, 10**30, 1.5, True, [], ["x"], [[1]] * 3, {}, {"a": 1})
    text = (saved[label][1] / "config.json").read_text()
    said: list[str] = []
    plain = json.loads(text)
    keys = [(key,) for key in plain] + [("text_config", key) for key in plain.get("text_config", {})]
    for *outer, key in keys:
        for value in strange:
            values = json.loads(text)
            (values[outer[0]] if outer else values)[key] = value
            write_json(tmp_path / "config.json", values)
            try:
                model_spec(open_to_plan(tmp_path))
            except CheckpointError as error:
                said.append(str(error))
    assert said
    assert not any("\n" in message for message in said)
