"""Sizes of published checkpoints, in bytes or as their cards round them, and where each was read.

Names are keys of published_models.PUBLISHED: a fine-tuned model counts as the one whose shapes it has.
Gigabytes are decimal, with the digits that the card gives. Cards of EXL2 models were found to say what a GPU needs, and
not what the files weigh.
"""

from __future__ import annotations

from typing import NamedTuple


class Plain(NamedTuple):
    """An unquantized checkpoint.

    Attributes:
        size: bytes of all tensors together.
        beside: bytes of them that are no parameters: rotary frequencies, half a head for each layer in older files.
    """

    name: str
    size: int
    beside: int = 0


PLAIN = (
    # Both indexes of a Llama-2-7B, total_size: .safetensors and .bin, with frequencies in half and in single precision.
    Plain("Llama-2-7B", 13_476_835_328, 32 * 64 * 2),
    Plain("Llama-2-7B", 13_476_839_424, 32 * 64 * 4),
    Plain("Llama-2-70B", 137_953_316_864, 80 * 64 * 4),  # index of a Llama-2-70B in 15 shards, total_size
    Plain("Llama-3-8B", 16_060_522_496),  # index of a Llama-3.1-8B in 4 shards, total_size
    Plain("Llama-3-70B", 141_107_412_992),  # index of meta-llama/Llama-3.1-70B-Instruct, total_size
    Plain("Mistral-7B", 14_483_464_192),  # index of mistralai/Mistral-7B-Instruct-v0.2, total_size
    Plain("Mixtral-8x7B", 93_405_585_408),  # total_size that a converter of Mixtral-8x7B writes into the index
    Plain("Qwen2.5-7B", 15_231_233_024),  # index of Qwen/Qwen2.5-7B-Instruct, total_size
    Plain("Qwen2.5-72B", 145_412_407_296),  # index of Qwen/Qwen2.5-72B-Instruct, total_size
    Plain("Qwen3-8B", 16_381_470_720),  # index of Qwen/Qwen3-8B, total_size
    Plain("Qwen3-30B-A3B", 61_064_245_248),  # index of Qwen/Qwen3-30B-A3B-Instruct-2507, total_size
    Plain("Gemma-2-9B", 18_483_411_968),  # index of a Gemma-2-9B: 464 tensors in 4 shards, total_size
    Plain("Phi-3-mini", 7_642_159_104),  # index of a Phi-3-mini in 2 shards, total_size
    Plain("Qwen-7B", 15_442_649_088),  # index of Qwen/Qwen-7B, total_size
    Plain("InternLM2-7B", 15_475_417_088),  # bytes of the tensors of an InternLM2-7B, all BF16
    Plain("DeepSeek-V2-Lite", 31_412_968_448),  # index of deepseek-ai/DeepSeek-V2-Lite, total_size
)

# model.safetensors of meta-llama/Llama-3.2-1B-Instruct: one file, with its header.
LLAMA_1B_FILE = 2_471_645_608

# All weight files of deepseek-ai/DeepSeek-V3: 8 bits for the linears, and a layer more that predicts a token ahead.
DEEPSEEK_V3_FILES = 688_586_727_753


class Packed(NamedTuple):
    """A row of the table of files in a card; group -1: one for the whole column."""

    name: str
    bits: int
    group: int
    gigabytes: float


GPTQ = (
    # TheBloke/Llama-2-7B-32K-Instruct-GPTQ
    Packed("Llama-2-7B", 4, 128, 3.90),
    Packed("Llama-2-7B", 4, 64, 4.02),
    Packed("Llama-2-7B", 4, 32, 4.28),
    Packed("Llama-2-7B", 8, -1, 7.01),
    Packed("Llama-2-7B", 8, 128, 7.16),
    # TheBloke/Llama-2-13B-GPTQ; the 8-bit rows: TheBloke/MythoMax-L2-13B-GPTQ
    Packed("Llama-2-13B", 4, 128, 7.26),
    Packed("Llama-2-13B", 4, 64, 7.51),
    Packed("Llama-2-13B", 4, 32, 8.00),
    Packed("Llama-2-13B", 8, -1, 13.36),
    Packed("Llama-2-13B", 8, 128, 13.65),
    # TheBloke/StableBeluga2-70B-GPTQ; without groups: TheBloke/Xwin-LM-70B-V0.1-GPTQ
    Packed("Llama-2-70B", 3, 128, 28.03),
    Packed("Llama-2-70B", 4, -1, 35.33),
    Packed("Llama-2-70B", 4, 128, 36.65),
    Packed("Llama-2-70B", 4, 64, 37.99),
    Packed("Llama-2-70B", 4, 32, 40.66),
    # TheBloke/Mistral-7B-Instruct-v0.1-GPTQ
    Packed("Mistral-7B", 4, 128, 4.16),
    # TheBloke/dolphin-2.5-mixtral-8x7b-GPTQ
    Packed("Mixtral-8x7B", 4, -1, 23.81),
    Packed("Mixtral-8x7B", 4, 128, 24.70),
    Packed("Mixtral-8x7B", 4, 32, 27.42),
    Packed("Mixtral-8x7B", 8, -1, 47.04),
    Packed("Mixtral-8x7B", 8, 128, 48.10),
)

AWQ = (
    Packed("Llama-2-7B", 4, 128, 3.89),  # TheBloke/LlamaGuard-7B-AWQ
    Packed("Llama-2-13B", 4, 128, 7.25),  # TheBloke/LLaMA2-13B-Tiefighter-AWQ
    Packed("Llama-2-70B", 4, 128, 36.61),  # TheBloke/Upstage-Llama-2-70B-instruct-v2-AWQ
    Packed("Mistral-7B", 4, 128, 4.15),  # TheBloke/Mistral-7B-v0.1-AWQ
)


class Bitsandbytes(NamedTuple):
    """A checkpoint that transformers saved from bitsandbytes' modules; `dtype`: of what is not quantized."""

    name: str
    method: str
    dtype: str
    size: float


BITSANDBYTES = (
    # Index of IrfanUruchi/Llama-2-13B-Computer-Engineering-, total_size; double quantization.
    Bitsandbytes("Llama-2-13B", "nf4", "float16", 7_201_770_923),
    # Download of model.safetensors of unsloth/llama-3-8b-Instruct-bnb-4bit: 5.70G.
    Bitsandbytes("Llama-3-8B", "nf4", "bfloat16", 5.70e9),
    # Download of model.safetensors of unsloth/Qwen2.5-7B-Instruct-bnb-4bit: 5.55G.
    Bitsandbytes("Qwen2.5-7B", "nf4", "bfloat16", 5.55e9),
    # Index of IrfanUruchi/Llama-3.1-8B-Computer-Networks-LLM, total_size: embedding, norms and head in float32.
    Bitsandbytes("Llama-3-8B", "int8", "float32", 11_188_584_672),
)


class Reported(NamedTuple):
    """A run that the engine's author tells of."""

    name: str
    profile: str
    bits: float
    context: int


# README of exllamav2: Llama2 70B in 24 GB at 2.55 bits with 2048 tokens, 13B in 8 GB at 2.65 bits with 2048 tokens.
EXL2_RUNS = (Reported("Llama-2-70B", "1x24gb", 2.55, 2048), Reported("Llama-2-13B", "1x8gb", 2.65, 2048))
