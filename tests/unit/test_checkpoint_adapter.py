import json
import os

import pytest
import torch

from orchestrator.checkpoint.adapter import LoraTarget, check_values, consumed, fingerprint, open_adapter, targets
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.errors import CheckpointError
from tests.checkpoints import Q_PROJ, adapter_tensors, model_tensors, write_adapter, write_json, write_model

A, B = f"base_model.model.{Q_PROJ}.lora_A.weight", f"base_model.model.{Q_PROJ}.lora_B.weight"


@pytest.fixture
def base(tmp_path):
    return open_checkpoint(write_model(tmp_path / "base"))


def refused(action, *faults):
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for fault in faults:
        assert fault in message
    return message


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_every_tensor_of_an_adapter_is_used_once(tmp_path, base, kind):
    modules = [Q_PROJ, "model.layers.1.mlp.gate_proj"]
    adapter = open_adapter(write_adapter(tmp_path / "lora", adapter_tensors(modules), kind=kind))
    found = targets(adapter, base)
    check_values(adapter)
    assert list(found) == [f"{module}.weight" for module in modules]
    assert consumed(found.values()) == sorted(adapter.tensors)
    target = found[f"{Q_PROJ}.weight"]
    assert isinstance(target, LoraTarget)
    assert (target.scale, target.transposed) == (2.0, False)
    assert json.dumps(fingerprint(adapter))


def test_what_is_no_adapter(tmp_path):
    refused(lambda: open_adapter(tmp_path / "none"), "no folder")
    refused(lambda: open_adapter(tmp_path), "no adapter_config.json")
    write_model(tmp_path)
    refused(lambda: open_adapter(tmp_path), "no adapter_config.json", "model.path=")
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    refused(lambda: open_adapter(tmp_path), "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{")
    refused(lambda: open_adapter(tmp_path), "adapter_config.json")


def test_a_truncated_adapter(tmp_path):
    folder = write_adapter(tmp_path)
    file = folder / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    refused(lambda: open_adapter(folder), "adapter_model.safetensors", "truncated")


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": None}, "None"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias=all"),
        ({"use_qalora": True}, "QALoRA"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.up"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"arrow_config": {"top_k": 2}}, "Arrow"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": ["x"]}, "init_lora_weights"),
        ({"a_new_feature": {"on": 1}}, "a_new_feature"),
        ({"r": 0}, "r is 0"),
        ({"r": "8"}, "r is 8"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"rank_pattern": {"(": 3}}, "pattern ("),
        ({"rank_pattern": {"x" * 2000: 3}}, "too long"),
        ({"rank_pattern": {"q": -3}}, "rank_pattern.q"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(tmp_path, config, fault):
    refused(lambda: open_adapter(write_adapter(tmp_path, config=config)), "adapter_config.json", fault)


def test_features_that_are_off_do_no_harm(tmp_path):
    off = {"use_dora": False, "lora_bias": False, "loftq_config": {}, "eva_config": None, "future": None}
    open_adapter(write_adapter(tmp_path, config=off))


@pytest.mark.parametrize(
    ("extra", "fault"),
    [
        ("model.embed_tokens.lora_embedding_A", "LoRA on an embedding"),
        (f"{Q_PROJ}.lora_magnitude_vector", "DoRA"),
        (f"{Q_PROJ}.lora_B.bias", "lora_bias"),
        ("lm_head.base_layer.weight", "base layer"),
        ("model.layers.0.mlp.experts.base_layer.lora_A.weight", "base layer"),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", "token rows"),
        (f"{Q_PROJ}.bias", "no feature"),
        (f"{Q_PROJ}.weight", "no feature"),
        (f"{Q_PROJ}.something", "no feature"),
        ("model.layers.1.self_attn.q_proj.lora_A.weight", "has no lora_B"),
        ("model.layers.1.self_attn.q_proj.lora_B.weight", "has no lora_A"),
    ],
)
def test_a_tensor_that_nothing_explains_is_refused_by_name(tmp_path, base, extra, fault):
    tensors = adapter_tensors([Q_PROJ]) | {f"base_model.model.{extra}": torch.ones(4, 32)}
    adapter = open_adapter(write_adapter(tmp_path / "lora", tensors))
    refused(lambda: targets(adapter, base), fault)


def test_a_tensor_without_peft_s_prefix(tmp_path, base):
    adapter = open_adapter(write_adapter(tmp_path / "lora", {"x.lora_A.weight": torch.ones(4, 32)}))
    refused(lambda: targets(adapter, base), "x.lora_A.weight", "base_model.model.")


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({A: torch.ones(4, 4096)}, (f"{Q_PROJ}: the adapter was trained on 4096 inputs, this model has 32", "org/")),
        ({B: torch.ones(64, 4)}, (f"{Q_PROJ}: the adapter was trained on 64 outputs, this model has 32", "org/")),
        ({A: torch.ones(8, 32)}, ("rank 8", "says 4")),
        ({B: torch.ones(32, 2)}, ("rank 2", "says 4")),
        ({A: torch.ones(128)}, ("ZeRO-3", "[128]")),
        ({A: torch.zeros(0)}, ("ZeRO-3",)),
        ({A: torch.ones(4, 32, dtype=torch.int8)}, ("I8",)),
        ({key.replace("layers.0", "layers.7"): value for key, value in adapter_tensors([Q_PROJ]).items()},
         ("model.layers.7.self_attn.q_proj.weight", "does not have", "org/base")),
    ],
)  # fmt: skip
def test_an_adapter_of_another_model_names_the_first_mismatch(tmp_path, base, change, faults):
    tensors = adapter_tensors([Q_PROJ]) | change
    config = {"base_model_name_or_path": "org/base"}
    adapter = open_adapter(write_adapter(tmp_path / "lora", tensors, config=config))
    refused(lambda: targets(adapter, base), *faults)


