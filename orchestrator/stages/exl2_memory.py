"""What exllamav2's converter takes of the host's memory, by its sources (0.3.2, conversion/). No torch.

On the GPU there is one layer at a time; what it waits with, or has done with, lies on the host.
"""

from __future__ import annotations

from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.hardware import GIB
from orchestrator.plan.exl2_sizes import pad32
from orchestrator.stages.exl2_measurement import blocks
from orchestrator.stages.exl2_result import Linears

_PROCESS = 3 * GIB  # Python, torch, CUDA's libraries, pandas: what an engine's process takes here, and a little
_OPTIONS = 14  # widths of each linear that measuring tries (qparams.py): kept in 16 bit until the block is measured
_SHARD = 8 * GIB  # of the result (-ss): collected, and then written
_WIDE_STATES = ("Gemma2ForCausalLM",)  # their residual stream is float32 (architecture.py)


def host_needed(source: Checkpoint, bits: float, length: int, measured_rows: int | None, rows: int) -> int:
    """Bytes of host memory that a conversion takes: the most of its steps, an upper bound.

    Hidden states of all rows are there two or three times: a layer's inputs, its outputs, those of the quantized one
    (measure.py, quantize.py). Of a block's linears there are float32 copies and their Hessians' factors
    (adaptivegptq.py: prepare, reuse_h), one of them twice more while it is brought into another order, and while
    measuring every option in 16 bit (measure.py: test_quant). The head is there three times (apply_quant).

    Args:
        length: tokens of a calibration row.
        measured_rows: rows that are measured with; None: there is a measurement already.
        rows: rows that are quantized with.
    """
    linears = Linears.of(source)
    vocab, hidden = linears.head
    wide = any(name in _WIDE_STATES for name in source.config.get("architectures") or ())
    state = length * hidden * (4 if wide else 2)
    block = max((list(shapes.values()) for shapes in blocks(source).values()), key=_weights)
    narrow, *_, widest = sorted(inputs for _, inputs in block)
    held = 4 * (_weights(block) + narrow**2 + widest**2)
    turned = 8 * max(widest**2, *(out * inputs for out, inputs in block))
    layers = sum(pad32(out) * inputs for out, inputs in linears.layers.values())
    steps = [
        rows * state * 3,
        rows * state * 2 + held + turned,
        rows * state + 12 * pad32(vocab) * hidden + 4 * hidden**2,
        min(_SHARD, int(layers * bits / 8) + 4 * vocab * hidden) + 2 * _weights(block),
    ]
    if measured_rows is not None:
        steps.append(measured_rows * state * 2 + held + 2 * _OPTIONS * _weights(block))
    return _PROCESS + max(steps)


def _weights(shapes: list[tuple[int, int]]) -> int:
    return sum(out * rows for out, rows in shapes)
