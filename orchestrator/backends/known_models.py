"""Which engine runs which architecture, as data: what is known of the engine, counted by its memory model, and tried.

Three steps that must not be taken for one another: an engine may load an architecture whose memory nobody has worked
out here (such a plan would be a guess, and is refused), and a memory model may be right by the engine's own rules
before anybody has run it (such a plan says so in a note).
"""

from __future__ import annotations


def _causal(*names: str) -> frozenset[str]:
    return frozenset(f"{name}ForCausalLM" for name in names)


FIRST = _causal("Llama")  # what every engine here was written with

# What exllamav2 0.3.2 knows by name (its architecture.py), text models only. Anything else it loads as a Llama, with
# no more than a printed warning.
EXLLAMAV2 = _causal(
    *("Llama", "Mistral", "Mixtral", "Yi", "Orion", "Qwen2", "Qwen3", "Qwen3Moe", "Gemma", "Gemma2", "Starcoder2"),
    *("Gemmoe", "Cohere", "Cohere2", "Dbrx", "Phi3", "GPTBigCode", "MiniCPM", "InternLM2", "Index", "Granite"),
    "Glm4",
)

LOADED: dict[str, frozenset[str]] = {"exllamav2": EXLLAMAV2}
"""Backend -> what it loads as what it is; a backend that is not here refuses by itself what it does not know."""

_DENSE = _causal("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2")  # layers of separate linears
# tests/engines/test_engine_architectures.py compares each of them with what is really held, to the byte.
_TRANSFORMERS = _DENSE | _causal(
    *("Gemma3", "Phi3", "Mixtral", "Qwen2Moe", "Qwen3Moe", "DeepseekV2", "DeepseekV3"),
)

COUNTED: dict[str, frozenset[str]] = {
    "transformers": _TRANSFORMERS,
    "bitsandbytes": _TRANSFORMERS,
    # Its latent attention is not counted: it is kept whole on every rank, in a layout of each kernel's own.
    "vllm": _DENSE | _causal("Gemma3", "Phi3", "Mixtral", "Qwen2Moe", "Qwen3Moe", "InternLM", "InternLM2"),
    # It splits fused linears and quantizes experts one by one, which its memory model does not know yet.
    "exllamav2": _DENSE,
}
"""Backend -> architectures whose memory its model counts; one that is not here: `FIRST`."""

UNMERGED: dict[str, frozenset[str]] = {
    # Not Gemma2: it adds what an adapter says behind the norm that follows a linear there, and refuses the rest.
    "exllamav2": _causal("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma"),
}
"""Backend -> architectures on which it runs an adapter that is not merged; one that is not here: `FIRST`."""

CUT_BY_EXLLAMAV2 = _causal("Llama", "Mistral", "Qwen2")
"""What exllamav2 0.3.2 runs tensor-parallel. It tries Qwen3 and GLM-4 too, without their norms of heads and outputs
(attn.py's forward_tp has none): other answers, and no word of it."""

TRIED: dict[str, frozenset[str]] = {
    "transformers": _TRANSFORMERS,
    "bitsandbytes": _TRANSFORMERS,
    "vllm": FIRST,
    "exllamav2": FIRST,
}
"""Backend -> architectures with which it was run here; of the others a plan says so. One that is not here: `FIRST`."""


def counted(backend: str) -> frozenset[str]:
    """Architectures whose memory on this backend is known."""
    return COUNTED.get(backend, FIRST)


def tried(backend: str) -> frozenset[str]:
    """Architectures with which this backend was run."""
    return TRIED.get(backend, FIRST)


def unmerged(backend: str) -> frozenset[str]:
    """Architectures on which this backend runs an adapter that is not merged."""
    return UNMERGED.get(backend, FIRST)
