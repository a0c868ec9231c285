"""The architectures whose tensors are understood, as data: another one is another row.

Names and defaults are those of transformers' modeling and configuration files of the same model type, or of the
model's own remote code where transformers has none (InternLM, InternLM2, Qwen 1). How many parameters a row's shapes
say is checked against transformers' own models and against published ones in tests/unit/test_spec.py.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.checkpoint.parts import (
    ALL_BIASES,
    ATTENTION,
    EXPERTS,
    GEMMA_NORMS,
    HEAD_NORMS,
    LATENT_ATTENTION,
    MLP,
    MLP_BIASES,
    NORMS,
    QKV_BIASES,
    ROUTER,
    STACKED,
    Part,
    biases,
    expert,
    linear,
    norms,
    shared,
)
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError


@dataclass(frozen=True)
class Architecture:
    """What is where in a checkpoint of one architecture, and what its config leaves out.

    Attributes:
        layer: prefix of a layer's tensors; {} is its number.
        every: the tensors of every layer.
        dense: those of the layers that have an MLP and no experts.
        sparse: those of the layers that have experts; empty: the architecture has none.
        stacked: what stands in `sparse` for the experts where they are stored together, three-dimensional.
        elsewhere: (prefix of the language part, head) as other versions of the format have them.
        defaults: what transformers takes for keys that config.json leaves out.
        tied, head_dim, max_context: the same, also where they are null (head_dim 0: hidden size / heads).
        counts_scaling: max_position_embeddings is the length after RoPE scaling, whatever its type and factor.
        sliding: which layers have a sliding window where `layer_types` does not say (see `caches.SLIDING`).
        window_switch: the window counts only where use_sliding_window is true.
        halved: config.json's intermediate_size is that of gate and up together.
        draft_layers: the key for layers beyond the last, which predict tokens ahead and are left out by engines.
        rotary_sets, scaled_embedding: buffers that transformers makes: sets of rotary frequencies, one factor.
        transposed: linears stored as (in, out), as transformers' Conv1D does, instead of (out, in).
    """

    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    final_norm: str = "model.norm.weight"
    layer: str = "model.layers.{}."
    every: tuple[Part, ...] = (*ATTENTION, *ALL_BIASES, *NORMS)
    dense: tuple[Part, ...] = (*MLP, *MLP_BIASES)
    sparse: tuple[Part, ...] = ()
    stacked: tuple[Part, ...] = ()
    elsewhere: tuple[tuple[str, str], ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tied: bool = False
    head_dim: int = 0
    max_context: int = 2048
    counts_scaling: bool = False
    sliding: str = "all"
    window_switch: bool = False
    halved: bool = False
    draft_layers: str = ""
    rotary_sets: int = 1
    scaled_embedding: bool = False
    transposed: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """Modules of the linears of a layer without experts."""
        return tuple(p.name.removesuffix(".weight") for p in (*self.every, *self.dense) if p.role == "linear")

    @property
    def norms(self) -> tuple[str, ...]:
        """Modules of the norms of a layer."""
        return tuple(p.name.removesuffix(".weight") for p in self.every if "norm" in p.name or ".ln_" in f".{p.name}")


_GEMMA = Architecture(
    every=(*ATTENTION, *ALL_BIASES, *NORMS),
    dense=MLP,
    tied=True,
    head_dim=256,
    max_context=8192,
    sliding="none",
    scaled_embedding=True,
)
_GEMMA2 = replace(
    _GEMMA,
    every=(*ATTENTION, *ALL_BIASES, *GEMMA_NORMS),
    sliding="even",
    defaults={"sliding_window": 4096, "num_key_value_heads": 4},
)
_GEMMA3 = replace(
    _GEMMA2,
    every=(*ATTENTION, *ALL_BIASES, *GEMMA_NORMS, *HEAD_NORMS),
    sliding="pattern",
    max_context=131072,
    counts_scaling=True,
    rotary_sets=2,
    # Published configs of the larger ones leave out all but the sizes in which they differ from the 1B.
    defaults={
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
)
_QWEN2 = Architecture(
    every=(*ATTENTION, *QKV_BIASES, *NORMS),
    dense=MLP,
    max_context=32768,
    sliding="after",
    window_switch=True,
    defaults={"sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32},
)
_QWEN2_VL = replace(
    _QWEN2,
    elsewhere=(("model.language_model.", "lm_head.weight"),),
    defaults={"sliding_window": 4096, "max_window_layers": 80, "num_key_value_heads": 8},
)
_DEEPSEEK_V3 = Architecture(
    every=(*LATENT_ATTENTION, *NORMS),
    dense=MLP,
    sparse=(
        ROUTER,
        Part("mlp.gate.e_score_correction_bias", ("experts",)),
        *shared("mlp.shared_experts"),
        *EXPERTS,
    ),
    stacked=STACKED,
    max_context=4096,
    sliding="none",
    draft_layers="num_nextn_predict_layers",
    defaults={
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3,
    },
)

ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(sliding="none"),
    "MistralForCausalLM": Architecture(
        every=(*ATTENTION, *NORMS),
        dense=MLP,
        max_context=131072,
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "MixtralForCausalLM": Architecture(
        every=(*ATTENTION, *NORMS),
        dense=(),
        sparse=(
            Part("block_sparse_moe.gate.weight", ("experts", "hidden")),
            expert("block_sparse_moe.experts.{}.w1", "intermediate", "hidden"),
            expert("block_sparse_moe.experts.{}.w3", "intermediate", "hidden"),
            expert("block_sparse_moe.experts.{}.w2", "hidden", "intermediate"),
        ),
        stacked=(
            ROUTER,
            Part("mlp.experts.gate_up_proj", ("experts", "gate_up", "hidden"), "expert"),
            Part("mlp.experts.down_proj", ("experts", "hidden", "intermediate"), "expert"),
        ),
        max_context=131072,
        defaults={"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 8},
    ),
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen2MoeForCausalLM": replace(
        _QWEN2,
        every=(*ATTENTION, *biases("qkv_bias", q_proj="queries", k_proj="keys", v_proj="keys"), *NORMS),
        sparse=(
            ROUTER,
            *shared("mlp.shared_expert"),
            linear("mlp.shared_expert_gate", "one", "hidden"),
            *EXPERTS,
        ),
        stacked=STACKED,
        sliding="even below",
        defaults={
            "qkv_bias": True,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "Qwen3ForCausalLM": replace(_QWEN2, every=(*ATTENTION, *ALL_BIASES, *NORMS, *HEAD_NORMS), head_dim=128),
    "Qwen3MoeForCausalLM": replace(
        _QWEN2,
        every=(*ATTENTION, *ALL_BIASES, *NORMS, *HEAD_NORMS),
        sparse=(ROUTER, *EXPERTS),
        stacked=STACKED,
        sliding="all",
        defaults={
            "sliding_window": 4096,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    ),
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": replace(
        _GEMMA3,
        embedding="language_model.model.embed_tokens.weight",
        head="language_model.lm_head.weight",
        final_norm="language_model.model.norm.weight",
        layer="language_model.model.layers.{}.",
        elsewhere=(("model.language_model.", "lm_head.weight"),),
    ),
    "Phi3ForCausalLM": Architecture(
        every=(
            linear("self_attn.qkv_proj", "fused", "hidden"),
            linear("self_attn.o_proj", "hidden", "queries"),
            *NORMS,
        ),
        dense=(linear("mlp.gate_up_proj", "gate_up", "hidden"), linear("mlp.down_proj", "hidden", "intermediate")),
        max_context=4096,
    ),
    "InternLMForCausalLM": Architecture(
        every=(
            *ATTENTION,
            *biases("bias", q_proj="queries", k_proj="keys", v_proj="keys", o_proj="hidden"),
            *NORMS,
        ),
        dense=MLP,
        sliding="none",
        defaults={"bias": True},
    ),
    "InternLM2ForCausalLM": Architecture(
        embedding="model.tok_embeddings.weight",
        head="output.weight",
        every=(
            linear("attention.wqkv", "fused", "hidden"),
            linear("attention.wo", "hidden", "queries"),
            Part("attention.wqkv.bias", ("fused",), when="bias"),
            Part("attention.wo.bias", ("hidden",), when="bias"),
            *norms("attention_norm", "ffn_norm"),
        ),
        dense=(
            linear("feed_forward.w1", "intermediate", "hidden"),
            linear("feed_forward.w3", "intermediate", "hidden"),
            linear("feed_forward.w2", "hidden", "intermediate"),
        ),
        sliding="none",
        defaults={"bias": True},
    ),
    # Qwen 1 and Qwen-VL; the image encoder of the latter is transformer.visual.
    "QWenLMHeadModel": Architecture(
        embedding="transformer.wte.weight",
        final_norm="transformer.ln_f.weight",
        layer="transformer.h.{}.",
        every=(
            linear("attn.c_attn", "fused", "hidden"),
            Part("attn.c_attn.bias", ("fused",)),
            linear("attn.c_proj", "hidden", "queries"),
            Part("attn.c_proj.bias", ("hidden",), when="!no_bias"),
            *norms("ln_1", "ln_2"),
        ),
        dense=(
            linear("mlp.w1", "intermediate", "hidden"),
            linear("mlp.w2", "intermediate", "hidden"),
            linear("mlp.c_proj", "hidden", "intermediate"),
            Part("mlp.w1.bias", ("intermediate",), when="!no_bias"),
            Part("mlp.w2.bias", ("intermediate",), when="!no_bias"),
            Part("mlp.c_proj.bias", ("hidden",), when="!no_bias"),
        ),
        max_context=8192,
        sliding="none",
        halved=True,
        defaults={"no_bias": True},
    ),
    "Qwen2VLForConditionalGeneration": _QWEN2_VL,
    "Qwen2_5_VLForConditionalGeneration": _QWEN2_VL,
    "DeepseekV2ForCausalLM": replace(
        _DEEPSEEK_V3,
        dense=(*MLP, *MLP_BIASES),
        sparse=(ROUTER, *shared("mlp.shared_experts"), *EXPERTS),
        max_context=2048,
        draft_layers="",
        defaults={
            **_DEEPSEEK_V3.defaults,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "moe_intermediate_size": 1407,
            "first_k_dense_replace": 0,
        },
    ),
    "DeepseekV3ForCausalLM": _DEEPSEEK_V3,
}

VISION = ("visual.", "vision_tower.", "vision_model.", "multi_modal_projector.")
"""What the names of tensors of image encoders and their projections begin with, below `model.` or `transformer.`."""


def architecture_name(config: dict[str, Any]) -> str:
    """The first of config.json's `architectures`; empty where it names none."""
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""


