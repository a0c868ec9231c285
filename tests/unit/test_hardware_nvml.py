"""The machine's GPUs: a fake driver behind pynvml's own functions, names and errors."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from orchestrator.backends.exl2_setup import visible_devices
from orchestrator.hardware import child_devices
from orchestrator.hardware import nvml as ours
from orchestrator.hardware.nvml import nvml_gpus
from orchestrator.hardware.types import DRIVER_KEEPS, GIB, MIB, Gpu, Holder
from orchestrator.hardware.visible import Card, Place, pinned, visible


@dataclass
class Device:
    """A GPU or a MIG instance. `instances`: None where MIG is off; a slot without an instance is None."""

    name: str
    uuid: str
    total: int = 24 * GIB
    held: int = 0
    capability: tuple[int, int] = (8, 6)
    bus: int = 0
    instances: list[Device | None] | None = None
    numbers: tuple[int, int] | None = None  # of a MIG instance: GPU instance, compute instance
    compute: list[tuple[int, int | None]] = field(default_factory=list)
    graphics: list[tuple[int, int | None]] = field(default_factory=list)
    fails: dict[str, int] = field(default_factory=dict)  # function -> NVML's error


class FakeNvml:
    """pynvml of a machine with these devices; its constants and errors are pynvml's own."""

    def __init__(self, *devices: Device, fails: dict[str, int] | None = None) -> None:
        self._devices, self._fails = devices, fails or {}
        self.open = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("NVML", "nvmlMemory_v2")):
            return getattr(pynvml, name)
        raise AttributeError(name)

    def _check(self, function: str, device: Device | None = None) -> None:
        fails = self._fails if device is None else device.fails
        if function in fails:
            raise pynvml.NVMLError(fails[function])

    def nvmlInit(self) -> None:
        self._check("nvmlInit")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        self._check("nvmlDeviceGetCount")
        return len(self._devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Device:
        self._check("nvmlDeviceGetHandleByIndex", self._devices[index])
        return self._devices[index]

    def nvmlDeviceGetPciInfo(self, device: Device) -> Any:
        return SimpleNamespace(domain=0, bus=device.bus, device=0)

    def nvmlDeviceGetUUID(self, device: Device) -> str:
        return device.uuid

    def nvmlDeviceGetName(self, device: Device) -> str:
        return device.name

    def nvmlDeviceGetCudaComputeCapability(self, device: Device) -> list[int]:
        self._check("nvmlDeviceGetCudaComputeCapability", device)
        return list(device.capability)

    def nvmlDeviceGetMigMode(self, device: Device) -> list[int]:
        if device.name == "T4":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(device.instances is not None)] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Device) -> int:
        return len(device.instances or ())

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Device, index: int) -> Device:
        instance = (device.instances or [])[index]
        if instance is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return instance

    def nvmlDeviceGetGpuInstanceId(self, device: Device) -> int:
        if device.numbers is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return device.numbers[0]

    def nvmlDeviceGetComputeInstanceId(self, device: Device) -> int:
        assert device.numbers is not None
        return device.numbers[1]

    def nvmlDeviceGetMemoryInfo(self, device: Device, version: int | None = None) -> Any:
        self._check("nvmlDeviceGetMemoryInfo", device)
        free = device.total - DRIVER_KEEPS - device.held
        if version is None:
            return SimpleNamespace(total=device.total, free=free, used=device.total - free)
        self._check("nvmlDeviceGetMemoryInfo_v2", device)
        return SimpleNamespace(total=device.total, free=free, used=device.held, reserved=DRIVER_KEEPS)

    def nvmlDeviceGetComputeRunningProcesses(self, device: Device) -> list[Any]:
        self._check("nvmlDeviceGetComputeRunningProcesses", device)
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in device.compute]

    def nvmlDeviceGetGraphicsRunningProcesses(self, device: Device) -> list[Any]:
        self._check("nvmlDeviceGetGraphicsRunningProcesses", device)
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in device.graphics]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setattr(ours, "DRIVER", tmp_path / "no driver")


def driver(monkeypatch: pytest.MonkeyPatch, *devices: Device, fails: dict[str, int] | None = None) -> FakeNvml:
    nvml = FakeNvml(*devices, fails=fails)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    return nvml


def cards(count: int = 3) -> list[Device]:
    return [Device(f"card {i}", f"GPU-{'abcd'[i] * 8}-1111", bus=i) for i in range(count)]


def a100(*instances: Device | None, bus: int = 0) -> Device:
    return Device("A100", f"GPU-a100{bus}", 40 * GIB, 0, (8, 0), bus, list(instances))


