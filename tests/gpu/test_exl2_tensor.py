"""ExLlamaV2's tensor parallel on two GPUs: the answers of one GPU, where the plan wanted them.

The model is made up, true shapes and random words: the embedded one is too narrow to be cut.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from made_up import Shape
from made_up_fast import write_exl2

from orchestrator.backends.protocol import Delta, Finished, Request
from orchestrator.config import (
    BackendConfig,
    CacheConfig,
    Config,
    HardwareConfig,
    ModelConfig,
    ParallelConfig,
    PathsConfig,
)
from orchestrator.hardware import nvml_gpus
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.session import Session, look, open_session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(len(nvml_gpus()[0]) < 2, reason="needs two GPUs"),
]
SHAPE = Shape(2048, 8192, 4, 32, 8, 4096)
TOKENS = [(7 * i) % 4000 + 3 for i in range(300)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("exllamav2")
    return write_exl2(tmp_path_factory.mktemp("model") / "exl2", SHAPE, 1024, 4)


@contextmanager
def session(folder: Path, model: Path, ranks: int, cache_bits: int = 16) -> Iterator[Session]:
    config = Config(
        backend=BackendConfig(name="exllamav2"),
        model=ModelConfig(path=str(model), max_context=1024),
        hardware=HardwareConfig(gpus=list(range(ranks))),
        parallel=ParallelConfig(tensor=ranks if ranks > 1 else None),
        cache=CacheConfig(bits=cache_bits),
        paths=PathsConfig(artifacts=str(folder / "artifacts")),
    )
    config = replace(config, run=replace(config.run, in_flight=4))
    (folder / f"run-{ranks}").mkdir(parents=True)
    with open_session(look(config, planning=False), RunFolder(folder / f"run-{ranks}")) as live:
        yield live


def answered(live: Session) -> dict[str, list[int]]:
    """Four requests at the same time."""
    found: dict[str, list[int]] = {}
    for i in range(4):
        live.engine.submit(Request(str(i), TOKENS[i * 10 : i * 10 + 20], 12))
        found[str(i)] = []
    left = set(found)
    while left:
        for event in live.engine.events(timeout=60):
            assert isinstance(event, Delta | Finished), event
            if isinstance(event, Delta):
                found[event.id] += event.tokens
            else:
                left.discard(event.id)
    return found


@pytest.mark.parametrize("cache_bits", [16, 4])
def test_two_gpus_say_what_one_says(cache_bits: int, tmp_path: Path, model: Path) -> None:
    scores, tokens = {}, {}
    for ranks in (1, 2):
        with session(tmp_path, model, ranks, cache_bits) as live:
            scores[ranks] = live.engine.score(TOKENS, 1).logprobs
            tokens[ranks] = answered(live)
            gpus, placed = live.chosen.gpus, live.ready.placement
            peaks = live.engine.stats().gpu_peak_bytes
    apart = [abs(a - b) for a, b in zip(scores[1], scores[2], strict=True)]
    assert sum(apart) / len(apart) < 0.05
    same = [tokens[1][name][:2] == tokens[2][name][:2] for name in tokens[1]]
    assert sum(same) >= len(same) / 2, tokens  # in half precision two words of such a model are often as likely
    for gpu, peak in zip(gpus, peaks, strict=True):
        assert placed[gpu.device] == pytest.approx(gpu.weights, rel=0.001)
        assert peak <= gpu.total
