"""Published models: the part of their config.json that says their sizes, and how many parameters they have.

The counts are those that their authors or the hub give for the files; DeepSeek-V3's without its draft layer.
"""

from __future__ import annotations

from typing import Any


def _config(
    architecture: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "torch_dtype": "bfloat16",
        **more,
    }


def _llama(*sizes: int, **more: Any) -> dict[str, Any]:
    vocab, hidden, inner, layers, heads = sizes
    return _config("LlamaForCausalLM", vocab, hidden, inner, layers, heads, **more)


_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7B": (_llama(32000, 4096, 11008, 32, 32), 6_738_415_616),
    "Llama-2-13B": (_llama(32000, 5120, 13824, 40, 40), 13_015_864_320),
    "Llama-2-70B": (_llama(32000, 8192, 28672, 80, 64, num_key_value_heads=8), 68_976_648_192),
    "Llama-3-8B": (_llama(128256, 4096, 14336, 32, 32, num_key_value_heads=8), 8_030_261_248),
    "Llama-3-70B": (_llama(128256, 8192, 28672, 80, 64, num_key_value_heads=8), 70_553_706_496),
    "Llama-3.2-1B": (
        _llama(128256, 2048, 8192, 16, 32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
        1_235_814_400,
    ),
    "Mistral-7B": (
        _config("MistralForCausalLM", 32000, 4096, 14336, 32, 32, num_key_value_heads=8),
        7_241_732_096,
    ),
    "Mixtral-8x7B": (
        _config("MixtralForCausalLM", 32000, 4096, 14336, 32, 32, num_key_value_heads=8, num_local_experts=8),
        46_702_792_704,
    ),
    "Qwen2.5-7B": (
        _config("Qwen2ForCausalLM", 152064, 3584, 18944, 28, 28, num_key_value_heads=4),
        7_615_616_512,
    ),
    "Qwen2.5-72B": (
        _config("Qwen2ForCausalLM", 152064, 8192, 29568, 80, 64, num_key_value_heads=8),
        72_706_203_648,
    ),
    "Qwen3-8B": (
        _config("Qwen3ForCausalLM", 151936, 4096, 12288, 36, 32, num_key_value_heads=8, head_dim=128),
        8_190_735_360,
    ),
    "Qwen3-30B-A3B": (
        _config(
            "Qwen3MoeForCausalLM",
            151936,
            2048,
            6144,
            48,
            32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
        30_532_122_624,
    ),
    "Gemma-7B": (
        _config("GemmaForCausalLM", 256000, 3072, 24576, 28, 16, num_key_value_heads=16, head_dim=256),
        8_537_680_896,
    ),
    "Gemma-2-9B": (
        _config("Gemma2ForCausalLM", 256000, 3584, 14336, 42, 16, num_key_value_heads=8, head_dim=256),
        9_241_705_984,
    ),
    "Gemma-2-27B": (
        _config("Gemma2ForCausalLM", 256000, 4608, 36864, 46, 32, num_key_value_heads=16, head_dim=128),
        27_227_128_320,
    ),
    "Phi-3-mini": (_config("Phi3ForCausalLM", 32064, 3072, 8192, 32, 32, num_key_value_heads=32), 3_821_079_552),
    "Phi-3-medium": (
        _config("Phi3ForCausalLM", 32064, 5120, 17920, 40, 40, num_key_value_heads=10),
        13_960_238_080,
    ),
    "Qwen-7B": (
        _config("QWenLMHeadModel", 151936, 4096, 22016, 32, 32, kv_channels=128, no_bias=True, seq_length=8192),
        7_721_324_544,
    ),
    "InternLM2-7B": (
        _config("InternLM2ForCausalLM", 92544, 4096, 14336, 32, 32, num_key_value_heads=8, bias=False),
        7_737_708_544,
    ),
    "DeepSeek-V2-Lite": (
        _config(
            "DeepseekV2ForCausalLM",
            102400,
            2048,
            10944,
            27,
            16,
            **_LATENT,
            q_lora_rank=None,
            n_routed_experts=64,
            n_shared_experts=2,
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
            num_experts_per_tok=6,
        ),
        15_706_484_224,
    ),
    "DeepSeek-V3": (
        _config(
            "DeepseekV3ForCausalLM",
            129280,
            7168,
            18432,
            61,
            128,
            **_LATENT,
            q_lora_rank=1536,
            n_routed_experts=256,
            n_shared_experts=1,
            moe_intermediate_size=2048,
            first_k_dense_replace=3,
            num_experts_per_tok=8,
            num_nextn_predict_layers=1,
        ),
        671_026_419_200,
    ),
}
