"""Made-up checkpoints and adapters, small enough to write by the dozen."""

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 32, 4, 2, 8, 48, 64

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SCALED: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 8, "lora_alpha": 3, "target_modules": LINEARS, "use_rslora": True},
    "fan_in_fan_out": {"r": 4, "target_modules": LINEARS, "fan_in_fan_out": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": LINEARS,
        "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp\.\w+": 6, "^model.layers.0.self_attn.o_proj": 3},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5, "q_proj": 7, "mlp.up_proj": 1},
        "use_rslora": True,
    },
}
"""Options of PEFT's LoraConfig: every way in which the product of the factors is scaled."""

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

Q_PROJ = "model.layers.0.self_attn.q_proj"


def model_tensors(layers: int = 2, *, head: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A Llama's tensors with random values, in the order of a state dict."""
    torch.manual_seed(seed)
    rows = {"q_proj": HEADS * HEAD_DIM, "k_proj": KV_HEADS * HEAD_DIM, "v_proj": KV_HEADS * HEAD_DIM}
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(layers):
        start = f"model.layers.{layer}."
        shapes |= {f"{start}self_attn.{name}.weight": (size, HIDDEN) for name, size in rows.items()}
        shapes[f"{start}self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes[f"{start}mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{start}mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{start}mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes[f"{start}input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{start}post_attention_layernorm.weight"] = (HIDDEN,)
    shapes["model.norm.weight"] = (HIDDEN,)
    if head:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return {name: (torch.randn(shape) * 0.1).to(dtype) for name, shape in shapes.items()}


def write_model(
    folder: Path,
    tensors: dict[str, torch.Tensor] | None = None,
    *,
    kind: str = "safetensors",
    shards: int = 1,
    config: dict[str, Any] | None = None,
) -> Path:
    """A model's folder: config.json (CONFIG with `config` over it), weights, an index where sharded."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = model_tensors() if tensors is None else tensors
    write_json(folder / "config.json", {**CONFIG, **(config or {})})
    write_json(folder / "generation_config.json", {"eos_token_id": 2})
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    stem, suffix = {"safetensors": ("model", ".safetensors"), "bin": ("pytorch_model", ".bin")}[kind]
    names = list(tensors)
    parts = [names[number::shards] for number in range(shards)]
    files = [f"{stem}-{number + 1:05d}-of-{shards:05d}{suffix}" for number in range(shards)]
    if shards == 1:
        files = [stem + suffix]
    for file, part in zip(files, parts, strict=True):
        save(folder / file, {name: tensors[name] for name in part})
    if shards > 1:
        where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        write_json(folder / f"{stem}{suffix}.index.json", {"metadata": {}, "weight_map": where})
    return folder


def save(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A weight file by its suffix."""
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def adapter_tensors(modules: list[str], rank: int = 4, *, seed: int = 1, scale: float = 0.1):
    """Random lora_A and lora_B for q_proj or gate_proj modules of the made-up model."""
    torch.manual_seed(seed)
    sizes = {"q_proj": (HIDDEN, HEADS * HEAD_DIM), "gate_proj": (HIDDEN, INTERMEDIATE)}
    found = {}
    for module in modules:
        inputs, outputs = sizes[module.rpartition(".")[2]]
        found[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, inputs) * scale
        found[f"base_model.model.{module}.lora_B.weight"] = torch.randn(outputs, rank) * scale
    return found


def write_adapter(
    folder: Path,
    tensors: dict[str, torch.Tensor] | None = None,
    *,
    kind: str = "safetensors",
    config: dict[str, Any] | None = None,
) -> Path:
    """An adapter's folder: a LoRA of rank 4 on q_proj of layer 0, unless other tensors are given."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = adapter_tensors([Q_PROJ]) if tensors is None else tensors
    modules = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in tensors if ".lora_" in name})
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": modules}
    write_json(folder / "adapter_config.json", {**plain, **(config or {})})
    save(folder / {"safetensors": "adapter_model.safetensors", "bin": "adapter_model.bin"}[kind], tensors)
    return folder


def write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value))


def raw_safetensors(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header (an object, or bytes as they are)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def raw_bin(file: Path, pickle: bytes, data: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A zip as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(file, "w", **options) as zipped:
        zipped.writestr("archive/data.pkl", pickle)
        zipped.writestr("archive/byteorder", "little")
        for key, value in (data or {}).items():
            zipped.writestr(f"archive/data/{key}", value)
    return file
