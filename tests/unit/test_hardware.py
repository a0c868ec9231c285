"""The machine: what is there, what a profile says, what is capped and left free."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from composing import composed, hydra_ready

from orchestrator import hardware
from orchestrator.errors import ConfigError, EngineUnavailableError
from orchestrator.hardware import DRIVER_KEEPS, GIB, Gpu, Hardware, detect, host_memory, nvml_gpus


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
    assert found("hardware.reserve_gib=100").host_available == 0


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


class FakeNvml:
    """pynvml of a machine with three cards."""

    class NVMLError(Exception):
        """The driver's error."""

    class Memory:
        total, free = 24 * GIB, 23 * GIB

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{'abc'[handle] * 8}-1111"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Memory:
        return self.Memory()

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> list[int]:
        return [8, handle]

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"card {handle}"


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["card 0", "card 1", "card 2"]),
        ("", []),
        ("2,0", ["card 2", "card 0"]),
        ("GPU-bbbbbbbb-1111", ["card 1"]),
        ("GPU-c", ["card 2"]),
        ("-1", []),
        # CUDA ignores what follows a name that is not there
        ("0,7,1", ["card 0"]),
    ],
)
def test_visible_devices_are_the_gpus_and_number_them(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())  # type: ignore[arg-type]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus, _ = nvml_gpus()
    assert [gpu.name for gpu in gpus] == names
    assert [gpu.index for gpu in gpus] == list(range(len(names)))


def test_a_machine_without_a_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise FakeNvml.NVMLError("Driver Not Loaded")

    nvml = FakeNvml()
    monkeypatch.setattr(nvml, "nvmlInit", fails)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    gpus, notes = nvml_gpus()
    assert gpus == ()
    assert "Driver Not Loaded" in notes[0]


def test_without_the_package_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpus, notes = nvml_gpus()
    assert gpus == ()
    assert "nvidia-ml-py" in notes[0]


@pytest.mark.parametrize(
    ("cgroup", "expected"),
    [((None, 0), (64, 40)), ((16 * GIB, 4 * GIB), (16, 12)), ((100 * GIB, 0), (64, 40)), ((GIB, 2 * GIB), (1, 0))],
)
def test_host_memory_is_under_the_cgroups_limit(
    monkeypatch: pytest.MonkeyPatch, cgroup: tuple[Any, int], expected: tuple[int, int]
) -> None:
    class Memory:
        total, available = 64 * GIB, 40 * GIB

    monkeypatch.setattr(hardware.psutil, "virtual_memory", Memory)
    monkeypatch.setattr(hardware, "_cgroup", lambda: cgroup)
    assert tuple(size // GIB for size in host_memory()) == expected