def instance(letter: str, gib: int = 5) -> Device:
    # what an instance itself does not tell is its card's
    fails = {"nvmlDeviceGetCudaComputeCapability": pynvml.NVML_ERROR_NOT_SUPPORTED}
    return Device(f"A100 MIG 1g.{gib}gb", f"MIG-{letter * 8}", gib * GIB, fails=fails)


WHOLE = (Card("GPU-aaaa-1"), Card("GPU-bbbb-1"), Card("GPU-bbcc-1"))
SPLIT = (Card("GPU-aaaa-1"), Card("GPU-bbbb-1", ("MIG-x1", "MIG-y1")), Card("GPU-cccc-1", ()))


@pytest.mark.parametrize(
    ("value", "places", "said"),
    [
        (None, [0, 1, 2], ""),
        ("", [], "hides every GPU"),
        (" ", [], "hides every GPU"),
        ("0", [0], ""),
        ("2,0", [2, 0], ""),
        (" 1 , 0 ", [1, 0], ""),
        ("+1", [1], ""),
        ("1st,0th", [1, 0], ""),  # a number as far as it goes
        ("-1", [], "there is no -1"),
        ("0,-1,1", [0], "there is no -1"),
        ("0,7,1", [0], "there is no 7"),
        ("0,,1", [0], "there is no empty name"),
        ("0,", [0], "there is no empty name"),
        ("NoDevFiles", [], "there is no NoDevFiles"),
        ("0,0", [], "names a GPU twice"),
        ("1,0,1,2", [], "names a GPU twice"),
        ("0,7,0", [], "names a GPU twice"),  # also after what is not there, as PyTorch counts too
        ("0,-1,0", [0], "there is no -1"),
        pytest.param("9" * 5000, [], "there is no 999", id="a number of 5000 digits"),
        ("GPU-aaaa-1", [0], ""),
        ("GPU-a", [0], ""),
        ("GPU-bbc,GPU-bbb", [2, 1], ""),
        ("GPU-bb", [], "there is no GPU-bb"),  # the beginning of two
        ("GPU-a,GPU-zz,GPU-bbc", [0], "there is no GPU-zz"),
        ("GPU-a,1", [0], "there is no 1"),  # what the first is, all are
        ("1,GPU-a", [1], "there is no GPU-a"),
        ("GPU-a,GPU-aaaa", [], "names a GPU twice"),
        ("gpu-a", [], "there is no gpu-a"),
        ("MIG-x1", [], "there is no MIG-x1"),
    ],
)
def test_visible_devices_as_cuda_reads_them(value: str | None, places: list[int], said: str) -> None:
    found, notes = visible(WHOLE, value)
    assert found == [Place(i) for i in places]
    assert said in " ".join(notes)
    assert bool(notes) == bool(said)


@pytest.mark.parametrize(
    ("value", "places"),
    [
        (None, [Place(1, 0)]),  # an instance, and then no whole GPU beside it
        ("0", [Place(0)]),
        ("1", [Place(1, 0)]),
        ("0,1", [Place(1, 0)]),
        ("2", []),  # split, and no instance made
        ("GPU-b", [Place(1, 0)]),
        ("MIG-y1", [Place(1, 1)]),
        ("MIG-y1,MIG-x1", [Place(1, 1)]),
        ("MIG-", []),
        ("MIG-x1,MIG-x1", []),
    ],
)
def test_a_process_gets_one_mig_instance(value: str | None, places: list[Place]) -> None:
    assert visible(SPLIT, value)[0] == places


OLD = (
    Card("GPU-aaaa-1", ("MIG-x1", "MIG-y1"), ("MIG-GPU-aaaa-1/1/0", "MIG-GPU-aaaa-1/10/0")),
    Card("GPU-bbbb-1", ("MIG-GPU-bbbb-1/1/1", "MIG-GPU-bbbb-1/1/10")),  # of an old driver: no other names
)


@pytest.mark.parametrize(
    ("value", "places", "pin"),
    [
        ("MIG-GPU-aaaa-1/1/0", [Place(0, 0)], "MIG-x1"),
        ("MIG-GPU-aaaa-1/10/0", [Place(0, 1)], "MIG-y1"),
        ("MIG-GPU-bbbb-1/1/1", [Place(1, 0)], ""),
        ("MIG-GPU-bbbb-1/1/10", [Place(1, 1)], ""),
        ("MIG-GPU-aaaa-1/1", [], ""),
        ("MIG-GPU-aaaa-1/2/0", [], ""),
        ("MIG-y", [Place(0, 1)], ""),
        ("MIG-y1,MIG-x1", [Place(0, 1)], "MIG-y1"),
        ("1", [Place(1, 0)], ""),
        ("0,1", [Place(0, 0)], "MIG-x1"),
        (None, [Place(0, 0)], ""),
    ],
)
def test_an_instance_is_the_same_one_in_a_child(value: str | None, places: list[Place], pin: str) -> None:
    found, _ = visible(OLD, value)
    assert found == places
    assert [pinned(OLD, place, value) for place in found] == [pin] * len(found)


