"""The memory model's weights, to the byte, against what transformers and bitsandbytes hold of every architecture."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import transformers
from architecture_models import MODELS, tiny

from orchestrator.backends.hf_tensors import bytes_per_tensor
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import model_spec
from orchestrator.plan.huggingface import units
from orchestrator.plan.types import Ask

OPTIONS = {
    "none": {},
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("label", [label for label, (name, _) in MODELS.items() if not name.endswith("Generation")])
def test_weights_take_what_the_plan_says(label: str, method: str, tmp_path: Path) -> None:
    if method != "none":
        pytest.importorskip("bitsandbytes")
    tiny(label).save_pretrained(tmp_path)
    options = {"quantization_config": transformers.BitsAndBytesConfig(**OPTIONS[method])} if method != "none" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map={"": "cpu"}, **options
    )
    held = bytes_per_tensor(model)["cpu"]
    del model
    gc.collect()
    ask = Ask("transformers", method, 16.0, "bfloat16", False, None, 64, 1)
    spec = model_spec(open_checkpoint(tmp_path))
    assert sum(unit.weights for unit in units(spec, ask)) == sum(held.values()), held
