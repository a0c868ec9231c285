"""The rotary embedding of a config.json, as exllamav2 0.3.2 reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_models import Llama

from orchestrator.errors import ConfigError
from orchestrator.stages.exl2_rope import check_rope

SHAPE = Llama()
HALF = SHAPE.hidden // SHAPE.heads // 2
ORIGINAL = {"original_max_position_embeddings": SHAPE.context}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
LISTS = {"long_factor": [2.0] * HALF, "short_factor": [1] * HALF}


def check(scaling: Any = None, context: int = SHAPE.context, **more: Any) -> None:
    check_rope(SHAPE.config() | {"rope_scaling": scaling} | more, Path("/models/m"), context)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {},
        {"rope_type": "default"},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "linear", "factor": 2},
        {"type": None, "rope_type": "yarn", "factor": 4.0, **ORIGINAL},
        LLAMA3,
        {"type": "mrope", "mrope_section": [1, 1, 2]},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
)
def test_what_it_reads(scaling: Any) -> None:
    check(scaling)
    check(text_config={"rope_scaling": scaling})


@pytest.mark.parametrize("kind", ["su", "longrope"])
def test_lists_of_factors(kind: str) -> None:
    check({"type": kind, **LISTS}, **ORIGINAL)
    quarter = {key: value[: HALF // 2] for key, value in LISTS.items()}
    check({"type": kind, **quarter}, **ORIGINAL, partial_rotary_factor=0.5)
    check({"type": kind, **LISTS}, **ORIGINAL, partial_rotary_factor=1e308)  # none: all of a head is rotated
    with pytest.raises(ConfigError, match=r"config\.json has no original_max_position_embeddings, which .* for"):
        check({"type": kind, **LISTS, **ORIGINAL})
    with pytest.raises(
        ConfigError, match=f"long_factor 1 and short_factor {HALF} numbers, and exllamav2 needs {HALF} of each"
    ):
        check({"type": kind, **LISTS, "long_factor": [1.0]}, **ORIGINAL)
    with pytest.raises(ConfigError, match=r"short_factor of rope_scaling .* is \[\]; it is a list of positive numbers"):
        check({"type": kind, **LISTS, "short_factor": []}, **ORIGINAL)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "yarn", "rope_type": "yarn", "factor": 4.0}, r"has both type \(yarn\) and rope_type \(yarn\)"),
        ({"type": "mrope", "rope_type": "default"}, r"has both type \(mrope\) and rope_type \(default\)"),
        ({"rope_type": "magic", "factor": 2.0}, "does not know the rope_scaling magic, .* knows linear, yarn, llama3"),
        ({"type": ["x"] * 99}, r"does not know the rope_scaling \['x', "),
        ({"type": "linear"}, r"factor of rope_scaling \(linear\) is not there; it is a positive number"),
        ({"type": "yarn", "factor": 4.0}, r"original_max_position_embeddings of rope_scaling \(yarn\) is not there"),
        ({**LLAMA3, "low_freq_factor": None}, r"low_freq_factor of rope_scaling \(llama3\) is not there"),
        ({**LLAMA3, "factor": "8"}, r'factor of rope_scaling \(llama3\) is "8"; it is a positive number'),
        ({**LLAMA3, "factor": True}, r"factor of rope_scaling \(llama3\) is True"),
    ],
)
def test_what_it_would_read_wrong_or_stop_at(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        check(scaling)
    assert str(error.value).startswith("/models/m/config.json")
    assert error.value.hint


@pytest.mark.parametrize("theta", ["x", 0, -5, True])
def test_a_theta_that_is_none(theta: Any) -> None:
    with pytest.raises(ConfigError, match=r"rope_theta is .*, not a positive number"):
        check(rope_theta=theta)


def test_it_scales_no_further_than_it_says() -> None:
    check({"type": "linear", "factor": 2.0}, context=2 * SHAPE.context)
    for scaling in (None, {"rope_type": "dynamic", "factor": 2.0}):
        with pytest.raises(ConfigError, match=f"does not scale beyond {SHAPE.context} tokens"):
            check(scaling, context=SHAPE.context + 1)
