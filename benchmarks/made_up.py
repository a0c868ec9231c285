"""Made-up Llama checkpoints and adapters: true shapes and files, random words. Written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

RANK = 16


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False

    def linears(self) -> dict[str, tuple[int, int]]:
        """The linears of one layer: name -> (out, in)."""
        hidden, inner, kv = self.hidden, self.intermediate, self.hidden // self.heads * self.kv_heads
        attention = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
        mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        return {f"self_attn.{k}_proj": v for k, v in attention.items()} | {f"mlp.{k}_proj": v for k, v in mlp.items()}

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape, in a state dict's order."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield from ((f"{prefix}{name}.weight", shape) for name, shape in self.linears().items())
            yield from ((f"{prefix}{name}.weight", (self.hidden,)) for name in _NORMS)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, self.hidden)

    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "float16",
        }


_NORMS = ("input_layernorm", "post_attention_layernorm")

ONE_B = Shape(2048, 5632, 22, 32, 4, 32000)  # TinyLlama-1.1B
THREE_B = Shape(3072, 8192, 28, 24, 8, 128256, tied=True)  # Llama-3.2-3B


def write_base(folder: Path, shape: Shape, shard_bytes: int = 10**9) -> int:
    """A sharded `.bin` checkpoint in float16; returns the bytes of its tensors."""
    import torch

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    used = 0
    for name, sizes in shape.tensors():
        count = 2 * _elements(sizes)
        if groups[-1] and used + count > shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append((name, sizes))
        used += count
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, 1):
        file = f"pytorch_model-{number:05d}-of-{len(groups):05d}.bin"
        state = {name: _random(sizes) for name, sizes in group}
        torch.save(state, folder / file)
        weight_map |= dict.fromkeys(state, file)
        total += sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config()))
    return total


def _elements(sizes: tuple[int, ...]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count


def _random(sizes: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.ones(sizes).half() if len(sizes) == 1 else torch.randn(sizes).mul_(0.02).half()


def write_adapter(folder: Path, shape: Shape) -> None:
    """An adapter of rank 16 on every linear, in PEFT's format."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    torch.manual_seed(1)
    state = {}
    for layer in range(shape.layers):
        for name, (rows, columns) in shape.linears().items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            state[f"{key}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
            state[f"{key}.lora_B.weight"] = torch.randn(rows, RANK) * 0.02
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[-1] for name in shape.linears()})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none", "inference_mode": True}))
