"""The check of a placement against its plan."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from asking import make_plan

from orchestrator.backends.protocol import LoadPlan
from orchestrator.engine.placement import check_placement, planned_device, split
from orchestrator.errors import EngineError
from orchestrator.tasks.session import _placed

GIB = 1 << 30
SPLIT: LoadPlan = replace(
    make_plan("m"),
    device_map={"model": "cuda:0", "model.layers.1": "cuda:1", "lm_head": "cuda:1"},
    weights={"cuda:0": GIB, "cuda:1": GIB},
)


def test_the_longest_module_path_decides() -> None:
    assert planned_device(SPLIT, "model.layers.1.mlp.weight") == "cuda:1"
    assert planned_device(SPLIT, "model.layers.10.mlp.weight") == "cuda:0"
    assert planned_device(SPLIT, "visual.weight") is None
    assert planned_device(replace(SPLIT, device_map={"": "cpu"}), "visual.weight") == "cpu"


def test_as_planned() -> None:
    check_placement(SPLIT, {"cuda:0": {"model.a": GIB + 20_000_000}, "cuda:1": {"lm_head.weight": GIB - 20_000_000}})
    check_placement(replace(SPLIT, device_map={}), {"cuda:0": {"rank0.a": GIB}, "cuda:1": {"rank1.a": GIB}})


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ({"cuda:0": {"model.a": GIB}, "cuda:1": {"model.b": GIB}}, r"model\.b is on cuda:1, planned on cuda:0"),
        ({"cuda:0": {"model.a": GIB}, "cpu": {"model.layers.1.b": GIB}}, r"is on cpu, planned on cuda:1"),
        ({"cuda:0": {"model.a": GIB}, "disk": {"visual.b": GIB}}, r"is on disk, planned on cuda:0 or cuda:1"),
        ({"cuda:0": {"model.a": GIB}}, r"cuda:1 holds 0 bytes of weights, but the plan says 1,073,741,824"),
        ({"cuda:0": {"model.a": GIB * 2}, "cuda:1": {"lm_head.w": GIB}}, r"cuda:0 holds 2,147,483,648 bytes"),
    ],
)
def test_not_as_planned(placement: dict[str, dict[str, int]], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        check_placement(SPLIT, placement)


GROUP: LoadPlan = replace(
    SPLIT,
    device_map={"": "cuda:0+cuda:1", "model.embed_tokens": "cpu"},
    weights={"cpu": GIB, "cuda:0+cuda:1": 2 * GIB},
)


def test_an_engine_that_spreads_by_itself() -> None:
    embedding = {"model.embed_tokens.weight": GIB}
    check_placement(GROUP, {"cpu": embedding, "cuda:0": {"model.a": GIB // 2}, "cuda:1": {"lm_head.w": 3 * GIB // 2}})
    check_placement(GROUP, {"cpu": embedding, "cuda:1": {"model.a": 2 * GIB}})


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ({"cuda:2": {"model.a": 2 * GIB}}, r"model\.a is on cuda:2, planned on cuda:0 or cuda:1"),
        ({"cpu": {"model.a": GIB}}, r"model\.a is on cpu, planned on cuda:0 or cuda:1"),
        ({"cuda:0": {"model.embed_tokens.weight": GIB}}, r"is on cuda:0, planned on cpu"),
        (
            {"cpu": {"model.embed_tokens.weight": GIB}, "cuda:0": {"model.a": GIB}},
            r"cuda:0\+cuda:1 holds 1,073",
        ),
    ],
)
def test_a_group_that_is_not_as_planned(placement: dict[str, dict[str, int]], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        check_placement(GROUP, placement)


def test_a_split_by_the_engine_is_told_beside_the_plans() -> None:
    planned = {"cuda:0": 20 * GIB, "cuda:1": 13 * GIB}
    assert split(planned, {"cpu": 5, "cuda:0": 21 * GIB}) == {
        "planned": planned,
        "engine": {"cuda:0": 21 * GIB, "cuda:1": 0},
    }
    assert split({"cuda:0": GIB}, {"cuda:0": GIB}) == {}
    chosen: Any = SimpleNamespace(gpus=[SimpleNamespace(device=d, weights=w) for d, w in planned.items()])
    as_planned: Any = SimpleNamespace(placement=planned | {"cpu": 7})
    other: Any = SimpleNamespace(placement={"cuda:0": 21 * GIB, "cuda:1": 12 * GIB})
    assert _placed(chosen, as_planned) == "placement as planned"
    assert _placed(chosen, other) == (
        "split by the engine: 21.00 GiB of weights on cuda:0 where the plan has 20.00 GiB, "
        "12.00 GiB of weights on cuda:1 where the plan has 13.00 GiB"
    )
