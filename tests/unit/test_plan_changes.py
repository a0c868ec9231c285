"""What to change where something does not fit: every change fits when it is typed, the cheapest come first."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import small_models
from composing import composed
from small_models import LLAMA_7B, LLAMA_70B, Llama

from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import ModelSpec, model_spec
from orchestrator.hardware import GIB, MIB, Gpu, Hardware
from orchestrator.plan import huggingface
from orchestrator.plan.planner import make_plan
from orchestrator.plan.types import Change, Plan
from orchestrator.report.plan import command

pytestmark = pytest.mark.usefixtures("hydra", "every_engine", "no_margins")


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[Llama, ModelSpec]:
    folder = tmp_path_factory.mktemp("models")
    written = {shape: small_models.write_headers(folder / str(shape.layers), shape) for shape in (LLAMA_7B, LLAMA_70B)}
    return {shape: model_spec(open_checkpoint(model)) for shape, model in written.items()}


def cards(count: int, gib: float = 24) -> Hardware:
    gpus = tuple(Gpu(i, "card", int(gib * GIB), int(gib * GIB) - 450 * MIB, (8, 6)) for i in range(count))
    return Hardware("auto", gpus, 128 * GIB, 64 * GIB, 16)


CPU = Hardware("auto", (), 64 * GIB, 5 * GIB, 8)

CASES = [
    (LLAMA_70B, cards(4), ["backend=vllm", "quant.bits=16", "parallel.tensor=4"]),
    (LLAMA_70B, cards(2), ["backend=exllamav2", "quant.bits=8", "model.max_context=2048"]),
    (LLAMA_70B, cards(2), ["backend=exllamav2", "quant.bits=4", "model.max_context=2048", "run.in_flight=64"]),
    (LLAMA_70B, cards(2), ["backend=exllamav2", "quant.bits=4", "parallel.gpu_split=[10,24]"]),
    (LLAMA_70B, cards(1), []),
    (LLAMA_70B, cards(1, 8), ["quant.bits=4"]),
    (LLAMA_7B, cards(1, 8), ["quant=none"]),
    (LLAMA_7B, cards(1, 8), ["backend=bitsandbytes", "quant=int8", "model.max_context=4096", "run.in_flight=8"]),
    (LLAMA_7B, cards(1, 3), ["backend=bitsandbytes", "quant.bits=4"]),
    (LLAMA_7B, CPU, ["backend=transformers", "model.dtype=bfloat16"]),
]


def typed(argv: list[str], change: Change) -> list[str]:
    """The command line with a change in it, as a person would type it."""
    changed = [setting.replace("=/path", "=/tmp") for setting in change.settings]
    keys = {setting.partition("=")[0] for setting in changed}
    if keys & {"quant.bits", "backend"}:
        argv = [a for a in argv if not a.startswith("quant=")]
    if "backend" in keys:  # another engine has no use for this one's keys
        argv = [a for a in argv if not a.startswith(("parallel.", "cache."))]
    return [a for a in argv if a.partition("=")[0] not in keys] + changed


@pytest.mark.parametrize(("shape", "hardware", "argv"), CASES)
def test_every_change_fits_when_it_is_made(
    specs: dict[Llama, ModelSpec],
    shape: Llama,
    hardware: Hardware,
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface, "disk_room", lambda folder: 1 << 40)
    plan = make_plan(composed(*argv), specs[shape], hardware)
    assert not plan.chosen.fits
    assert plan.changes
    for change in plan.changes:
        more = len(change.candidate.gpus) if change.cards else len(hardware.gpus)
        machine = cards(max(more, len(hardware.gpus)), hardware.gpus[0].total / GIB) if hardware.gpus else hardware
        then = make_plan(composed(*typed(argv, change)), specs[shape], machine)
        assert then.chosen.fits, change.said
        if change.settings:
            assert then.chosen.fullest.total <= then.chosen.fullest.capacity
            assert (then.chosen.backend, then.chosen.bits) == (change.candidate.backend, change.candidate.bits)


def found(plan: Plan) -> list[str]:
    return [change.label for change in plan.changes]


@pytest.mark.parametrize(
    ("in_flight", "context", "expected"),
    [
        (4, 16384, ["run.in_flight", "cache.bits", "model.max_context", "quant.bits", "1 more such card"]),
        (1, 32768, ["cache.bits", "model.max_context", "quant.bits", "backend", "1 more such card"]),
    ],
)
def test_the_cheapest_come_first(
    specs: dict[Llama, ModelSpec], in_flight: int, context: int, expected: list[str]
) -> None:
    argv = ["backend=exllamav2", "quant.bits=4.25", f"model.max_context={context}", f"run.in_flight={in_flight}"]
    labels = found(make_plan(composed(*argv), with_context(specs[LLAMA_70B], 32768), cards(2)))
    firsts = [re.split("[=(]", label.removeprefix("run.in_flight=1 "))[0].strip() for label in labels]
    assert firsts == expected


def with_context(spec: ModelSpec, tokens: int) -> ModelSpec:
    return replace(spec, max_context=tokens)


def test_a_width_below_is_the_largest_that_fits(specs: dict[Llama, ModelSpec]) -> None:
    plan = make_plan(composed("backend=exllamav2", "quant.bits=8"), specs[LLAMA_70B], cards(2))
    [bits] = [change.candidate.bits for change in plan.changes if change.label.startswith("quant.bits")]
    above = make_plan(composed("backend=exllamav2", f"quant.bits={bits + 0.25}"), specs[LLAMA_70B], cards(2))
    assert not above.chosen.fits or above.chosen.max_context < 512


def test_more_cards_are_as_few_as_will_do(specs: dict[Llama, ModelSpec]) -> None:
    argv = ["backend=exllamav2", "quant.bits=8"]
    [change] = [c for c in make_plan(composed(*argv), specs[LLAMA_70B], cards(1)).changes if c.cards]
    total = int(change.cards.split("(")[1].split()[0])
    assert change.cards.startswith(f"{total - 1} more such card")
    assert make_plan(composed(*argv), specs[LLAMA_70B], cards(total)).chosen.fits
    assert not make_plan(composed(*argv), specs[LLAMA_70B], cards(total - 1)).chosen.fits


def test_a_smaller_width_comes_before_none(specs: dict[Llama, ModelSpec]) -> None:
    asked = ["backend=exllamav2", "quant.bits=4", "parallel.tensor=3"]
    labels = found(make_plan(composed(*asked), specs[LLAMA_7B], cards(2)))
    assert labels[:2] == ["parallel.tensor=2", "parallel.tensor=null"]


def test_a_width_that_was_asked_for_is_kept_where_it_can_be(specs: dict[Llama, ModelSpec]) -> None:
    argv = ["backend=exllamav2", "quant.bits=4", "parallel.tensor=2"]
    changes = make_plan(composed(*argv), specs[LLAMA_70B], cards(1)).changes
    [more] = [change for change in changes if change.cards]
    assert more.cards.startswith("1 more such card")
    assert (more.settings, more.candidate.tensor_parallel) == ((), 2)


def test_cards_are_not_named_where_the_setting_beside_them_is_enough(specs: dict[Llama, ModelSpec]) -> None:
    labels = found(make_plan(composed("backend=vllm", "parallel.tensor=3"), specs[LLAMA_7B], cards(4)))
    assert labels[:2] == ["parallel.tensor=4", "parallel.tensor=null"]
    assert not any("card" in label for label in labels)


def test_a_shorter_context_is_the_longest_that_fits(specs: dict[Llama, ModelSpec]) -> None:
    spec, argv = with_context(specs[LLAMA_70B], 131072), ["backend=exllamav2", "quant.bits=8"]
    plan = make_plan(composed(*argv, "model.max_context=131072"), spec, cards(4))
    [change] = [c for c in plan.changes if c.label.startswith("model.max_context")]
    assert change.candidate.max_context == plan.chosen.largest_context > 32768
    assert change.candidate.largest_context is None  # nobody asked


def test_in_flight_are_no_fewer_than_has_to_be(specs: dict[Llama, ModelSpec]) -> None:
    argv = ["backend=exllamav2", "quant.bits=4", "model.max_context=4096"]
    plan = make_plan(composed(*argv, "run.in_flight=32"), specs[LLAMA_70B], cards(2))
    labels = found(plan)
    [fewer] = [int(label.partition("=")[2]) for label in labels if re.fullmatch(r"run.in_flight=\d+", label)]
    assert fewer > 1
    assert make_plan(composed(*argv, f"run.in_flight={fewer}"), specs[LLAMA_70B], cards(2)).chosen.fits
    assert not make_plan(composed(*argv, f"run.in_flight={2 * fewer}"), specs[LLAMA_70B], cards(2)).chosen.fits
    alone = [label for label in labels if not label.startswith("run.in_flight")]
    assert alone, labels  # others keep them all


def test_what_is_kept_for_others_can_be_had(specs: dict[Llama, ModelSpec]) -> None:
    less = tuple(replace(gpu, free=gpu.free - 22 * GIB) for gpu in cards(2).gpus)
    argv = ["quant.bits=4", "hardware.reserve_gib=22"]
    plan = make_plan(composed(*argv), specs[LLAMA_70B], replace(cards(2), gpus=less))
    assert found(plan)[0] == "hardware.reserve_gib=0"
    assert make_plan(composed("quant.bits=4"), specs[LLAMA_70B], cards(2)).chosen.fits


def test_another_method_of_the_same_width(specs: dict[Llama, ModelSpec]) -> None:
    argv = ["quant.method=int8", "quant.bits=8"]
    plan = make_plan(composed(*argv, "model.max_context=4096"), specs[LLAMA_70B], cards(4, 19.5))
    assert not plan.chosen.fits
    [change] = [c for c in plan.changes if c.costs == "the method that was asked for"]
    assert change.settings == ("quant.method=auto",)
    assert (change.candidate.method, change.candidate.bits) == ("exl2", 8)


def test_no_change_is_one_that_changes_nothing(specs: dict[Llama, ModelSpec]) -> None:
    argv = ["backend=bitsandbytes", "quant.method=nf4", "quant.bits=4", "run.in_flight=64", "model.max_context=4096"]
    plan = make_plan(composed(*argv), specs[LLAMA_7B], cards(1, 10))
    assert not plan.chosen.fits
    for change in plan.changes:
        if change.costs == "the length of a conversation":
            assert change.candidate.max_context < 4096
        assert change.costs != "the method that was asked for" or change.candidate.method != "nf4"
        assert change.costs != "precision" or change.candidate.bits < 4


def test_of_a_card_with_nothing_left_nobody_knows_what_it_had(specs: dict[Llama, ModelSpec]) -> None:
    none = tuple(replace(gpu, free=0) for gpu in cards(2).gpus)
    plan = make_plan(
        composed("quant.bits=4", "hardware.reserve_gib=22"), specs[LLAMA_70B], replace(cards(2), gpus=none)
    )
    assert not any("reserve_gib" in label for label in found(plan))


def test_what_fits_has_no_changes(specs: dict[Llama, ModelSpec]) -> None:
    assert make_plan(composed(), specs[LLAMA_7B], cards(1)).changes == ()


def test_the_largest_context_is_the_largest(specs: dict[Llama, ModelSpec]) -> None:
    """Found by the search, and then asked for: it fits, and 512 tokens more do not."""
    spec = with_context(specs[LLAMA_70B], 131072)
    for candidate in make_plan(composed(), spec, cards(2)).candidates:
        if not candidate.fits:
            assert candidate.largest_context == 0
            continue
        argv = [f"backend={candidate.backend}", f"quant.bits={candidate.bits:g}", "run.in_flight=1"]
        at, above = (
            make_plan(composed(*argv, f"model.max_context={tokens}"), spec, cards(2)).chosen.fits
            for tokens in (candidate.largest_context, candidate.largest_context + 512)
        )
        assert (at, above) == (True, False)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "backend=exllamav2 quant.bits=6 prompts.text=Hello"),
        (["task=plan", "hardware=2x24gb"], "hardware=2x24gb backend=exllamav2 quant.bits=6 prompts.text=Hello"),
        (["quant=exl2"], "quant=exl2 backend=exllamav2 prompts.text=Hello"),
        (["backend=exllamav2", "quant.bits=5", "prompts.text=Hi"], "backend=exllamav2 quant.bits=5 prompts.text=Hi"),
        (["prompts.text='it\\'s'"], """'prompts.text=it'"'"'s' backend=exllamav2 quant.bits=6"""),
    ],
)
def test_the_command_is_what_was_typed_with_the_choice(
    specs: dict[Llama, ModelSpec], argv: list[str], expected: str
) -> None:
    config = composed("model.path=/model")
    plan = make_plan(composed("backend=exllamav2", "quant.bits=6"), specs[LLAMA_7B], cards(1))
    made = command(["model.path='/model'", *argv], plan.chosen, config)
    assert made == f"python -m orchestrator model.path=/model {expected}"
    assert shlex.split(made)[3] == "model.path=/model"


def test_what_was_quoted_for_hydra_is_unquoted(tmp_path: Path) -> None:
    from hypothesis import example, given
    from hypothesis import strategies as st

    from orchestrator.app import conf_folder
    from orchestrator.overrides import prepare, unquoted

    @given(st.text(alphabet="ab'\\$ {}[],=\"\n", max_size=12))
    @example("it's")
    @example("\\'${x}\\")
    def holds(text: str) -> None:
        override = f"model.path=x{text}"
        [made] = prepare([override], conf_folder())
        assert unquoted(made) == override

    holds()
