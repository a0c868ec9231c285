"""The tensors of a transformers model, with what bitsandbytes keeps beside them; and its repacking, switched off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from orchestrator.errors import EngineError

# attribute of a 4-bit weight's quant_state -> what bitsandbytes calls it in a checkpoint
_STATE = {"absmax": "absmax", "code": "quant_map", "offset": "nested_offset"}
_NESTED = {"absmax": "nested_absmax", "code": "nested_quant_map"}
_SWITCH = "support_avx512bf16_for_cpu"
_REPACKS = "_convert_weight_packed_for_cpu"


def bytes_per_tensor(model: Any) -> dict[str, dict[str, int]]:
    """device -> {tensor name: bytes}, each piece of memory once (a tied head is its embedding).

    What accelerate holds offloaded counts where it is: on "cpu" or "disk". Anything else without data is on "meta".
    """
    placement: dict[str, dict[str, int]] = {}
    seen: set[object] = set()
    for name, tensor, store in _tensors(model):
        # A meta tensor has no address.
        key = (str(tensor.device), tensor.data_ptr()) if tensor.device.type != "meta" else id(tensor)
        if key in seen or tensor.numel() == 0:
            continue
        seen.add(key)
        placement.setdefault(store or str(tensor.device), {})[name] = tensor.numel() * tensor.element_size()
    return placement


def _tensors(model: Any) -> Iterator[tuple[str, Any, str]]:
    """(name, tensor, where it is offloaded to or "")."""
    for path, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            full = f"{path}.{name}" if path else name
            yield full, tensor, _store(module, name) if tensor.device.type == "meta" else ""
            for extra, value in _beside(module, tensor).items():
                if value is not None:
                    yield f"{full}.{extra}", value, ""


def offload_hooks(module: Any) -> list[Any]:
    """accelerate's hooks that bring the module's own weights in before its forward pass."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # several are held in one
    return [h for h in hooks if getattr(h, "offload", False) and getattr(h, "weights_map", None) is not None]


def _store(module: Any, name: str) -> str:
    """Where the hooks have a tensor from: "cpu", "disk", or "" where none has it."""
    for hook in offload_hooks(module):
        held, key = hook.weights_map.dataset, f"{hook.weights_map.prefix}{name}"
        if key in held.state_dict:
            return str(held.state_dict[key].device)
        if key in held.index:
            return "disk"
    return ""


def _beside(module: Any, weight: Any) -> dict[str, Any]:
    """What bitsandbytes keeps of one weight outside of the module's parameters and buffers."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        found = {label: getattr(state, name, None) for name, label in _STATE.items()}
        nested = getattr(state, "state2", None)
        if nested is not None:
            found |= {label: getattr(nested, name, None) for name, label in _NESTED.items()}
        return found
    # int8: the scales move from the weight to the module's state in the first forward pass.
    return {
        label: value
        for label in ("CB", "SCB")
        for holder in (weight, getattr(module, "state", None) if hasattr(weight, "has_fp16_weights") else None)
        if (value := getattr(holder, label, None)) is not None
    }


def keep_4bit_layout(model: Any) -> None:
    """Stops bitsandbytes from repacking 4-bit weights in place in their first forward pass on the CPU.

    On CPUs with AVX512-BF16 (and only there) it then computes in bfloat16 whatever the compute dtype is, drops the
    double quantization, and everything that reads the weights afterwards (dequantize, merge) gets garbage without an
    error. Without it, answers are the same on every CPU.

    Raises:
        EngineError: this bitsandbytes repacks, but no longer has the switch that we know.
    """
    import bitsandbytes as bnb

    for path, module in model.named_modules():
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        if hasattr(module, _SWITCH):
            setattr(module, _SWITCH, False)
        elif hasattr(bnb.functional, _REPACKS):
            raise EngineError(
                f"bitsandbytes {bnb.__version__} repacks the 4-bit weights of {path} on the CPU and has no {_SWITCH}",
                "Install the version that was tested: pip install 'bitsandbytes>=0.50,<0.51'",
            )