def architecture_of(config: dict[str, Any], where: str) -> Architecture:
    """The table's row for a config.

    Raises:
        CheckpointError: no architecture named, or one that is not in the table.
    """
    name = architecture_name(config)
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    supported = ", ".join(ARCHITECTURES)
    what = f"the architecture {shown(name)} is not supported" if name else "config.json names no architecture"
    raise CheckpointError(f"{where}: {what}", f"Supported: {supported}.")


def layout_of(config: dict[str, Any]) -> Architecture | None:
    """The table's row for a config, or None."""
    return ARCHITECTURES.get(architecture_name(config))


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model: `text_config` of a nested one, else all of it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def said_tied(config: dict[str, Any]) -> bool | None:
    """tie_word_embeddings, outside or inside `text_config`; None where neither says."""
    values = (config.get("tie_word_embeddings"), text_config(config).get("tie_word_embeddings"))
    return next((value for value in values if isinstance(value, bool)), None)


def located(row: Architecture, names: Collection[str]) -> Architecture:
    """The row with its names as this checkpoint has them: nested models have changed them with the format."""
    body = row.embedding.removesuffix("embed_tokens.weight")
    for prefix, head in row.elsewhere:
        if row.embedding not in names and f"{prefix}embed_tokens.weight" in names:
            moved = {key: prefix + getattr(row, key).removeprefix(body) for key in ("embedding", "final_norm", "layer")}
            return replace(row, head=head, **moved)
    return row


def is_tied(config: dict[str, Any]) -> bool:
    """Whether the output head is the embedding, by config.json or else by the architecture's default."""
    row, said = layout_of(config) or Architecture(), said_tied(config)
    return row.tied if said is None else said
