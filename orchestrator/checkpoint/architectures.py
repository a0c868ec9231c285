"""The architectures whose tensors are understood, as data: another one is another row.

Names and defaults are those of transformers' modeling and configuration files of the same model type.
"""

from dataclasses import dataclass
from typing import Any

from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Architecture:
    """What is where in a checkpoint of one architecture, and what its config leaves out.

    Attributes:
        layer: prefix of a layer's tensors; {} is its number.
        linears, norms: modules of every layer, each with a `.weight`.
        biases: linears that also have a `.bias`.
        tied, head_dim, max_context: what transformers takes where config.json is silent (head_dim 0:
            hidden size / heads).
        transposed: linears stored as (in, out), as transformers' Conv1D does, instead of (out, in).
    """

    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    final_norm: str = "model.norm.weight"
    layer: str = "model.layers.{}."
    linears: tuple[str, ...] = (*_ATTENTION, *_MLP)
    norms: tuple[str, ...] = _NORMS
    biases: tuple[str, ...] = ()
    tied: bool = False
    head_dim: int = 0
    max_context: int = 2048
    transposed: bool = False


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(),
    "MistralForCausalLM": Architecture(max_context=131072),
    "Qwen2ForCausalLM": Architecture(biases=_ATTENTION[:3], max_context=32768),
    "Qwen3ForCausalLM": Architecture(
        norms=(*_NORMS, "self_attn.q_norm", "self_attn.k_norm"), head_dim=128, max_context=32768
    ),
    "GemmaForCausalLM": Architecture(tied=True, head_dim=256, max_context=8192),
}


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


def is_tied(config: dict[str, Any]) -> bool:
    """Whether the output head is the embedding, by config.json or else by the architecture's default."""
    row, said = layout_of(config) or Architecture(), said_tied(config)
    return row.tied if said is None else said
