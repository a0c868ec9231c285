"""model.merge=false as a user types it, where no GPU is needed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import small_models
from commands import Orchestrator
from small_models import Llama, write_adapter, write_safetensors

from orchestrator import embedded

SHAPE = Llama(hidden=512, heads=8, kv_heads=4, intermediate=1024, vocab=1000)
RANK = 8


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter for it."""
    folder = tmp_path_factory.mktemp("pair")
    return small_models.write_headers(folder / "base", SHAPE), write_adapter(folder / "lora", SHAPE, RANK)


def test_a_plan(orchestrator: Orchestrator, pair: tuple[Path, Path]) -> None:
    base, lora = pair
    argv = ("task=plan", "hardware=1x24gb", f"model.path={base}", f"model.adapter={lora}", "quant.bits=4")
    done = orchestrator(*argv, "model.merge=false")
    assert done.code == 0, done.err
    plan, merged = done.json("plan.json"), orchestrator(*argv, "backend=exllamav2").json("plan.json")
    assert {candidate["backend"] for candidate in plan["candidates"]} == {"exllamav2"}
    factors = 2 * sum(RANK * sum(size) for size in SHAPE.linears().values()) * SHAPE.layers
    assert plan["adapter_bytes"] == {"cuda:0": factors}
    assert plan["gpus"][0]["weights"] == merged["gpus"][0]["weights"] + factors
    assert plan["adapters"] == [str(lora)]
    assert "1 adapter on top" in done.out
    assert "for an adapter" in done.out
    assert "model.merge=false" in plan["command"]
    assert merged["adapter_bytes"] == {}


@pytest.mark.parametrize("merge", ["true", "false"])
def test_token_rows_that_were_lost_are_said_either_way(orchestrator: Orchestrator, tmp_path: Path, merge: str) -> None:
    base = small_models.write_headers(tmp_path / "base", SHAPE)
    lora = write_adapter(tmp_path / "lora", SHAPE, RANK)
    file = lora / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trainable_token_indices": [3, 5]}))
    argv = ("task=plan", "hardware=1x24gb", f"model.path={base}", f"model.adapter={lora}", f"model.merge={merge}")
    done = orchestrator(*argv)
    assert done.code == 2
    assert "trainable_token_indices names 2 rows of the embedding, the adapter holds none of them" in done.error
    assert done.error.endswith("It was saved incompletely: save it again with PEFT.")


def test_the_embedded_adapter_has_a_plan(orchestrator: Orchestrator) -> None:
    done = orchestrator("task=plan", "hardware=1x24gb", "model.merge=false")
    assert done.code == 0, done.err
    assert done.json("plan.json")["adapter_bytes"]["cuda:0"] > 0


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (
            ["backend=bitsandbytes"],
            2,
            "not run by backend=bitsandbytes: type backend=exllamav2, or leave model.merge out",
        ),
        (["backend=vllm", "task=plan", "hardware=1x24gb"], 2, "not run by backend=vllm: type backend=exllamav2"),
        ([f"model.path={embedded.BASE}"], 2, "there is none: type model.adapter=PATH"),
        (["task=convert"], 2, "task=convert writes one model"),
        (["merge.base=nf4"], 2, "merge.base=nf4 is for an adapter that is merged"),
        ([], 4, "model.merge=false: backend=exllamav2 needs a CUDA GPU, and there is none here. Leave model.merge out"),
        (["backend=exllamav2"], 4, "backend=exllamav2 needs a CUDA GPU"),
        (["quant.method=nf4", "task=plan", "hardware=1x24gb"], 2, "quant.method=nf4 with model.merge=false: exllamav2"),
    ],
)
def test_what_cannot_be_is_one_line(orchestrator: Orchestrator, argv: list[str], code: int, said: str) -> None:
    done = orchestrator("model.merge=false", *argv)
    assert done.code == code, done.err
    assert said in done.error


def test_an_adapter_that_the_engine_cannot_run_says_how_it_can_be(
    orchestrator: Orchestrator, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, lora = pair[0], tmp_path / "lora"
    lora.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head"],
    }
    (lora / "adapter_config.json").write_text(json.dumps(config))
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    arrays = {f"{q}.lora_A.weight": np.ones((8, SHAPE.hidden)), f"{q}.lora_B.weight": np.ones((SHAPE.hidden, 8))}
    arrays["base_model.model.lm_head.weight"] = np.ones((SHAPE.vocab, SHAPE.hidden))
    write_safetensors(lora / "adapter_model.safetensors", arrays, "F32")
    argv = ("task=plan", "hardware=1x24gb", f"model.path={base}", f"model.adapter={lora}")
    done = orchestrator(*argv, "model.merge=false")
    assert done.code == 2
    assert f"{lora}: the adapter cannot run on top of its base (model.merge=false): it replaces lm_head" in done.error
    assert done.error.endswith("Set model.merge=true with the unquantized model as model.path, which merges it.")
    assert orchestrator(*argv, "model.merge=true").code == 0