def test_an_adapter_that_changes_nothing(tmp_path):
    folder = write_adapter(tmp_path / "empty", {})
    refused(lambda: open_adapter(folder), "would change nothing")
    zeros = adapter_tensors([Q_PROJ]) | {B: -torch.zeros(32, 4)}
    adapter = open_adapter(write_adapter(tmp_path / "zeros", zeros))
    refused(lambda: check_values(adapter), "every lora_B is zero")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(tmp_path, dtype, value):
    tensors = {name: tensor.to(dtype) for name, tensor in adapter_tensors([Q_PROJ]).items()}
    tensors[A][3, 5] = value
    adapter = open_adapter(write_adapter(tmp_path, tensors))
    refused(lambda: check_values(adapter), A, "NaN or infinite")


def test_values_of_a_strided_bin_are_checked_too(tmp_path):
    tensors = {name: tensor.bfloat16().t().contiguous().t() for name, tensor in adapter_tensors([Q_PROJ]).items()}
    check_values(open_adapter(write_adapter(tmp_path / "good", tensors, kind="bin")))
    tensors[A][3, 5] = float("nan")
    adapter = open_adapter(write_adapter(tmp_path / "bad", tensors, kind="bin"))
    refused(lambda: check_values(adapter), A)


def test_a_quantized_base_is_refused(tmp_path):
    adapter = open_adapter(write_adapter(tmp_path / "lora"))
    config = {"quantization_config": {"quant_method": "gptq"}}
    base = open_checkpoint(write_model(tmp_path / "gptq", config=config))
    refused(lambda: targets(adapter, base), "is quantized", "16-bit")
    tensors = model_tensors() | {f"{Q_PROJ}.weight": torch.zeros(32, 32).to(torch.float8_e4m3fn)}
    base = open_checkpoint(write_model(tmp_path / "fp8", tensors))
    refused(lambda: targets(adapter, base), "F8_E4M3")


def test_modules_to_save(tmp_path, base):
    head = {"base_model.model.lm_head.weight": torch.ones(64, 32)}
    config = {"modules_to_save": ["lm_head"]}
    adapter = open_adapter(write_adapter(tmp_path / "a", adapter_tensors([Q_PROJ]) | head, config=config))
    assert set(targets(adapter, base)) == {"lm_head.weight", f"{Q_PROJ}.weight"}
    adapter = open_adapter(write_adapter(tmp_path / "b", config=config))
    refused(lambda: targets(adapter, base), "modules_to_save names lm_head")
    resized = {"base_model.model.lm_head.weight": torch.ones(65, 32)}
    adapter = open_adapter(write_adapter(tmp_path / "c", resized, config=config))
    refused(lambda: targets(adapter, base), "saved shape [65, 32]", "[64, 32]")


def test_changes_of_a_tied_head_or_embedding_are_refused(tmp_path):
    tied = {"tie_word_embeddings": True}
    base = open_checkpoint(write_model(tmp_path / "base", model_tensors(head=False), config=tied))
    embedding = {"base_model.model.model.embed_tokens.weight": torch.ones(64, 32)}
    adapter = open_adapter(write_adapter(tmp_path / "a", embedding, config={"modules_to_save": ["embed_tokens"]}))
    refused(lambda: targets(adapter, base), "model.embed_tokens.weight", "shares")
