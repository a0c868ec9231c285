"""Tiny random models of transformers, of every architecture that the table has and transformers too."""

from __future__ import annotations

from typing import Any

import torch
import transformers

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
    "phi3, half of a head rotated": ("Phi3", {"partial_rotary_factor": 0.5}),
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
