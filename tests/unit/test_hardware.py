"""The machine: what is there, what a profile says, what is capped and left free."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from composing import CONF, composed, hydra_ready

from orchestrator import hardware
from orchestrator.errors import ConfigError, EngineUnavailableError
from orchestrator.hardware import BF16, DRIVER_KEEPS, GIB, MIB, Gpu, Hardware, Holder, detect
from orchestrator.report.tables import held_lines


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with hydra_ready():
        yield


def machine(monkeypatch: pytest.MonkeyPatch, *gib: float) -> None:
    """A machine with GPUs of these sizes, all of it free."""
    gpus = tuple(Gpu(i, "card", int(g * GIB), int(g * GIB), (8, 0)) for i, g in enumerate(gib))
    monkeypatch.setattr(hardware, "nvml_gpus", lambda: (gpus, () if gpus else ("no GPU",)))
    monkeypatch.setattr(hardware, "host_memory", lambda: (64 * GIB, 32 * GIB))


def found(*argv: str, planning: bool = False) -> Hardware:
    return detect(composed(*argv).hardware, planning=planning)


def free(hw: Hardware) -> list[float]:
    return [gpu.free / GIB for gpu in hw.gpus]


def test_auto_is_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 80, 40)
    hw = found()
    assert (free(hw), hw.device) == ([80, 40], "cuda")
    assert (hw.host_total, hw.host_available) == (64 * GIB, 32 * GIB)


def test_a_machine_without_gpus_is_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    assert (found().device, found().notes) == ("cpu", ("no GPU",))


def test_cpu_ignores_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 80)
    assert found("hardware=cpu").gpus == ()


def test_a_profile_stands_for_the_machine_in_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    hw = found("hardware=4x24gb", planning=True)
    assert free(hw) == [24 - DRIVER_KEEPS / GIB] * 4
    assert "4x24gb" in hw.notes[0]


def test_a_profile_caps_the_machine_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 80, 80, 10)
    assert free(found("hardware=2x24gb")) == [24 - DRIVER_KEEPS / GIB] * 2


@pytest.mark.parametrize("gib", [(), (80, 80, 80)])
def test_a_run_with_more_cards_than_there_are_is_refused(
    monkeypatch: pytest.MonkeyPatch, gib: tuple[float, ...]
) -> None:
    machine(monkeypatch, *gib)
    with pytest.raises(EngineUnavailableError, match=f"runs on 4 GPUs, and this machine has {len(gib)}") as caught:
        found("hardware=4x24gb")
    assert "task=plan" in caught.value.hint
    assert caught.value.exit_code == 4


def test_memory_caps_each_gpu_and_gives_none_more_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 80, 10)
    assert free(found("hardware.memory_gib=24")) == [24 - DRIVER_KEEPS / GIB, 10]


def test_the_reserve_is_left_free_on_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 80, 10)
    hw = found("hardware.reserve_gib=2")
    assert free(hw) == [78, 8]
    assert hw.host_available == 32 * GIB


def test_the_reserve_is_left_free_under_a_cap_too(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 80)
    assert free(found("hardware.memory_gib=24", "hardware.reserve_gib=2")) == [22 - DRIVER_KEEPS / GIB]


def test_without_gpus_the_reserve_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    assert found("hardware.reserve_gib=2").host_available == 30 * GIB
    assert found("hardware.reserve_gib=40").host_available == 0


def test_without_gpus_the_cap_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    assert found("hardware.memory_gib=4").host_available == 4 * GIB
    assert found("hardware.memory_gib=100").host_available == 32 * GIB


def test_chosen_gpus_keep_their_indexes(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 80, 40, 24)
    assert [gpu.index for gpu in found("hardware.gpus=[2,0]").gpus] == [2, 0]


@pytest.mark.parametrize("index", [3, -1])
def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    machine(monkeypatch, 80, 40, 24)
    with pytest.raises(ConfigError, match=rf"no GPU {index}; this machine has 0, 1, 2"):
        found(f"hardware.gpus=[0,{index}]")


def test_chosen_gpus_of_a_profile_may_be_any_of_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 80, 80, 80)
    hw = found("hardware=2x24gb", "hardware.gpus=[1,2]")
    assert [gpu.index for gpu in hw.gpus] == [1, 2]
    assert free(hw) == [24 - DRIVER_KEEPS / GIB] * 2


def test_more_gpus_than_the_profile_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 80, 80, 80)
    with pytest.raises(ConfigError, match="names 3 GPUs, and 2x24gb has 2"):
        found("hardware=2x24gb", "hardware.gpus=[0,1,2]")


def test_in_a_plan_the_profiles_cards_are_chosen_from(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    assert [gpu.index for gpu in found("hardware=4x24gb", "hardware.gpus=[3,1]", planning=True).gpus] == [3, 1]
    with pytest.raises(ConfigError, match="no GPU 4; the profile 4x24gb has 0, 1, 2, 3"):
        found("hardware=4x24gb", "hardware.gpus=[4]", planning=True)


def test_where_there_is_no_gpu_to_choose_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    with pytest.raises(ConfigError, match=r"no GPU 0; this machine has none \(no GPU\)"):
        found("hardware.gpus=[0]")


def test_each_gpu_may_have_a_size_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 80, 80, 80)
    keeps = DRIVER_KEEPS / GIB
    assert free(found("hardware.memory_gib=[24,16,8]")) == [24 - keeps, 16 - keeps, 8 - keeps]
    assert free(found("hardware.memory_gib=[24,16]", "hardware.gpus=[2,0]")) == [24 - keeps, 16 - keeps]
    planned = found("hardware=2x24gb", "hardware.memory_gib=[24,16]", planning=True)
    assert [gpu.total / GIB for gpu in planned.gpus] == [24, 16]


@pytest.mark.parametrize(
    ("argv", "planning", "said"),
    [
        (["hardware.memory_gib=[24]"], False, "gives 1 size, and 3 GPUs are used"),
        (["hardware.memory_gib=[24,16]", "hardware.gpus=[0]"], False, "gives 2 sizes, and 1 GPU is used"),
        (["hardware=4x24gb", "hardware.memory_gib=[24,16]"], True, "gives 2 sizes, and 4 GPUs are used"),
        (["hardware=cpu", "hardware.memory_gib=[24,16]"], False, "gives 2 sizes, and there is no GPU"),
        (["hardware.reserve_gib=10"], False, "leaves nothing: GPU 1 has 10.00 GiB"),
        (["hardware=cpu", "hardware.reserve_gib=64"], False, "leaves nothing: this machine has 64.00 GiB"),
        (["hardware.margin_gib=10"], False, r"margin_gib=10 leaves nothing: GPU 1 has 10.00 GiB in all\. Set less, or"),
        (["hardware=cpu", "hardware.margin_gib=64"], False, "margin_gib=64 leaves nothing: this machine has 64.00 GiB"),
        (
            ["hardware.reserve_gib=8", "hardware.margin_gib=2"],
            False,
            "hardware.reserve_gib=8 and hardware.margin_gib=2 leave nothing: GPU 1 has 10.00 GiB",
        ),
        (
            ["hardware=1x24gb", "hardware.margin_gib=23.7"],
            True,
            "the 24 GiB card without what its driver keeps has 23.5",
        ),
    ],
)
def test_caps_that_contradict_the_machine_are_refused_with_numbers(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], planning: bool, said: str
) -> None:
    machine(monkeypatch, 80, 10, 80)
    with pytest.raises(ConfigError, match=said):
        found(*argv, planning=planning)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["hardware.memory_gib=0"], "hardware.memory_gib=0 is not 0.1 to 4096 GiB"),
        (["hardware.memory_gib=5000"], "hardware.memory_gib=5000 is not 0.1 to 4096 GiB"),
        (["hardware.memory_gib=nan"], "hardware.memory_gib=nan is not 0.1 to 4096 GiB"),
        (["hardware.memory_gib=true"], "hardware.memory_gib=True is not 0.1 to 4096 GiB"),
        (["hardware.memory_gib=lots"], "hardware.memory_gib=lots is not 0.1 to 4096 GiB"),
        (["hardware.memory_gib=[]"], "hardware.memory_gib=[] is not 0.1 to 4096 GiB"),
        (["hardware.memory_gib=[24,-1]"], "hardware.memory_gib=[24, -1] is not 0.1 to 4096 GiB"),
        (["hardware.memory_gib={a: 1}"], "one number, or one for each GPU"),
        (["hardware.reserve_gib=-1"], "hardware.reserve_gib=-1"),
        (["hardware.memory_gib=4", "hardware.reserve_gib=5"], "reserve_gib=5 leaves nothing of hardware.memory_gib=4"),
        (["hardware=1x24gb", "hardware.reserve_gib=24"], "reserve_gib=24 leaves nothing of hardware.memory_gib=24"),
        (
            ["hardware=1x24gb", "hardware.margin_gib=100"],
            "margin_gib=100 leaves nothing of hardware.memory_gib=24: set less, or leave it out",
        ),
        (
            ["hardware=1x24gb", "hardware.margin_gib=12", "hardware.reserve_gib=12"],
            "hardware.margin_gib=12 leave nothing",
        ),
        (["hardware.memory_gib=[24,4]", "hardware.reserve_gib=5"], "leaves nothing of hardware.memory_gib=4"),
        (["hardware=4x24gb", "hardware.cards=0"], "hardware.cards=0 is out of range"),
        (["hardware=4x24gb", "hardware.cards=-4"], "hardware.cards=-4 is out of range"),
        (["hardware=4x24gb", "hardware.cards=1000000"], "hardware.cards=1000000 is out of range"),
        (["hardware.cards=2"], "hardware.cards belongs to a named profile"),
        (["hardware.gpus=[]"], "hardware.gpus=[] names no GPU"),
        (["hardware.gpus=[0,0]"], "names a GPU twice"),
        (["hardware=cpu", "hardware.gpus=[0]"], "hardware.gpus is set, and hardware=cpu"),
        (["hardware=cpu", "hardware.capability=8.6"], "hardware.capability is set, and hardware=cpu"),
        (["hardware.capability=86"], "hardware.capability=86"),
        (["hardware.capability=nan"], "hardware.capability=nan is out of range"),
        (["hardware.memory_gib=24gb"], "hardware.memory_gib=24gb is not 0.1 to 4096 GiB, without a unit"),
        (["hardware.capability=8.65"], "one digit after the point"),
    ],
)
def test_absurd_values_are_refused(argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        composed(*argv)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cap_above_the_cards_own_size_is_said_once_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 80, 10, 10)
    assert found("hardware.memory_gib=24").notes == ("hardware.memory_gib=24: GPU 1, 2 have 10.00 GiB, which counts",)
    assert found("hardware.memory_gib=10.5").notes == ()  # as cards with ECC have it
    machine(monkeypatch)
    assert found("hardware.memory_gib=100").notes[1:] == (
        "hardware.memory_gib=100: this machine has 64.00 GiB, which counts",
    )


def test_a_capability_caps_the_machines_and_is_a_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 80)
    assert found("hardware.capability=7.5").gpus[0].capability == (7, 5)
    newer = found("hardware.capability=12.0")
    assert newer.gpus[0].capability == (8, 0)
    assert newer.notes == ("hardware.capability=12: GPU 0 has 8.0, which counts",)
    assert found("hardware=1x24gb", "hardware.capability=12.0", planning=True).gpus[0].capability == (12, 0)
    machine(monkeypatch)
    assert "there is none" in found("hardware.capability=7.5").notes[-1]


PROFILES = sorted(path.stem for path in (CONF / "hardware").glob("*x*.yaml"))


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_is_what_its_name_says(monkeypatch: pytest.MonkeyPatch, profile: str) -> None:
    machine(monkeypatch)
    hw = found(f"hardware={profile}", planning=True)
    count, gb = map(int, profile.removesuffix("gb").split("x"))
    assert (hw.profile, len(hw.gpus)) == (profile, count)
    assert gb * 0.9 < hw.gpus[0].total / GIB <= gb
    assert hw.gpus[0].free == hw.gpus[0].total - DRIVER_KEEPS


def test_a_profile_of_old_cards_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    capabilities = {p: found(f"hardware={p}", planning=True).gpus[0].capability for p in PROFILES}
    assert {p for p, capability in capabilities.items() if capability < BF16} == {"1x16gb", "2x16gb", "4x16gb"}
    assert (capabilities["1x24gb"], capabilities["1x32gb"], capabilities["8x80gb"]) == ((8, 6), (12, 0), (8, 0))


def test_a_plan_for_a_profile_does_not_ask_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(hardware, "nvml_gpus", asked)
    assert len(found("hardware=4x24gb", planning=True).gpus) == 4
    assert found("hardware=cpu").gpus == ()


def test_the_hardware_is_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = Gpu(0, "card", 24 * GIB, 20 * GIB, (7, 5), "GPU-a", 3 * GIB, (Holder(4242, "python", 3 * GIB),))
    monkeypatch.setattr(hardware, "nvml_gpus", lambda: ((gpu,), ("a note",)))
    monkeypatch.setattr(hardware, "host_memory", lambda: (64 * GIB, 32 * GIB))
    monkeypatch.setattr(hardware, "cpu_count", lambda: 8)
    hw = detect(composed("hardware.reserve_gib=1").hardware, planning=False, artifacts=tmp_path / "not" / "there")
    data = json.loads(json.dumps(hw.to_json()))
    disk = data.pop("disk")
    assert disk["path"] == str(tmp_path / "not" / "there")
    assert 0 < disk["free"] <= disk["total"]
    held_by = [{"pid": 4242, "name": "python", "bytes": 3 * GIB, "ours": False}]
    assert data == {
        "profile": "auto",
        "gpus": [
            {
                "index": 0,
                "name": "card",
                "uuid": "GPU-a",
                "total": 24 * GIB,
                "free": 19 * GIB,
                "capability": "7.5",
                "held": 3 * GIB,
                "held_by": held_by,
            }
        ],
        "host": {"total": 64 * GIB, "available": 32 * GIB, "cpus": 8},
        "notes": ["a note"],
    }


@pytest.mark.parametrize(
    ("held", "holders", "said"),
    [
        (0, (), []),
        (100 * MIB, (), []),  # bookkeeping
        (3 * GIB, (Holder(4242, "python", 3 * GIB),), ["GPU 0: 3.00 GiB held by python (pid 4242)"]),
        (3 * GIB, (Holder(7, "python", 3 * GIB, ours=True),), ["GPU 0: 3.00 GiB held by python (pid 7, ours)"]),
        (3 * GIB, (Holder(7, None, 3 * GIB),), ["GPU 0: 3.00 GiB held by pid 7"]),
        (3 * GIB, (Holder(7, "Xorg", None),), ["GPU 0: held by Xorg (pid 7)"]),
        (3 * GIB, (), ["GPU 0: 3.00 GiB held by processes that cannot be seen from here"]),
        (
            3 * GIB,
            (Holder(7, "a", GIB), Holder(8, "b", GIB)),
            [
                "GPU 0: 1.00 GiB held by a (pid 7), 1.00 GiB held by b (pid 8), "
                "1.00 GiB held by processes that cannot be seen from here"
            ],
        ),
    ],
)
def test_who_holds_a_gpu_is_said(held: int, holders: tuple[Holder, ...], said: list[str]) -> None:
    gpu = Gpu(0, "card", 24 * GIB, 20 * GIB, (8, 0), "", held, holders)
    assert held_lines(Hardware("auto", (gpu,), GIB, GIB, 1)) == said
