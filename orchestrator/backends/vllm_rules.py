"""vLLM's own rules as numbers, for the plan and the adapter alike. Nothing is imported: both ends have to agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GIB = 1 << 30
MIB = 1 << 20
BLOCK = {"cuda": 16, "cpu": 128}  # tokens of one block of the KV cache
VOCAB_PADDING = 64  # rows that a vocabulary is padded to a multiple of
LARGE_CARD = 70 * GIB  # from here on vLLM batches more tokens per step
# Outside of what vLLM counts: the CUDA context, and for several GPUs NCCL's buffers, both there before it looks.
CUDA_CONTEXT = 700 * MIB
NCCL = 900 * MIB
# NCCL's channels between pipeline stages are made at the first token that is sent, when the cache has its share.
NCCL_STAGES = 960 * MIB
# And CUDA graphs, captured when the cache has its share: by vLLM's own log (0.26) 80 MiB of a 1B and of an 8B with 2 in
# flight, 440 of a 1B with 256.
GRAPHS = 80 * MIB
GRAPHS_IN_FLIGHT = 3 * MIB // 2
MOST_GRAPHS_IN_FLIGHT = 256  # vLLM captures steps of up to twice as many tokens


def cuda_runtime(tensor: int, pipeline: int, in_flight: int, engine_args: Mapping[str, Any]) -> int:
    """Bytes on each GPU that vLLM's own accounting does not see (benchmarks/results/tests_gpu_two_gpus.json)."""
    together = NCCL if tensor * pipeline > 1 else 0
    stages = NCCL_STAGES if pipeline > 1 else 0
    graphs = GRAPHS + GRAPHS_IN_FLIGHT * min(in_flight, MOST_GRAPHS_IN_FLIGHT)
    return CUDA_CONTEXT + together + stages + (0 if engine_args.get("enforce_eager") else graphs)


def batched_tokens(capacity: int) -> int:
    """Tokens of one step, as vLLM's server has them on a card of this size (not on the larger one that is capped)."""
    return 8192 if capacity >= LARGE_CARD else 2048


def utilization(capacity: int, total: int, runtime: int) -> float:
    """gpu_memory_utilization with which everything on the card stays within `capacity` bytes of its `total`.

    vLLM asks for total * utilization and needs that much free when it starts; the `runtime` (cuda_runtime) comes on
    top. Rounded down: 1e-6 of 140 GiB is 150 KB.
    """
    share = (capacity - runtime) / total
    return max(0.0, int(share * 1e6) / 1e6)


def cache_blocks(tokens: int, sequences: int, block: int) -> int:
    """Blocks for so many sequences of so many tokens. One more is vLLM's own (the null block)."""
    return -(-tokens // block) * sequences + 1


def layer_split(layers: int, stages: int) -> list[int]:
    """Layers of each pipeline stage: what is left over goes to the stages before the last one."""
    split = [layers // stages] * stages
    for i in range(layers % stages):
        split[-2 - i] += 1
    return split


def thread_binding(cpus: Sequence[int], ranks: int) -> str:
    """VLLM_CPU_OMP_THREADS_BIND: the CPUs of each rank, shared where there are more ranks than CPUs.

    Where there are enough, one per rank stays free for the engine's core: on two cores, one rank on both of them
    is five times slower than on one.
    """
    used = cpus[ranks:] if len(cpus) >= 2 * ranks else cpus
    each = max(1, len(used) // ranks)
    groups = [[used[(rank * each + i) % len(used)] for i in range(each)] for rank in range(ranks)]
    return "|".join(",".join(map(str, group)) for group in groups)
