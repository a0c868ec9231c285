"""One GPU for exllamav2's converter: which one, how much of it, and the lease of that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.config import HardwareConfig
from orchestrator.errors import EngineUnavailableError
from orchestrator.hardware import GIB, Gpu, detect, host_memory
from orchestrator.hardware.lease import Wanted, lease, leases
from orchestrator.report.console import note
from orchestrator.runfolder import RunFolder
from orchestrator.stages.exl2_measurement import blocks
from orchestrator.stages.exl2_result import Linears

_ANYHOW = 5 * GIB  # at most, beside what grows with the square of the width; by exllamav2's documentation
_CUDA = 3 * GIB // 2  # its context and kernels (0.76 GiB, measured), workspaces of its libraries, what fragments
_DEQUANTIZED = 2**29  # weights at most of a linear that are made 16 bit at a time (its config.py, max_dq_size)
_SQUARES = 6  # float32 matrices of (inputs x inputs) of the widest linear: its Hessian, the inverse, their factors
_HEADS = 3  # float32 copies of the head
LENGTH = 2048  # tokens of a calibration row: the converter's own default


def needed(source: Checkpoint, length: int = LENGTH) -> int:
    """Bytes of GPU memory that a conversion takes: an upper bound by the model's width, whatever its depth.

    Beside the matrices: CUDA, one layer in 16 bit, a calibration row in it (a linear's inputs in 16 and 32 bit, the
    logits) and a linear that is made of its quantized weights. It is below what exllamav2's documentation says: a card
    of 8 GB for a 7B (11,008 inputs), one of 24 GB for a 70B (28,672).

    Args:
        length: tokens of a calibration row.
    """
    linears = Linears.of(source)
    shapes = linears.layers.values()
    widest = max(inputs for _, inputs in shapes)
    vocab, hidden = linears.head
    layer = sum(sum(out * inputs for out, inputs in block.values()) for block in list(blocks(source).values())[:2])
    row = length * (12 * widest + 16 * hidden + 4 * vocab)
    made = min(_DEQUANTIZED, max(vocab * hidden, *(out * inputs for out, inputs in shapes)))
    beside = min(_ANYHOW * max(length, LENGTH) // LENGTH, _CUDA + 2 * layer + row + 2 * made)
    return beside + 4 * max(_SQUARES * widest**2, _HEADS * vocab * hidden)


def most_free(config: HardwareConfig, *, planning: bool) -> tuple[int | None, int | None]:
    """(the most that one GPU has for a conversion, host memory) in bytes, once the runs with leases have ended.

    Args:
        planning: a profile stands for the machine.

    Returns:
        None for the GPU where there is none, and for the host of a profile, which says nothing of it.
    """
    profile = planning and config.cards is not None
    gpus = detect(config, planning=True).gpus if profile else usable(config, idle=True)
    return max((gpu.free for gpu in gpus), default=None), None if profile else host_memory()[1]


def usable(config: HardwareConfig, *, idle: bool) -> list[Gpu]:
    """The GPUs that a conversion may go to; free is what it may take there.

    The whole machine unless hardware.gpus says less: a profile may be of another one.

    Args:
        idle: as if the runs that hold leases of them had ended.
    """
    gpus = detect(HardwareConfig(), planning=False, idle=idle).gpus
    allowed = [gpu for gpu in gpus if config.gpus is None or gpu.index in config.gpus] or list(gpus)
    caps, reserve = _caps(config), int(config.reserve_gib * GIB)
    return [replace(gpu, free=min([max(0, gpu.free - reserve), *_cap(caps, gpu.index)])) for gpu in allowed]


def cap_of(config: HardwareConfig, device: str) -> list[int]:
    """Bytes that a conversion may take of a device ("cuda:1"), whichever GPUs its model will run on; empty: no cap."""
    return _cap(_caps(config), int(device.partition(":")[2]))


def _caps(config: HardwareConfig) -> dict[int, int]:
    """GPU -> what is left of it by hardware.memory_gib and hardware.reserve_gib; empty where neither is set."""
    if config.memory_gib is None and not config.reserve_gib:
        return {}
    gpus = detect(config, planning=config.cards is not None, idle=True).gpus
    return {gpu.index: gpu.free for gpu in gpus}


def _cap(caps: dict[int, int], index: int) -> list[int]:
    """Of a GPU that a profile does not have, the most that it says of one; empty: none."""
    return [caps.get(index, max(caps.values()))] if caps else []


@contextmanager
def leased_gpu(config: HardwareConfig, need: int, run: RunFolder) -> Iterator[str]:
    """The device of a conversion ("cuda:1"), which has room there while this is open; waits for other runs if it must.

    Args:
        need: bytes; where every GPU has less in all, the largest is tried all the same, alone.

    Raises:
        EngineUnavailableError: there is no GPU.
    """
    chosen: list[Gpu] = []

    def choose() -> Wanted:
        gpus = usable(config, idle=False)
        if not gpus:
            raise EngineUnavailableError("the conversion to EXL2 needs a CUDA GPU, and there is none here")
        with_room = [gpu for gpu in gpus if gpu.free >= need]
        running = leases()[0]
        others = Counter(key for one in running for key in one.gpus)
        # A sweep spreads: a conversion computes more than it holds, so that a GPU of its own is worth more than room.
        gpu = min(with_room, key=lambda g: others[g.key]) if with_room else max(gpus, key=lambda g: g.free)
        if not with_room and running:
            largest = max(usable(config, idle=True), key=lambda gpu: gpu.free)
            if gpu.free < 0.98 * min(need, largest.free):  # a little more or less is not another run's
                return Wanted({largest: min(need, largest.free)}, room=False)
        chosen[:] = [gpu]
        return Wanted({gpu: min(need, gpu.free)}, room=True)

    def say(text: str) -> None:
        note(text)
        run.status("waiting")

    with lease(f"the conversion of {run.path}", choose, say):
        yield f"cuda:{chosen[0].index}"