def test_a_child_of_a_machine_with_whole_gpus_and_instances_gets_the_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    split = a100(instance("x"), replace(instance("y"), numbers=(2, 0)), bus=1)
    driver(monkeypatch, cards(1)[0], split)
    (gpu,), _ = nvml_gpus()
    assert (gpu.index, gpu.uuid) == (0, "MIG-xxxxxxxx")
    environ = child_devices([gpu])
    assert visible_devices(["cuda:0"], environ) == "MIG-xxxxxxxx"  # "0" would be the whole one
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-a1001/2/0")
    (gpu,), notes = nvml_gpus()
    assert (gpu.uuid, child_devices([gpu]), notes) == ("MIG-yyyyyyyy", {"CUDA_VISIBLE_DEVICES": "MIG-yyyyyyyy"}, ())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-yyyyyyyy")
    assert child_devices(nvml_gpus()[0]) == {}  # the child inherits it
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert child_devices(nvml_gpus()[0]) == {}


def test_a_split_gpu_without_instances_is_said() -> None:
    assert visible([Card("GPU-a", ()), Card("GPU-b")], None) == (
        [Place(1)],
        ("GPU 0 is left out: MIG is on, and it has no instance",),
    )


def test_what_nvml_says_of_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = driver(monkeypatch, *cards(2))
    gpus, notes = nvml_gpus()
    assert notes == ()
    assert gpus[1] == Gpu(1, "card 1", 24 * GIB, 24 * GIB - DRIVER_KEEPS, (8, 6), "GPU-bbbbbbbb-1111")
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("value", "names"), [("2,0", ["card 2", "card 0"]), ("GPU-c", ["card 2"]), ("0,7,1", ["card 0"])]
)
def test_visible_devices_are_the_gpus_and_number_them(
    monkeypatch: pytest.MonkeyPatch, value: str, names: list[str]
) -> None:
    driver(monkeypatch, *cards())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    gpus, _ = nvml_gpus()
    assert [gpu.name for gpu in gpus] == names
    assert [gpu.index for gpu in gpus] == list(range(len(names)))


def test_where_every_gpu_is_hidden_the_cpu_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, *cards())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert nvml_gpus() == ((), ("CUDA_VISIBLE_DEVICES is empty and hides every GPU: planned for the CPU",))


def test_gpus_are_numbered_in_the_order_of_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, Device("late", "GPU-l", bus=9), Device("early", "GPU-e", bus=1))
    assert [gpu.name for gpu in nvml_gpus()[0]] == ["early", "late"]


@pytest.mark.parametrize(
    ("order", "devices", "said"),
    [
        ("PCI_BUS_ID", cards(), False),
        ("FASTEST_FIRST", cards(), True),
        ("FASTEST_FIRST", [Device("same", "GPU-a"), Device("same", "GPU-b", bus=1)], False),
    ],
)
def test_another_order_of_unequal_gpus_is_said(
    monkeypatch: pytest.MonkeyPatch, order: str, devices: list[Device], said: bool
) -> None:
    driver(monkeypatch, *devices)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    assert any("PCI_BUS_ID" in note for note in nvml_gpus()[1]) == said


def test_with_mig_the_first_instance_is_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, a100(None, instance("x"), instance("y", 10)))
    gpus, notes = nvml_gpus()
    free = 5 * GIB - DRIVER_KEEPS
    assert gpus == (Gpu(0, "A100 MIG 1g.5gb", 5 * GIB, free, (8, 0), "MIG-xxxxxxxx"),)
    assert notes == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-y")
    assert [gpu.total for gpu in nvml_gpus()[0]] == [10 * GIB]


def test_of_several_mig_gpus_one_instance_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, a100(instance("x")), a100(instance("y"), bus=1))
    gpus, notes = nvml_gpus()
    assert [gpu.uuid for gpu in gpus] == ["MIG-xxxxxxxx"]
    assert "one MIG instance" in notes[0]


def test_mig_that_is_on_without_an_instance_is_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, a100())
    assert nvml_gpus() == ((), ("GPU 0 is left out: MIG is on, and it has no instance: planned for the CPU",))


def test_a_card_that_does_not_know_mig_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, Device("T4", "GPU-t", 15 * GIB, capability=(7, 5)))
    assert [(gpu.name, gpu.capability) for gpu in nvml_gpus()[0]] == [("T4", (7, 5))]


