"""One GPU for exllamav2's converter: which one, how much of it, and the lease of that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.config import HardwareConfig
from orchestrator.errors import EngineUnavailableError
from orchestrator.hardware import GIB, Gpu, detect
from orchestrator.hardware.lease import Wanted, lease, leases
from orchestrator.report.console import note
from orchestrator.runfolder import RunFolder
from orchestrator.stages.exl2_result import Linears

# CUDA, the calibration rows that are worked on with their attention, one layer in 16 bit and what is quantized of it.
_ANYHOW = 5 * GIB
_SQUARES = 6  # float32 matrices of (inputs x inputs) of the widest linear: its Hessian, the inverse, their factors
_HEADS = 3  # float32 copies of the head


def needed(source: Checkpoint) -> int:
    """Bytes of GPU memory that a conversion takes: an upper bound by the model's width, whatever its depth.

    It is at what exllamav2's documentation says: 8 GB for a 7B (11,008 inputs), 24 GB for a 70B (28,672).
    """
    linears = Linears.of(source)
    widest = max(inputs for _, inputs in linears.layers.values())
    vocab, hidden = linears.head
    return _ANYHOW + 4 * max(_SQUARES * widest**2, _HEADS * vocab * hidden)


@contextmanager
def leased_gpu(config: HardwareConfig, need: int, run: RunFolder) -> Iterator[str]:
    """The device of a conversion ("cuda:1"), which has room there while this is open; waits for other runs if it must.

    Args:
        need: bytes; where every GPU has less in all, the largest is tried all the same, alone.

    Raises:
        EngineUnavailableError: there is no GPU.
    """
    chosen: list[Gpu] = []

    def usable(idle: bool) -> list[Gpu]:
        # The whole machine: a profile may be of another one, and its caps are the model's.
        gpus = detect(HardwareConfig(), planning=False, idle=idle).gpus
        return [gpu for gpu in gpus if config.gpus is None or gpu.index in config.gpus] or list(gpus)

    def choose() -> Wanted:
        gpus = usable(idle=False)
        if not gpus:
            raise EngineUnavailableError("the conversion to EXL2 needs a CUDA GPU, and there is none here")
        with_room = [gpu for gpu in gpus if gpu.free >= need]
        running = leases()[0]
        others = Counter(key for one in running for key in one.gpus)
        # A sweep spreads: a conversion computes more than it holds, so that a GPU of its own is worth more than room.
        gpu = min(with_room, key=lambda g: others[g.key]) if with_room else max(gpus, key=lambda g: g.free)
        if not with_room and running:
            largest = max(usable(idle=True), key=lambda gpu: gpu.free)
            if gpu.free < 0.98 * min(need, largest.free):  # a little more or less is not another run's
                return Wanted({largest: min(need, largest.free)}, room=False)
        chosen[:] = [gpu]
        return Wanted({gpu: min(need, gpu.free)}, room=True)

    def say(text: str) -> None:
        note(text)
        run.status("waiting")

    with lease(f"the conversion of {run.path}", choose, say):
        yield f"cuda:{chosen[0].index}"
