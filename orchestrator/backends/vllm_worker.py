"""What our child asks of vLLM's worker processes: mixed into vLLM's own worker class (`worker_extension_cls`).

Answers are lists of plain values: they come back through vLLM's msgpack.
"""

from __future__ import annotations

from typing import Any


class OrchestratorWorker:
    """Methods for `collective_rpc`; `self` is vLLM's worker. The prefix keeps its own names free."""

    def orchestrator_tensors(self: Any) -> list[tuple[str, str, int]]:
        """(device, name, bytes) of every parameter and stored buffer of this rank; tied ones once."""
        found: list[tuple[str, str, int]] = []
        seen: set[int] = set()
        for path, module in self.get_model().named_modules():
            held = dict(module._parameters)
            held |= {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
            for name, tensor in held.items():
                if tensor is None or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                size = tensor.nbytes or _packed_bytes(module, name, tensor)
                found.append((str(tensor.device), f"{path}.{name}" if path else name, size))
        return found

    def orchestrator_gpu_peak(self: Any) -> int:
        """The allocator's peak on this rank's GPU, bytes; 0 on a CPU."""
        import torch

        return int(torch.cuda.max_memory_allocated(self.device)) if self.device.type == "cuda" else 0


def _packed_bytes(module: Any, name: str, tensor: Any) -> int:
    """Bytes of a linear's weight that the CPU kernels keep in their own layout.

    vLLM leaves an empty parameter behind; the packed copy holds the same numbers.
    """
    if name != "weight" or not hasattr(module, "input_size_per_partition"):
        return 0
    return int(module.input_size_per_partition * module.output_size_per_partition * tensor.element_size())
