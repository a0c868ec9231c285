"""Where a plan goes when other runs have leases: on GPUs that are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from composing import composed
from small_models import Llama, write_headers

from orchestrator import hardware
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.config import HardwareConfig
from orchestrator.errors import DoesNotFitError, EngineUnavailableError
from orchestrator.hardware import DRIVER_KEEPS, GIB, MIB, Gpu
from orchestrator.hardware import lease as module
from orchestrator.hardware.lease import Wanted, lease, leases
from orchestrator.plan.types import Candidate
from orchestrator.runfolder import RunFolder
from orchestrator.stages.exl2_gpu import cap_of, leased_gpu, most_free, needed, usable
from orchestrator.tasks.gpus import leased
from orchestrator.tasks.session import Planned, load_plan, look

CARDS = tuple(Gpu(i, "a card", 24 * GIB, 23 * GIB, (8, 6), f"GPU-{i}") for i in range(2))


class Others:
    """Other runs' leases. They end, one at a time, when somebody waits for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._runs: list[ExitStack] = []
        self.waits = 0
        monkeypatch.setattr(module, "_until_other", self._until_other)

    def take(self, gpu: Gpu, size: int) -> None:
        self._runs.append(ExitStack())
        self._runs[-1].enter_context(lease("another", lambda: Wanted({gpu: size}, True), pytest.fail))

    def close(self) -> None:
        for run in self._runs:
            run.close()

    def _until_other(self, held: object) -> None:
        self.waits += 1
        self._runs.pop(0).close()


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Others]:
    monkeypatch.setenv(module.PLACE, str(tmp_path / "leases"))
    cards(monkeypatch, *CARDS)
    made = Others(monkeypatch)
    yield made
    made.close()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def cards(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu) -> None:
    monkeypatch.setattr(hardware, "nvml_gpus", lambda: (gpus, () if gpus else ("no GPU",)))


@pytest.fixture
def plan(hydra: None, every_engine: None, no_margins: None, others: Others) -> Callable[..., tuple[Planned, Candidate]]:
    def made(*argv: str) -> tuple[Planned, Candidate]:
        planned = look(composed("backend=transformers", "quant.bits=16", *argv), planning=False)
        return planned, planned.plan.chosen

    return made


Plan = Callable[..., tuple[Planned, Candidate]]


def devices(candidate: Candidate) -> list[str]:
    return [gpu.device for gpu in candidate.gpus]


def test_a_run_leases_what_it_was_planned_to_take(plan: Plan, run: RunFolder) -> None:
    planned, chosen = plan()
    with leased(planned, chosen, run) as (_, found):
        assert found.gpus == chosen.gpus
        [held] = leases()[0]
        assert {name: share.asked for name, share in held.gpus.items()} == {"GPU-0": chosen.gpus[0].total}
        assert held.what == str(run.path)
    assert leases() == ([], ())


def test_the_next_run_is_planned_on_the_next_gpu(plan: Plan, others: Others) -> None:
    others.take(CARDS[0], 4 * GIB)
    assert devices(plan()[1]) == ["cuda:1"]
    assert devices(plan("hardware.gpus=[0,1]")[1]) == ["cuda:0"]


def test_a_gpu_that_was_taken_meanwhile_is_left_for_another(plan: Plan, others: Others, run: RunFolder) -> None:
    planned, chosen = plan()
    assert devices(chosen) == ["cuda:0"]
    others.take(CARDS[0], 23 * GIB)
    with leased(planned, chosen, run) as (again, found):
        assert devices(found) == devices(again.plan.chosen) == ["cuda:1"]
        assert set(load_plan(again, found, Path("model")).device_map.values()) == {"cuda:1"}
        assert again.hardware.gpus[1].held_by[0].name == "another"
    assert others.waits == 0


