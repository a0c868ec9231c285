"""Does the memory of a merge grow with the model? Peak resident memory of the merge stage, four times the layers.

Made-up Llama checkpoints (random float16 words, sharded .bin) of about 0.5 and 2 GB, with a rank-16 adapter on every
linear; each merged in a process of its own, whose peak is read from the kernel. Memory-mapped file pages count as
resident while they are mapped: both figures are given, the peak of everything and that of anonymous memory.
usage: merge_memory.py [FOLDER]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import save

SHAPE = {"hidden": 2048, "intermediate": 5632, "vocab": 8192, "heads": 32, "kv_heads": 8}
LAYERS = (6, 24)
RANK = 16
BOUND = 1.10  # the larger model's peak over the smaller's


def linears() -> dict[str, tuple[int, int]]:
    """The linears of one layer: name -> (out, in)."""
    hidden, inner = SHAPE["hidden"], SHAPE["intermediate"]
    kv = hidden // SHAPE["heads"] * SHAPE["kv_heads"]
    attention = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {f"self_attn.{k}": v for k, v in attention.items()} | {f"mlp.{k}": v for k, v in mlp.items()}


def write_base(folder: Path, layers: int) -> int:
    """A sharded .bin checkpoint of two layers a shard; returns its bytes."""
    import torch

    folder.mkdir(parents=True)
    hidden, vocab = SHAPE["hidden"], SHAPE["vocab"]
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) * 0.02).half()

    shards: list[dict[str, torch.Tensor]] = [{"model.embed_tokens.weight": random(vocab, hidden)}]
    weight_map: dict[str, str] = {}
    count = (layers + 1) // 2 + 2
    total = 0

    def flush(state: dict[str, torch.Tensor], number: int) -> None:
        nonlocal total
        name = f"pytorch_model-{number:05d}-of-{count:05d}.bin"
        torch.save(state, folder / name)
        weight_map.update(dict.fromkeys(state, name))
        total += sum(t.numel() * t.element_size() for t in state.values())

    flush(shards[0], 1)
    for pair in range((layers + 1) // 2):
        state = {}
        for layer in range(2 * pair, min(2 * pair + 2, layers)):
            prefix = f"model.layers.{layer}."
            state |= {f"{prefix}{name}.weight": random(*shape) for name, shape in linears().items()}
            norms = ("input_layernorm", "post_attention_layernorm")
            state |= {f"{prefix}{name}.weight": torch.ones(hidden).half() for name in norms}
        flush(state, pair + 2)
    flush({"model.norm.weight": torch.ones(hidden).half(), "lm_head.weight": random(vocab, hidden)}, count)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": SHAPE["intermediate"],
        "num_hidden_layers": layers,
        "num_attention_heads": SHAPE["heads"],
        "num_key_value_heads": SHAPE["kv_heads"],
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def write_adapter(folder: Path, layers: int) -> None:
    """A rank-16 adapter on every linear, in PEFT's format."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    state = {}
    for layer in range(layers):
        for name, (rows, columns) in linears().items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            state[f"{key}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
            state[f"{key}.lora_B.weight"] = torch.randn(rows, RANK) * 0.02
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[-1] for name in linears()})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none", "inference_mode": True}))


def merge_here(base: str, adapter: str, out: str) -> None:
    """The merge stage alone, in this process; prints its own peaks (bytes)."""
    from orchestrator.checkpoint.adapter import open_adapter
    from orchestrator.checkpoint.folder import open_checkpoint
    from orchestrator.stages.merge import merge

    peak = {"anonymous": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            anonymous = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
            peak["anonymous"] = max(peak["anonymous"], anonymous * 1024)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    Path(out).mkdir()
    started = time.perf_counter()
    opened = open_checkpoint(Path(base))
    merge(
        opened, [(open_adapter(Path(adapter)), 1.0)], Path(out), dtype=None, shard_size=10**9, progress=lambda *_: None
    )
    seconds = time.perf_counter() - started
    done.set()
    status = Path("/proc/self/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    print(json.dumps({"peak_resident": resident, "peak_anonymous": peak["anonymous"], "seconds": round(seconds, 2)}))


def main() -> None:
    work = Path(tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None))
    rows = []
    try:
        for layers in LAYERS:
            size = write_base(work / f"base{layers}", layers)
            write_adapter(work / f"adapter{layers}", layers)
            names = [str(work / f"{what}{layers}") for what in ("base", "adapter", "out")]
            command = [sys.executable, __file__, "--merge", *names]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"layers": layers, "base_bytes": size, **json.loads(done.stdout.splitlines()[-1])})
            print(json.dumps(rows[-1]), flush=True)
            shutil.rmtree(work / f"base{layers}")
    finally:
        shutil.rmtree(work)
    ratio = {key: round(rows[1][key] / rows[0][key], 3) for key in ("peak_resident", "peak_anonymous")}
    result = {"rows": rows, "ratio": ratio, "bound": BOUND, "within_bound": max(ratio.values()) <= BOUND}
    print(save("merge_memory", result))
    sys.exit(0 if result["within_bound"] else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--merge"]:
        merge_here(*sys.argv[2:5])
    else:
        main()
