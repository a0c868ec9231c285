"""Where the tensors of a loaded ExLlamaV2 model lie. Nothing of exllamav2 is imported: its modules are walked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_OWN = ("weight", "bias", "q4_weight", "q4_scales", "fp16_bias")  # attributes that hold a tensor
_ADAPTERS = ("lora_a_tensors", "lora_b_tensors")  # attributes that hold one for each adapter
_PARTS = ("linear", "embedding", "layernorm")  # attributes that hold a torch module with a weight and a bias


def bytes_per_tensor(model: Any, devices: list[str]) -> dict[str, dict[str, int]]:
    """device -> {tensor name: bytes} of every weight, those of adapters too; scratch buffers and the cache are none.

    Args:
        model: a loaded ExLlamaV2.
        devices: the plan's name of each GPU that the process sees.
    """
    found: dict[str, dict[str, int]] = {}
    seen: set[tuple[str, int]] = set()
    for module in model.modules:
        # A linear or a norm has no submodules, an attention or an MLP block has no tensors of its own.
        for part in module.submodules or [module]:
            for name, tensor in _tensors(part):
                device = _device(tensor, devices)
                address = (device, tensor.data_ptr())
                if address in seen and device != "meta":  # the same tensor under two names
                    continue
                seen.add(address)
                found.setdefault(device, {})[f"{part.key}.{name}"] = tensor.nbytes
    return found


def _tensors(part: Any) -> Iterator[tuple[str, Any]]:
    import torch

    for quantized in _each(getattr(part, "q_tensors", None)):
        if isinstance(quantized, dict):
            yield from ((name, tensor) for name, tensor in quantized.items() if isinstance(tensor, torch.Tensor))
    for name in _OWN:
        for tensor in _each(getattr(part, name, None)):
            if isinstance(tensor, torch.Tensor):
                yield name, tensor
    for attribute in _ADAPTERS:
        factors = getattr(part, attribute, {}).values()
        yield from ((f"{attribute}.{number}", tensor) for number, tensor in enumerate(factors))
    for attribute in _PARTS:
        inner = getattr(part, attribute, None)
        if isinstance(inner, torch.nn.Module):
            yield from inner.named_parameters()


def _each(value: Any) -> list[Any]:
    """Tensor parallel keeps a list, of one for each GPU."""
    return value if isinstance(value, list) else [value]


def _device(tensor: Any, devices: list[str]) -> str:
    if tensor.device.type == "cuda":
        index = tensor.device.index or 0
        return devices[index] if index < len(devices) else f"cuda:{index}"
    return str(tensor.device.type)
