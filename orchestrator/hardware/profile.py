"""What a request makes of GPUs: a profile's cards, the ones chosen, the caps on each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from orchestrator.config import LESS, HardwareConfig, kept_free
from orchestrator.errors import ConfigError, EngineUnavailableError
from orchestrator.hardware.types import DRIVER_KEEPS, FOR_THE_CPU, GIB, Gpu

MEMORY_GIB = 24.0  # of a profile's cards where it says nothing
CAPABILITY = 8.6  # likewise: the oldest that is sold with so much
AS_SOLD = 0.9  # cards have up to a tenth less than they are sold with (ECC): not worth a note


def profile_gpus(config: HardwareConfig) -> tuple[Gpu, ...]:
    """The cards of a named profile that are used: their memory, less what the driver keeps and the reserve.

    Raises:
        ConfigError: a card or a size for one that the profile does not have, or one that is kept free as a whole.
    """
    cards = range(config.cards or 0)
    indexes = list(cards) if config.gpus is None else config.gpus
    _must_exist(indexes, list(cards), f"the profile {config.profile}")
    capability = _capability(CAPABILITY if config.capability is None else config.capability)
    gpus = []
    for i, gib in zip(indexes, _sizes(config, len(indexes)), strict=True):
        size = gib or MEMORY_GIB
        total = int(size * GIB)
        check_kept(config, f"the {size:g} GiB card without what its driver keeps", total - DRIVER_KEEPS)
        free = max(0, total - DRIVER_KEEPS - _reserve(config))
        gpus.append(Gpu(i, f"{size:g} GiB card", total, free, capability))
    return tuple(gpus)


def chosen_gpus(gpus: tuple[Gpu, ...], config: HardwareConfig, notes: tuple[str, ...]) -> tuple[Gpu, ...]:
    """The machine's GPUs that the request uses: hardware.gpus, else as many as the profile has, else all.

    Raises:
        ConfigError: GPUs asked for that the machine, or the profile, does not have.
        EngineUnavailableError: a profile of more GPUs than there are.
    """
    asked, cards = config.gpus, config.cards
    why = f" ({notes[0].removesuffix(FOR_THE_CPU)})" if notes and not gpus else ""
    if asked is not None and cards is not None and len(asked) > cards:
        raise ConfigError(f"hardware.gpus={asked} names {len(asked)} GPUs, and {config.profile} has {cards}")
    if cards is not None and len(gpus) < (cards if asked is None else len(asked)):
        raise EngineUnavailableError(
            f"hardware={config.profile} runs on {cards} GPUs, and this machine has {len(gpus)}{why}",
            "Add task=plan to plan for it, or use hardware=auto.",
        )
    if asked is None:
        return gpus[:cards]
    by_index = {gpu.index: gpu for gpu in gpus}
    _must_exist(asked, list(by_index), "this machine", why)
    return tuple(by_index[i] for i in asked)


def capped_gpus(gpus: tuple[Gpu, ...], config: HardwareConfig) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """The machine's GPUs as the request may use them, and notes where a card has less than its cap.

    Raises:
        ConfigError: not one size for each GPU, or a reserve and a margin that leave nothing of one.
    """
    for gpu in gpus:
        check_kept(config, f"GPU {gpu.index}", gpu.total)
    sizes = _sizes(config, len(gpus))
    capped = tuple(_capped(gpu, gib, config) for gpu, gib in zip(gpus, sizes, strict=True))
    return capped, (*_memory_notes(gpus, sizes), *_capability_notes(gpus, config))


def capped_host(total: int, available: int, config: HardwareConfig) -> tuple[int, tuple[str, ...]]:
    """What a request without GPUs may take of the host, and a note where the host has less than the cap.

    Raises:
        ConfigError: sizes for GPUs, or a reserve and a margin that leave nothing.
    """
    check_kept(config, "this machine", total)
    notes: tuple[str, ...] = ()
    if config.capability is not None:
        notes += ("hardware.capability is of GPUs, and there is none",)
    if isinstance(config.memory_gib, list):
        raise ConfigError(
            f"hardware.memory_gib={config.memory_gib} gives {_count(config.memory_gib)}, and there is no GPU",
            "One number caps the host's memory.",
        )
    if config.memory_gib is not None:
        if config.memory_gib * GIB * AS_SOLD > total:
            notes += (_too_large(config.memory_gib, "this machine has", total),)
        available = min(available, int(config.memory_gib * GIB))
    return max(0, available - _reserve(config)), notes


def check_kept(config: HardwareConfig, what: str, total: int) -> None:
    """Refuses a reserve and a margin that leave nothing of a device."""
    kept, said = kept_free(config)
    if kept and kept * GIB >= total:
        raise ConfigError(f"{said} nothing: {what} has {total / GIB:.2f} GiB in all", f"{LESS.capitalize()}.")


def _capped(gpu: Gpu, gib: float | None, config: HardwareConfig) -> Gpu:
    most = gpu.free if gib is None else min(gpu.free, int(gib * GIB) - DRIVER_KEEPS)
    # A profile of older cards stands for them whole: what they cannot do is not planned for.
    capability = gpu.capability if config.capability is None else min(gpu.capability, _capability(config.capability))
    return replace(gpu, free=max(0, most - _reserve(config)), capability=capability)


def _memory_notes(gpus: tuple[Gpu, ...], sizes: Sequence[float | None]) -> Iterator[str]:
    pairs = [(gpu, gib) for gpu, gib in zip(gpus, sizes, strict=True) if gib and gib * GIB * AS_SOLD > gpu.total]
    for gib, total in dict.fromkeys((gib, gpu.total) for gpu, gib in pairs):
        of = [str(gpu.index) for gpu, cap in pairs if (cap, gpu.total) == (gib, total)]
        yield _too_large(gib, f"GPU {', '.join(of)} {'has' if len(of) == 1 else 'have'}", total)


def _too_large(gib: float, who_has: str, total: int) -> str:
    return f"hardware.memory_gib={gib:g}: {who_has} {total / GIB:.2f} GiB, which counts"


def _capability_notes(gpus: tuple[Gpu, ...], config: HardwareConfig) -> Iterator[str]:
    if config.capability is None:
        return
    older = [gpu for gpu in gpus if gpu.capability < _capability(config.capability)]
    for text in dict.fromkeys(gpu.capability_text for gpu in older):
        of = ", ".join(str(gpu.index) for gpu in older if gpu.capability_text == text)
        yield f"hardware.capability={config.capability:g}: GPU {of} has {text}, which counts"


def _must_exist(indexes: list[int], have: list[int], who: str, why: str = "") -> None:
    missing = [i for i in indexes if i not in have]
    if missing:
        known = ", ".join(map(str, have)) or "none"
        raise ConfigError(f"hardware.gpus={indexes}: there is no GPU {missing[0]}; {who} has {known}{why}")


def _sizes(config: HardwareConfig, count: int) -> Sequence[float | None]:
    """hardware.memory_gib for each of `count` GPUs: one number is for all of them."""
    sizes = config.memory_gib
    if not isinstance(sizes, list):
        return [sizes] * count
    if len(sizes) != count:
        used = "1 GPU is used" if count == 1 else f"{count} GPUs are used"
        raise ConfigError(
            f"hardware.memory_gib={sizes} gives {_count(sizes)}, and {used}",
            "Give one number for all, or one for each GPU.",
        )
    return sizes


def _count(sizes: list[float]) -> str:
    return f"{len(sizes)} size{'s' if len(sizes) != 1 else ''}"


def _reserve(config: HardwareConfig) -> int:
    return int(config.reserve_gib * GIB)


def _capability(number: float) -> tuple[int, int]:
    """8.6 as (8, 6)."""
    major, _, minor = f"{number:.1f}".partition(".")
    return int(major), int(minor)
