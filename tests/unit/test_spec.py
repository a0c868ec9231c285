"""ModelSpec of every architecture in the table: against transformers' own models, and against published counts."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import write_json
from published_models import PUBLISHED
from safetensors import safe_open

from orchestrator.checkpoint.architectures import ARCHITECTURES
from orchestrator.checkpoint.bare import from_config, open_to_plan
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import ModelSpec, model_spec
from orchestrator.errors import CheckpointError

BASE = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 10,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
QWEN_EYES = {"depth": 1, "hidden_size": 32, "num_heads": 2}

# label -> (architecture without "ForCausalLM", what its config has beside BASE)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with biases, tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama with wide heads": ("Llama", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral with a window": ("Mistral", {"sliding_window": 5, "head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2 moe": ("Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 40}),
    "qwen2 moe, some layers dense": (
        "Qwen2Moe",
        {
            **MOE,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [0],
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 moe": ("Qwen3Moe", {**MOE, "head_dim": 16}),
    "qwen3 moe, every second layer": ("Qwen3Moe", {**MOE, "head_dim": 16, "decoder_sparse_step": 2}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 5}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 5, "sliding_window_pattern": 2}),
    "phi3": ("Phi3", {}),
    "phi3 with a window": ("Phi3", {"sliding_window": 5}),
    "deepseek v2": ("DeepseekV2", MLA),
    "deepseek v2 lite": ("DeepseekV2", {**MLA, "q_lora_rank": None}),
    "deepseek v3": ("DeepseekV3", {**MLA, "attention_bias": True}),
    "gemma3 with eyes": ("Gemma3ForConditionalGeneration", {"head_dim": 16, "sliding_window": 5}),
    "qwen2-vl": ("Qwen2VLForConditionalGeneration", MROPE),
    "qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", MROPE),
}
NESTED = {
    "Gemma3ForConditionalGeneration": {"vision_config": SIGLIP, "mm_tokens_per_image": 4},
    "Qwen2VLForConditionalGeneration": {"vision_config": {**QWEN_EYES, "embed_dim": 32, "mlp_ratio": 2}},
    "Qwen2_5_VLForConditionalGeneration": {
        "vision_config": {**QWEN_EYES, "intermediate_size": 32, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
    },
}


def tiny(label: str) -> Any:
    """A random model of transformers."""
    name, more = MODELS[label]
    name = name if name.endswith("Generation") else f"{name}ForCausalLM"
    kind = getattr(transformers, name)
    values = BASE | more
    config = kind.config_class(text_config=values, **NESTED[name]) if name in NESTED else kind.config_class(**values)
    torch.manual_seed(0)
    return kind(config).eval()


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
