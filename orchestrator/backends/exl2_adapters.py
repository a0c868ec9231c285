"""Adapters on a loaded ExLlamaV2 model. Nothing of exllamav2 is imported: its modules are walked."""

from __future__ import annotations

from typing import Any


def sort_factors(model: Any) -> None:
    """Brings the adapters' factors into the order that a quantized MLP has within, in place.

    An EXL2 file keeps down_proj's inputs by their importance. exllamav2 0.3.2 sorts gate_proj's and up_proj's outputs
    likewise when it loads them (linear.py: unmap, output_map), and forgets the order: its kernels add B of the two to
    sorted outputs, and give sorted inputs to A of the third, but its reader of adapters (lora.py) sorts neither.

    Args:
        model: a loaded ExLlamaV2 with its adapters. Nothing may have run on them yet.
    """
    import torch

    with torch.inference_mode():  # in which they were made
        for module in model.modules:
            down: Any = getattr(module, "down_proj", None)
            order = None if down is None else _order(down)
            if order is None:
                continue
            for linear in (module.gate_proj, module.up_proj):
                for b in linear.lora_b_tensors.values() if linear is not None else ():  # (rank, outputs)
                    b.copy_(b[:, order.to(b.device)])
            for a in down.lora_a_tensors.values():  # (inputs, rank)
                a.copy_(a[order.to(a.device)])


def _order(down: Any) -> Any:
    """Which input each stored row of down_proj is; None where nothing was sorted."""
    tensors = down.q_tensors
    if not isinstance(tensors, dict) or "q_weight" not in tensors or "q_perm" in tensors:
        return None
    stored = down.load_multi(down.key, ["q_invperm"], cpu=True)
    return stored["q_invperm"].argsort()
