"""With adapters, or another type, the plan is of the model that will be written: to the byte, from headers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import small_models
from composing import composed
from small_models import Llama, write_safetensors

from orchestrator.checkpoint.adapter import open_adapter
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import model_spec
from orchestrator.stages.merge import merge
from orchestrator.tasks.session import look

pytestmark = pytest.mark.usefixtures("hydra", "every_engine")

SHAPE = Llama(tied=True)
HEAD = {"lm_head.lora_A.weight": (8, SHAPE.hidden), "lm_head.lora_B.weight": (SHAPE.vocab, 8)}
Q = "model.layers.0.self_attn.q_proj"
PLAIN = {f"{Q}.lora_A.weight": (8, SHAPE.hidden), f"{Q}.lora_B.weight": (SHAPE.hidden, 8)}
ROWS = SHAPE.vocab + 8
RESIZED = PLAIN | {"model.embed_tokens.weight": (ROWS, SHAPE.hidden)}


def write_adapter(folder: Path, shapes: dict[str, tuple[int, ...]], *targets: str) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    random = np.random.default_rng(1)
    arrays = {f"base_model.model.{name}": random.standard_normal(shape) for name, shape in shapes.items()}
    write_safetensors(folder / "adapter_model.safetensors", arrays, "F32")
    return folder


@pytest.mark.parametrize(
    ("shapes", "target", "dtype", "more"),
    [
        (PLAIN, "q_proj", "auto", 0),
        (HEAD, "lm_head", "auto", 2 * SHAPE.vocab * SHAPE.hidden),  # the head is no longer the embedding
        (RESIZED, "q_proj", "auto", 2 * 8 * SHAPE.hidden),
        (PLAIN, "q_proj", "float32", None),
        (HEAD, "lm_head", "bfloat16", 2 * SHAPE.vocab * SHAPE.hidden),
    ],
    ids=["plain", "an untied head", "more rows", "float32", "an untied head in bfloat16"],
)
def test_the_plan_is_of_the_merged_model(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], target: str, dtype: str, more: int | None
) -> None:
    base = small_models.write_noise(tmp_path / "base", SHAPE)
    lora = write_adapter(tmp_path / "lora", shapes, target)
    argv = ("hardware=1x24gb", "backend=transformers", "quant.bits=16", f"convert.dtype={dtype}")
    config = composed(f"model.path={base}", f"model.adapter={lora}", f"paths.artifacts={tmp_path / 'store'}", *argv)
    planned = look(config, planning=True)
    merge(
        open_checkpoint(base),
        [(open_adapter(lora), 1.0)],
        tmp_path / "out",
        dtype=None if dtype == "auto" else dtype,
        shard_size=2**30,
        progress=lambda *_: None,
    )
    spec, there = planned.spec, model_spec(open_checkpoint(tmp_path / "out"))
    assert (spec.nbytes, spec.tensors, spec.vocab, spec.tied) == (there.nbytes, there.tensors, there.vocab, there.tied)
    plain = model_spec(open_checkpoint(base)).nbytes
    assert spec.nbytes == (2 * plain if more is None else plain + more)
    assert planned.plan.chosen.gpus[0].weights == there.parameters * 2 + there.rotary_bytes
    said = " ".join(planned.plan.notes)
    assert ("tie_word_embeddings=false" in said) == (target == "lm_head")
    assert (f"resized the vocabulary to {ROWS} rows" in said) == (shapes is RESIZED)
