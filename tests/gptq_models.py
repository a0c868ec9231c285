"""Real GPTQ checkpoints without a GPTQ library: weights rounded to the nearest code, packed as AutoGPTQ packs them.

The v1 layout (checkpoint_format "gptq"): qweight int32 [in * bits / 32, out] with the lowest input in the lowest bits,
qzeros int32 [groups, out * bits / 32] of the zero point minus 1, scales float16 [groups, out], g_idx int32 [in].
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

LINEAR = "_proj.weight"


def round_to_nearest(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [out, in], scales [out, groups] in float16) of symmetric quantization; the code of 0 is 2^(bits-1)."""
    out, into = weight.shape
    grouped = weight.float().view(out, into // group, group)
    middle = 2 ** (bits - 1)
    scales = (grouped.abs().amax(-1) / (middle - 1)).clamp(min=1e-6).half()
    codes = (grouped / scales.float()[..., None]).round().clamp(-middle, middle - 1) + middle
    return codes.view(out, into).to(torch.int64), scales


def unpacked(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The weights that codes and scales stand for, in float32."""
    out, into = codes.shape
    grouped = (codes - 2 ** (bits - 1)).float().view(out, scales.shape[1], -1)
    return (grouped * scales.float()[..., None]).view(out, into)


def words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words of neighbouring rows, the first in the lowest bits."""
    each = 32 // bits
    shifts = torch.arange(each, dtype=torch.int64) * bits
    packed = (values.view(-1, each, values.shape[1]) << shifts[None, :, None]).sum(1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def packed(codes: torch.Tensor, scales: torch.Tensor, bits: int, group: int) -> dict[str, torch.Tensor]:
    """The four tensors of one linear."""
    out, into = codes.shape
    zeros = torch.full((out, scales.shape[1]), 2 ** (bits - 1) - 1, dtype=torch.int64)
    return {
        "qweight": words(codes.T.contiguous(), bits),
        "qzeros": words(zeros, bits).T.contiguous(),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(into) // group).to(torch.int32),
    }


def write_gptq(source: Path, target: Path, bits: int = 4, group: int = 128) -> dict[str, torch.Tensor]:
    """Writes `source` (one safetensors file) as GPTQ; returns its weights as they are after quantization, float32."""
    shutil.copytree(source, target)
    tensors = safetensors.torch.load_file(target / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith(LINEAR):
            stored[name] = tensor.half() if tensor.dtype == torch.float32 else tensor
            plain[name] = stored[name].float()
            continue
        codes, scales = round_to_nearest(tensor, bits, group)
        module = name.removesuffix("weight")
        stored |= {module + part: value for part, value in packed(codes, scales, bits, group).items()}
        plain[name] = unpacked(codes, scales, bits)
    safetensors.torch.save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
    }
    (target / "config.json").write_text(json.dumps(config))
    return plain


def write_embedded_gptq(folder: Path, store: Path, bits: int = 4) -> Path:
    """The embedded model with its adapter merged, by the command that a user types, as GPTQ: a folder in `folder`."""
    plain, gptq = folder / "plain", folder / "gptq"
    command = [sys.executable, "-m", "orchestrator", "task=convert", f"output.path={plain}", "convert.dtype=float16"]
    places = [f"paths.artifacts={store}", f"paths.runs={folder / 'convert'}"]
    done = subprocess.run([*command, *places], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    write_gptq(plain, gptq, bits)
    return gptq
