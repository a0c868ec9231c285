"""Whether every tensor of a loaded engine lies where the plan wanted it."""

from __future__ import annotations

from orchestrator.backends.protocol import LoadPlan
from orchestrator.errors import EngineError

Placement = dict[str, dict[str, int]]  # device -> {tensor name: bytes}

_TOLERANCE = 0.02
_SLACK = 1 << 20  # bytes: caches of rotary angles and the like, which no header lists
_NAMED = 3  # tensors in a message


def members(device: str) -> list[str]:
    """The devices of a planned device: one, or those of "cuda:0+cuda:1", where the engine itself spreads over them."""
    return device.split("+")


def bytes_per_device(placement: Placement) -> dict[str, int]:
    """device -> bytes."""
    return {device: sum(tensors.values()) for device, tensors in placement.items()}


def split(planned: dict[str, int], placed: dict[str, int]) -> dict[str, dict[str, int]]:
    """GPU -> bytes of weights there, by the plan and by the engine, where there are several; else nothing.

    An engine that spreads whole layers itself may decide otherwise than the plan foresaw.

    Args:
        planned, placed: device -> bytes of weights.
    """
    if len(planned) < 2:
        return {}
    return {"planned": planned, "engine": {device: placed.get(device, 0) for device in planned}}


def differs(planned: int, found: int) -> bool:
    """More than 2% and 1 MiB apart."""
    return abs(found - planned) > _TOLERANCE * planned + _SLACK


def planned_device(plan: LoadPlan, tensor: str) -> str | None:
    """The device of the longest module path of plan.device_map that holds the tensor; None where none does."""
    paths = [path for path in plan.device_map if not path or tensor == path or tensor.startswith(path + ".")]
    return plan.device_map[max(paths, key=len)] if paths else None


def check_placement(plan: LoadPlan, placement: Placement) -> None:
    """Compares what was loaded with the plan: each tensor's device, then the bytes of each device.

    Raises:
        EngineError: a tensor lies elsewhere (up to three are named, with both devices), or a device holds other
            bytes than planned by more than 2% and 1 MiB (both numbers are given).
    """
    stray = []
    planned_devices = {member for device in plan.weights for member in members(device)}
    for device, tensors in placement.items():
        for name in tensors:
            wanted = planned_device(plan, name)
            if device not in planned_devices or (wanted is not None and device not in members(wanted)):
                where = members(wanted) if wanted else sorted(planned_devices)
                stray.append(f"{name} is on {device}, planned on {' or '.join(where)}")
    if stray:
        more = f" and {len(stray) - _NAMED} more tensors" if len(stray) > _NAMED else ""
        raise EngineError(
            f"the engine did not load as planned: {'; '.join(stray[:_NAMED])}{more}",
            "Plan for less on that device (hardware.memory_gib, parallel.gpu_split), or quantize to fewer bits",
        )
    actual = bytes_per_device(placement)
    for device, planned in sorted(plan.weights.items()):
        found = sum(actual.get(member, 0) for member in members(device))
        if differs(planned, found):
            raise EngineError(
                f"{device} holds {found:,} bytes of weights, but the plan says {planned:,}: "
                "the memory model does not describe this checkpoint",
                "Run task=plan on the same files to see what was expected of each device",
            )
