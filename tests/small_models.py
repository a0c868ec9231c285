"""Made-up models without torch: real headers and a real config.json, zeros (a sparse file) or noise as weights."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Llama:
    """The dimensions of a made-up Llama."""

    hidden: int = 128
    layers: int = 2
    heads: int = 2
    kv_heads: int = 2
    intermediate: int = 256
    vocab: int = 512
    context: int = 2048
    tied: bool = False
    dtype: str = "F16"

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """module -> (out, in) of the linears of one layer."""
        keys = self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            found |= {f"{prefix}{module}.weight": shape for module, shape in self.linears().items()}
            found |= {
                f"{prefix}{norm}.weight": (self.hidden,) for norm in ("input_layernorm", "post_attention_layernorm")
            }
        found["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            found["lm_head.weight"] = (self.vocab, self.hidden)
        return found

    def config(self) -> dict[str, Any]:
        """config.json"""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "torch_dtype": TORCH_NAMES[self.dtype],
            "bos_token_id": None,
            "eos_token_id": None,
        }


# 68.7 thousand million parameters: with `write_headers` a file of 137 GB that takes no room.
LLAMA_70B = Llama(8192, 80, 64, 8, 28672, 32000, 4096)
LLAMA_7B = Llama(4096, 32, 32, 32, 11008, 32000, 4096)


def write_headers(folder: Path, shape: Llama, **config: Any) -> Path:
    """A model folder whose weights are all zero and take no room on the disk; `config` is put over its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config() | config))
    header, end = _header(shape.tensors(), shape.dtype)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + end)
    return folder


def write_noise(folder: Path, shape: Llama, shards: int = 1) -> Path:
    """A model folder with weights that give finite, senseless answers (no tokenizer)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config()))
    random = np.random.default_rng(7)
    names = list(shape.tensors().items())
    parts = [dict(names[i::shards]) for i in range(shards)]
    where: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        file = "model.safetensors" if shards == 1 else f"model-{i:05d}-of-{shards:05d}.safetensors"
        where |= dict.fromkeys(part, file)
        arrays = {
            n: np.ones(s) if len(s) == 1 else random.standard_normal(s, np.float32) * 0.05 for n, s in part.items()
        }
        write_safetensors(folder / file, arrays, shape.dtype)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def write_adapter(folder: Path, shape: Llama, rank: int = 8) -> Path:
    """A LoRA adapter on all linears of a model of this shape."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(LINEARS)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    random = np.random.default_rng(8)
    arrays = {}
    for layer in range(shape.layers):
        for module, (out, into) in shape.linears().items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            arrays[f"{name}.lora_A.weight"] = random.standard_normal((rank, into), np.float32) * 0.02
            arrays[f"{name}.lora_B.weight"] = random.standard_normal((out, rank), np.float32) * 0.02
    write_safetensors(folder / "adapter_model.safetensors", arrays, "F32")
    return folder


def write_safetensors(file: Path, arrays: dict[str, np.ndarray[Any, Any]], dtype: str) -> None:
    """A safetensors file of one dtype."""
    header, _ = _header({name: array.shape for name, array in arrays.items()}, dtype)
    with file.open("wb") as out:
        out.write(header)
        for array in arrays.values():
            out.write(array.astype({"F32": np.float32, "F16": np.float16}[dtype]).tobytes())


def _header(shapes: dict[str, tuple[int, ...]], dtype: str) -> tuple[bytes, int]:
    """The header of a safetensors file with its length, and the bytes of data that follow."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape, dtype=np.int64)) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end