def test_who_holds_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = 2**22 + 1  # above the kernel's largest pid
    pids = [(os.getpid(), 2 * GIB), (gone, 3 * GIB)]
    driver(monkeypatch, Device("card", "GPU-a", held=6 * GIB, compute=pids, graphics=[(1, None), (gone, 3 * GIB)]))
    (gpu,), _ = nvml_gpus()
    assert gpu.held == 6 * GIB
    assert gpu.held_by == (
        Holder(gone, None, 3 * GIB),
        Holder(os.getpid(), psutil.Process().name(), 2 * GIB, ours=True),
        Holder(1, psutil.Process(1).name(), None),
    )


def test_without_permission_to_ask_the_holders_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    fails = dict.fromkeys(
        ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"),
        pynvml.NVML_ERROR_NO_PERMISSION,
    )
    driver(monkeypatch, Device("card", "GPU-a", held=GIB, fails=fails))
    (gpu,), notes = nvml_gpus()
    assert (gpu.held, gpu.held_by, notes) == (GIB, (), ())


def test_an_old_driver_does_not_tell_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    fails = {"nvmlDeviceGetMemoryInfo_v2": pynvml.NVML_ERROR_FUNCTION_NOT_FOUND}
    driver(monkeypatch, Device("card", "GPU-a", held=100 * MIB, fails=fails))
    (gpu,), _ = nvml_gpus()
    assert (gpu.held, gpu.free) == (100 * MIB, 24 * GIB - DRIVER_KEEPS - 100 * MIB)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA GPU here"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "the NVIDIA driver is not loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "restart the machine"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "may not use the NVIDIA driver"),
        (pynvml.NVML_ERROR_GPU_IS_LOST, "fallen off the bus"),
        (pynvml.NVML_ERROR_UNKNOWN, "NVML does not answer"),
    ],
)
@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetCount"])
def test_a_driver_that_fails_is_a_cpu_and_one_note(
    monkeypatch: pytest.MonkeyPatch, error: int, said: str, function: str
) -> None:
    nvml = driver(monkeypatch, *cards(), fails={function: error})
    gpus, notes = nvml_gpus()
    assert (gpus, len(notes)) == ((), 1)
    assert re.search(rf"{said}.* \(.+\): planned for the CPU$", notes[0])
    assert "\n" not in notes[0]
    assert nvml.open == 0


def test_a_driver_without_its_library_is_told_from_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver(monkeypatch, fails={"nvmlInit": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND})
    monkeypatch.setattr(ours, "DRIVER", tmp_path)
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in nvml_gpus()[1][0]


def test_a_driver_without_gpus_is_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch)
    assert nvml_gpus() == ((), ("the NVIDIA driver has no GPU: planned for the CPU",))


def test_without_the_package_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml_gpus() == ((), ("nvidia-ml-py is not installed: planned for the CPU",))


@pytest.mark.parametrize(
    ("function", "indexes"),
    [
        ("nvmlDeviceGetHandleByIndex", [0, 1]),  # CUDA does not see it either
        ("nvmlDeviceGetMemoryInfo", [0, 2]),  # CUDA numbers it
    ],
)
def test_one_gpu_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, function: str, indexes: list[int]) -> None:
    devices = cards()
    devices[1].fails[function] = pynvml.NVML_ERROR_GPU_IS_LOST
    driver(monkeypatch, *devices)
    gpus, notes = nvml_gpus()
    assert [(gpu.name, gpu.index) for gpu in gpus] == list(zip(["card 0", "card 2"], indexes, strict=True))
    assert len(notes) == 1
    assert "GPU 1" in notes[0]
    assert "fallen off the bus" in notes[0]


def test_where_every_gpu_fails_the_cpu_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device("card", "GPU-a", fails={"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NOT_SUPPORTED})
    driver(monkeypatch, device)
    gpus, notes = nvml_gpus()
    assert gpus == ()
    assert notes[0].endswith(": planned for the CPU")


def test_what_is_asked_of_pynvml_is_in_it() -> None:
    """The fake has what the code asks for: so must the real one."""
    asked = set(re.findall(r"\bnvml\.(\w+)", Path(ours.__file__).read_text())) | set(ours.MEANINGS)
    assert len(asked) > 15
    assert {name for name in asked if not hasattr(pynvml, name)} == set()
    assert {"domain", "bus", "device"} <= {name for name, _ in pynvml.nvmlPciInfo_t._fields_}
    assert {"total", "free", "used"} <= {name for name, _ in pynvml.c_nvmlMemory_v2_t._fields_}