@pytest.mark.parametrize("pinned", [True, False])
def test_where_every_gpu_is_taken_a_run_waits(
    plan: Plan, others: Others, run: RunFolder, pinned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for card in reversed(CARDS[: 1 if pinned else 2]):
        others.take(card, 23 * GIB)
    planned, chosen = plan(*(["hardware.gpus=[0]"] if pinned else []))
    assert chosen.fits
    with leased(planned, chosen, run) as (_, found):
        assert devices(found) == ["cuda:0" if pinned else "cuda:1"]
    assert others.waits == 1
    said = capsys.readouterr().err
    assert f"waiting for {chosen.gpus[0].total / GIB:.2f} GiB on GPU 0, held by another (pid " in said


def test_it_waits_for_its_context(plan: Plan, others: Others, run: RunFolder) -> None:
    planned, chosen = plan("hardware.gpus=[0]", "run.in_flight=4")
    assert chosen.max_context == 2048
    others.take(CARDS[0], CARDS[0].free - chosen.gpus[0].total + 8 * MIB)
    with leased(planned, chosen, run) as (_, found):
        assert found.max_context == 2048
    assert others.waits == 1


def test_where_nobody_can_be_waited_for_the_context_is_shorter(
    plan: Plan, others: Others, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, chosen = plan("hardware.gpus=[0]", "run.in_flight=4")
    cards(monkeypatch, replace(CARDS[0], free=chosen.gpus[0].total - 8 * MIB))
    with leased(planned, chosen, run) as (_, found):
        assert 0 < found.max_context < chosen.max_context
    assert others.waits == 0


def test_it_waits_rather_than_offloads(plan: Plan, others: Others, run: RunFolder) -> None:
    planned, chosen = plan("hardware.gpus=[0]", "offload.cpu_gib=8", "run.in_flight=1")
    weights = chosen.gpus[0].weights
    others.take(CARDS[0], CARDS[0].free - chosen.gpus[0].total + weights // 2)
    with leased(planned, chosen, run) as (_, found):
        assert not found.offloads
    assert others.waits == 1


def test_what_does_not_fit_any_more(plan: Plan, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, chosen = plan()
    cards(monkeypatch, *(replace(card, free=GIB // 8) for card in CARDS))
    with pytest.raises(DoesNotFitError, match=r"does not fit any more: .* needs .* has 0.12 GiB free"):
        leased(planned, chosen, run).__enter__()
    cards(monkeypatch)
    with pytest.raises(EngineUnavailableError, match="gone: no GPU"):
        leased(planned, chosen, run).__enter__()


def test_what_would_not_fit_alone_is_refused(plan: Plan, others: Others, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(CARDS[0], free=GIB // 4)
    cards(monkeypatch, small)
    others.take(small, GIB // 8)
    assert not plan()[1].fits


def test_without_a_gpu_there_is_no_lease(
    plan: Plan, run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cards(monkeypatch)
    planned, chosen = plan()
    with leased(planned, chosen, run) as (same, found):
        assert same is planned
        assert found is chosen
    assert not (tmp_path / "leases").exists()


def test_a_conversion_takes_the_first_gpu_with_room(others: Others, run: RunFolder) -> None:
    with leased_gpu(HardwareConfig(), 8 * GIB, run) as first, leased_gpu(HardwareConfig(), 8 * GIB, run) as second:
        assert (first, second) == ("cuda:0", "cuda:1")
        [held, _] = leases()[0]
        assert (held.what, held.gpus["GPU-0"].asked) == (f"the conversion of {run.path}", 8 * GIB)
        with leased_gpu(HardwareConfig(gpus=[1]), 8 * GIB, run) as third:
            assert third == "cuda:1"
    assert others.waits == 0


@pytest.mark.usefixtures("others")
def test_conversions_spread_and_then_share(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(
        monkeypatch,
        *(replace(card, total=gib * GIB, free=gib * GIB) for card, gib in zip(CARDS, (80, 40), strict=True)),
    )
    with ExitStack() as stack:
        places = [stack.enter_context(leased_gpu(HardwareConfig(), 8 * GIB, run)) for _ in range(4)]
    assert places == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]


def test_a_conversion_waits_for_room(others: Others, run: RunFolder) -> None:
    others.take(CARDS[1], 16 * GIB)
    others.take(CARDS[0], 20 * GIB)
    with leased_gpu(HardwareConfig(), 16 * GIB, run) as device:
        assert device == "cuda:1"
    assert others.waits == 1


def test_a_conversion_is_tried_on_a_card_that_is_too_small(others: Others, run: RunFolder) -> None:
    with leased_gpu(HardwareConfig(), 40 * GIB, run) as device:
        assert (device, leases()[0][0].gpus["GPU-0"].asked) == ("cuda:0", 23 * GIB)
    others.take(CARDS[0], 1 * GIB)
    others.take(CARDS[1], 1 * GIB)
    with leased_gpu(HardwareConfig(), 40 * GIB, run) as device:
        assert device == "cuda:0"  # alone there
    assert others.waits == 1


@pytest.mark.usefixtures("others")
def test_a_conversion_goes_where_its_cap_leaves_room(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    uneven = HardwareConfig(memory_gib=[2, 20])
    with leased_gpu(uneven, 8 * GIB, run) as device:
        assert device == "cuda:1"
    caps = [2 * GIB - DRIVER_KEEPS, 20 * GIB - DRIVER_KEEPS]
    assert [cap_of(uneven, f"cuda:{i}") for i in range(2)] == [[cap] for cap in caps]
    assert most_free(uneven, planning=False)[0] == caps[1]
    with leased_gpu(uneven, 22 * GIB, run):  # tried all the same, and never given more than its cap
        assert {share.asked for share in leases()[0][0].gpus.values()} == {caps[1]}

    assert cap_of(HardwareConfig(), "cuda:0") == []
    assert cap_of(HardwareConfig(reserve_gib=4), "cuda:1") == [19 * GIB]
    named = HardwareConfig(gpus=[1], memory_gib=[20])
    assert cap_of(named, "cuda:1") == [caps[1]]
    profile = HardwareConfig("1x16gb", cards=1, memory_gib=16)  # of another machine: it caps every GPU of this one
    assert cap_of(profile, "cuda:0") == cap_of(profile, "cuda:1") == [16 * GIB - DRIVER_KEEPS]


def test_other_runs_do_not_count_against_a_conversion_that_can_wait_for_them(
    others: Others, monkeypatch: pytest.MonkeyPatch
) -> None:
    others.take(CARDS[0], 20 * GIB)
    others.take(CARDS[1], 20 * GIB)
    assert most_free(HardwareConfig(), planning=False)[0] == 23 * GIB
    assert {gpu.free for gpu in usable(HardwareConfig(reserve_gib=2), idle=False)} == {1 * GIB}
    profile = HardwareConfig("4x48gb", cards=4, memory_gib=48)
    assert most_free(profile, planning=True) == (48 * GIB - DRIVER_KEEPS, None)  # nothing is known of its host
    cards(monkeypatch)
    assert most_free(HardwareConfig(), planning=False)[0] is None


@pytest.mark.parametrize(
    ("shape", "smaller", "card"),
    [
        (Llama(), 1, 2),
        (Llama(hidden=4096, layers=2, heads=32, kv_heads=32, intermediate=11008, vocab=32000), 4, 8),
        (Llama(hidden=8192, layers=2, heads=64, kv_heads=8, intermediate=28672, vocab=32000), 16, 24),
        (Llama(hidden=8192, layers=2, heads=64, kv_heads=8, intermediate=28672, vocab=128256), 16, 24),
    ],
)
def test_what_a_conversion_takes_goes_by_the_width(tmp_path: Path, shape: Llama, smaller: int, card: int) -> None:
    source = open_checkpoint(write_headers(tmp_path / "model", shape))
    assert smaller * GIB < needed(source) < card * GIB - DRIVER_KEEPS
    assert needed(source, 8192) > needed(source) > needed(source, 512)
