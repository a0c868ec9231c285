"""What an engine's processes hold: real processes of this machine, and GPUs behind pynvml's own names and errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from orchestrator.engine.memory import PERIOD_S, MemoryWatch, Peak
from orchestrator.hardware import MIB, Gpu

HOLDS = """
import mmap, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; held = bytearray(80 << 20); time.sleep(60)"])
with open(sys.argv[1], "rb") as file:  # read, and not held
    seen = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    sum(seen[i] for i in range(0, len(seen), 4096))
    held = bytearray(100 << 20)
    time.sleep(60)
"""


@dataclass
class Device:
    uuid: str
    used: int = 1000 * MIB
    processes: dict[int, int | None] = field(default_factory=dict)
    fails: bool = False


class Nvml:
    """pynvml of a machine with these devices."""

    def __init__(self, *devices: Device) -> None:
        self.devices = {device.uuid: device for device in devices}
        self.open = 0
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(pynvml, name)

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Device:
        return self.devices[uuid]

    def nvmlDeviceGetComputeRunningProcesses(self, device: Device) -> list[Any]:
        self.asked += 1
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in device.processes.items()]

    def nvmlDeviceGetGraphicsRunningProcesses(self, device: Device) -> list[Any]:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)

    def nvmlDeviceGetMemoryInfo(self, device: Device, version: Any = None) -> Any:
        if device.fails:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return SimpleNamespace(total=80_000 * MIB, free=80_000 * MIB - device.used, used=device.used)


@pytest.fixture
def leader() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    yield process.pid
    process.kill()
    process.wait()


def watching(monkeypatch: pytest.MonkeyPatch, *devices: Device) -> tuple[Nvml, MemoryWatch]:
    nvml = Nvml(*devices)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    gpus = [Gpu(i, "card", 80_000 * MIB, 79_000 * MIB, (9, 0), device.uuid) for i, device in enumerate(devices)]
    return nvml, MemoryWatch(gpus, period_s=0.005)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def after_samples(nvml: Nvml, count: int = 4) -> None:
    wanted = nvml.asked + count
    until(lambda: nvml.asked >= wanted)


def test_twenty_times_a_second_or_more() -> None:
    assert PERIOD_S <= 0.05


def test_host_memory_of_all_its_processes_without_the_files_that_they_read(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint"
    file.write_bytes(bytes(64 * MIB))
    engine = subprocess.Popen([sys.executable, "-c", HOLDS, str(file)], start_new_session=True)
    try:
        with MemoryWatch(()) as watch:
            watch.follow(engine.pid)
            until(lambda: watch.peaks.get("cpu", Peak(0, "")).held > 180 * MIB)
            time.sleep(0.2)
        assert 180 * MIB < watch.peaks["cpu"].held < 230 * MIB
    finally:
        os.killpg(engine.pid, signal.SIGKILL)
        engine.wait()


def test_of_a_shared_gpu_only_ours_counts(monkeypatch: pytest.MonkeyPatch, leader: int) -> None:
    device = Device("GPU-a", processes={1: 500 * MIB})
    nvml, watch = watching(monkeypatch, device)
    with watch:
        watch.follow(leader)
        after_samples(nvml)
        assert "cuda:0" not in watch.peaks
        device.processes[leader], device.used = 3000 * MIB, 9000 * MIB  # another process has grown too
        after_samples(nvml)
        device.processes[leader] = 2000 * MIB
        after_samples(nvml)
    assert watch.peaks["cuda:0"] == Peak(3000 * MIB, "process")
    assert nvml.open == 0


def test_where_processes_are_hidden_the_growth_of_the_device_counts(
    monkeypatch: pytest.MonkeyPatch, leader: int
) -> None:
    unknown = Device("GPU-b", used=200 * MIB, processes={2**22 + 7: 900 * MIB})  # a number of another container
    unsized = Device("GPU-c", used=0, processes={leader: None})  # as on MIG
    nvml, watch = watching(monkeypatch, Device("GPU-a"), unknown, unsized)
    with watch:
        watch.follow(leader)
        after_samples(nvml)
        unknown.used, unsized.used = 2200 * MIB, 700 * MIB
        after_samples(nvml, 9)
    assert {k: v for k, v in watch.peaks.items() if k != "cpu"} == {
        "cuda:1": Peak(2000 * MIB, "device"),
        "cuda:2": Peak(700 * MIB, "device"),
    }


def test_a_gpu_that_cannot_be_asked_is_left_out(monkeypatch: pytest.MonkeyPatch, leader: int) -> None:
    device = Device("GPU-a", processes={leader: 5 * MIB})
    nvml, watch = watching(monkeypatch, device, Device("GPU-b", fails=True))
    with watch:
        watch.follow(leader)
        after_samples(nvml)
        device.fails = True  # what was seen stays
        after_samples(nvml)
    assert watch.peaks["cuda:0"] == Peak(5 * MIB, "process")
    assert "cuda:1" not in watch.peaks
    assert nvml.open == 0
