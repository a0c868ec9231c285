"""What ExLlamaV2 needs before its first import, and the sizes that the plan, the adapter and the converter share.

Standard library only (torch inside functions): this runs in the planner and in the engine's own interpreter.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence

MIB = 2**20
PAGE = 256  # tokens of a page of the cache; the context is rounded up to it
MAX_INPUT = 2048  # tokens of one forward pass
SCORE_CHUNK = 256  # tokens of one forward pass that keeps the logits of all of them
SCORE_ROWS = 64  # positions whose float32 log-probabilities are held at a time
# CUDA context, kernels, cuBLAS: what a process takes beside torch's allocator. 753 to 769 MiB on an H200
# (benchmarks/results/tests_gpu_exllamav2.json). Other cards were not measured.
CONTEXT_BYTES = 780 * MIB
# What load_autosplit keeps free on the first GPU and on the others, and while it fills one (its own defaults).
RESERVE_FIRST, RESERVE_OTHERS, RESERVE_FILLING = 192 * MIB, 64 * MIB, 256 * MIB
FLASH_ATTENTION = (2, 5, 7)  # the first version with a paged cache
FLASH_CAPABILITY = (8, 0)  # the least compute capability that it runs on


def round_up(tokens: int) -> int:
    """Tokens in whole pages."""
    return -(-tokens // PAGE) * PAGE


def visible_devices(devices: Sequence[str], environ: Mapping[str, str]) -> str:
    """CUDA_VISIBLE_DEVICES of a process that may see these devices only, in this order.

    Args:
        devices: "cuda:0", ...: indexes among those that this process sees.
    """
    seen = [part.strip() for part in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    indexes = [int(device.removeprefix("cuda:")) for device in devices]
    return ",".join(seen[i] if i < len(seen) else str(i) for i in indexes)


def prepare_attention() -> str:
    """Settles how ExLlamaV2 will compute attention, before it is imported.

    flash-attn where it can be used: it is imported here, because one that was built for another torch would make
    the import of exllamav2 fail, and because exllamav2 uses it on GPUs too old for it.

    Returns:
        "" where a paged cache can be used; else why not.
    """
    # exllamav2 0.3.2 gives torch's SDPA no causal mask (attn.py, _attn_torch): a prompt's tokens would see the tokens
    # after them. Its own matmul does mask.
    os.environ["EXLLAMA_NO_SDPA"] = "1"
    if "EXLLAMA_NO_FLASH_ATTN" in os.environ:
        return "EXLLAMA_NO_FLASH_ATTN is set"
    reason, usable = _flash_attention()
    if not usable:
        os.environ["EXLLAMA_NO_FLASH_ATTN"] = "1"
    return reason


def _flash_attention() -> tuple[str, bool]:
    """(why no paged cache, whether flash-attn can be used at all)."""
    import torch

    old = [i for i in range(torch.cuda.device_count()) if torch.cuda.get_device_capability(i) < FLASH_CAPABILITY]
    if old:
        return f"flash-attn needs compute capability 8.0, and GPU {old[0]} is older", False
    try:
        flash = importlib.import_module("flash_attn")
        importlib.import_module("flash_attn_2_cuda")
        version = tuple(int(part) for part in re.findall(r"\d+", str(flash.__version__))[:3])
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed", False
    except (ImportError, OSError, AttributeError) as error:  # built for another torch or CUDA
        return f"flash-attn cannot be imported ({str(error).splitlines()[0][:120]})", False
    if version < FLASH_ATTENTION:
        return f"flash-attn {flash.__version__} is older than {'.'.join(map(str, FLASH_ATTENTION))}", True
    return "", True


def limit_memory(limits: Sequence[int]) -> None:
    """Caps torch's allocator on each visible GPU, so that the process stays within `limits` bytes there."""
    import torch

    for index, limit in enumerate(limits[: torch.cuda.device_count()]):
        total = torch.cuda.get_device_properties(index).total_memory
        fraction = (limit - CONTEXT_BYTES) / total
        if fraction < 1.0:
            torch.cuda.set_per_process_memory_fraction(max(fraction, 0.0), index)
