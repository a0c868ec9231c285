"""What layers are made of: single tensors with named dimensions, and the blocks that architectures share."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One tensor of a layer.

    Attributes:
        name: within the layer; {} is the number of an expert.
        shape: its dimensions by name (see `dimensions.DIMENSIONS`).
        role: "linear", "expert" or "other".
        when: the key of config.json that has to be true, not zero and not null; "!key": the opposite; "": always.
    """

    name: str
    shape: tuple[str, ...]
    role: str = "other"
    when: str = ""


def linear(module: str, out: str, into: str, when: str = "") -> Part:
    return Part(f"{module}.weight", (out, into), "linear", when)


def expert(module: str, out: str, into: str) -> Part:
    return Part(f"{module}.weight", (out, into), "expert")


def biases(when: str, **parts: str) -> tuple[Part, ...]:
    """Of linears of the attention block, `module=rows`."""
    return tuple(Part(f"self_attn.{module}.bias", (rows,), when=when) for module, rows in parts.items())


def norms(*modules: str) -> tuple[Part, ...]:
    return tuple(Part(f"{module}.weight", ("hidden",)) for module in modules)


NORMS = norms("input_layernorm", "post_attention_layernorm")
GEMMA_NORMS = (*NORMS, *norms("pre_feedforward_layernorm", "post_feedforward_layernorm"))
HEAD_NORMS = (Part("self_attn.q_norm.weight", ("head_dim",)), Part("self_attn.k_norm.weight", ("head_dim",)))
ATTENTION = (
    linear("self_attn.q_proj", "queries", "hidden"),
    linear("self_attn.k_proj", "keys", "hidden"),
    linear("self_attn.v_proj", "keys", "hidden"),
    linear("self_attn.o_proj", "hidden", "queries"),
)
QKV_BIASES = biases("", q_proj="queries", k_proj="keys", v_proj="keys")
ALL_BIASES = biases("attention_bias", q_proj="queries", k_proj="keys", v_proj="keys", o_proj="hidden")
MLP = (
    linear("mlp.gate_proj", "intermediate", "hidden"),
    linear("mlp.up_proj", "intermediate", "hidden"),
    linear("mlp.down_proj", "hidden", "intermediate"),
)
MLP_BIASES = (
    Part("mlp.gate_proj.bias", ("intermediate",), when="mlp_bias"),
    Part("mlp.up_proj.bias", ("intermediate",), when="mlp_bias"),
    Part("mlp.down_proj.bias", ("hidden",), when="mlp_bias"),
)
ROUTER = Part("mlp.gate.weight", ("experts", "hidden"))
EXPERTS = (
    expert("mlp.experts.{}.gate_proj", "expert_intermediate", "hidden"),
    expert("mlp.experts.{}.up_proj", "expert_intermediate", "hidden"),
    expert("mlp.experts.{}.down_proj", "hidden", "expert_intermediate"),
)
# The experts of a layer as one parameter each way, as transformers 5 holds them, and saves them where it is told to.
STACKED = (
    Part("mlp.experts.gate_up_proj", ("experts", "expert_gate_up", "hidden"), "expert"),
    Part("mlp.experts.down_proj", ("experts", "hidden", "expert_intermediate"), "expert"),
)
# DeepSeek's: keys and values come out of one small vector per token, which is what is cached.
LATENT_ATTENTION = (
    linear("self_attn.q_proj", "latent_queries", "hidden", when="!q_lora_rank"),
    linear("self_attn.q_a_proj", "query_rank", "hidden", when="q_lora_rank"),
    Part("self_attn.q_a_layernorm.weight", ("query_rank",), when="q_lora_rank"),
    linear("self_attn.q_b_proj", "latent_queries", "query_rank", when="q_lora_rank"),
    linear("self_attn.kv_a_proj_with_mqa", "latent", "hidden"),
    Part("self_attn.kv_a_layernorm.weight", ("key_rank",)),
    linear("self_attn.kv_b_proj", "latent_keys", "key_rank"),
    linear("self_attn.o_proj", "hidden", "latent_values"),
    *biases("attention_bias", kv_a_proj_with_mqa="latent", o_proj="hidden"),
    Part("self_attn.q_a_proj.bias", ("query_rank",), when="attention_bias"),
)


def shared(module: str) -> tuple[Part, ...]:
    """The experts that every token passes through, which are ordinary linears."""
    return (
        linear(f"{module}.gate_proj", "shared_intermediate", "hidden"),
        linear(f"{module}.up_proj", "shared_intermediate", "hidden"),
        linear(f"{module}.down_proj", "hidden", "shared_intermediate"),
    )
