import json
import os

import pytest
import torch

from orchestrator.checkpoint.adapter import check_values, fingerprint, open_adapter
from orchestrator.checkpoint.adapter_match import consumed, targets
from orchestrator.checkpoint.adapter_targets import BiasTarget, LoraTarget, ReplaceTarget, RowsTarget
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
    assert consumed(found) == sorted(adapter.tensors)
    (target,) = found[f"{Q_PROJ}.weight"]
    assert isinstance(target, LoraTarget)
    assert (target.scale, target.transposed) == (2.0, False)
    assert json.dumps(fingerprint(adapter))


def test_what_is_no_adapter(tmp_path):
    refused(lambda: open_adapter(tmp_path / "none"), "no folder", "Give the path of an adapter's folder")
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
        ({"peft_type": None}, "no peft_type"),
        ({"bias": "some"}, 'bias is "some"'),
        ({"use_dora": "yes"}, "use_dora"),
        ({"lora_bias": 1}, "lora_bias"),
        ({"use_qalora": True}, "QALoRA"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices is no list of row numbers"),
        ({"trainable_token_indices": {"wte": [1.0]}}, "trainable_token_indices.wte is no list of row numbers"),
        ({"trainable_token_indices": "all"}, "trainable_token_indices is no list"),
        ({"trainable_token_indices": [3, 5, 3]}, "names the row 3 twice"),
        ({"target_parameters": "experts.up"}, "target_parameters is no list of names"),
        ({"target_parameters": [""]}, "target_parameters is no list of names"),
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
        ({"r": "8"}, 'r is "8", not a positive whole number'),
        ({"lora_alpha": "16"}, 'lora_alpha is "16", not a number'),
        ({"lora_alpha": 0}, "lora_alpha is 0: the adapter would change nothing"),
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
        (f"{Q_PROJ}.bias", "no feature"),
        (f"{Q_PROJ}.weight", "no feature"),
        (f"{Q_PROJ}.something", "no feature"),
        (f"{Q_PROJ}.base_layer.weight", "no feature"),
        (f"{Q_PROJ}.base_layer.bias", "no feature"),
        (f"{Q_PROJ}.modules_to_save.weight", "no feature"),
        (f"{Q_PROJ}.original_module.weight", "no feature"),
        ("model.layers.1.self_attn.q_proj.lora_A.weight", "has no lora_B"),
        ("model.layers.1.self_attn.q_proj.lora_B.weight", "has no lora_A"),
        ("model.embed_tokens.lora_embedding_A", "has no lora_embedding_B"),
        (f"{Q_PROJ}.lora_embedding_A", "has no lora_embedding_B"),
        (f"{Q_PROJ}.lora_magnitude_vector", "adapter_config.json does not ask for it"),
        (f"{Q_PROJ}.lora_B.bias", "adapter_config.json does not ask for it"),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", "trainable_token_indices has no list for"),
        ("model.layers.0.mlp.experts.lora_A.weight", "has no lora_B"),
        ("model.layers.0.mlp.experts.base_layer.lora_A.weight", "target_parameters is not understood"),
    ],
)
def test_a_tensor_that_nothing_explains_is_refused_by_name(tmp_path, base, extra, fault):
    tensors = adapter_tensors([Q_PROJ]) | {f"base_model.model.{extra}": torch.ones(4, 32)}
    adapter = open_adapter(write_adapter(tmp_path / "lora", tensors))
    message = refused(lambda: targets(adapter, base), fault)
    assert extra.rpartition(".lora")[0] in message


@pytest.mark.parametrize(
    ("config", "missing"),
    [({"use_dora": True}, "lora_magnitude_vector"), ({"lora_bias": True}, "lora_B.bias")],
)
def test_a_part_that_the_config_promises_is_missed_by_name(tmp_path, base, config, missing):
    adapter = open_adapter(write_adapter(tmp_path / "lora", config=config))
    refused(lambda: targets(adapter, base), f"{Q_PROJ} has no {missing}", "saved incompletely")


def test_a_magnitude_under_either_of_its_names_but_not_both(tmp_path, base):
    plain, dora = adapter_tensors([Q_PROJ]), {"use_dora": True}
    stem = f"base_model.model.{Q_PROJ}.lora_magnitude_vector"
    for number, name in enumerate((stem, f"{stem}.weight")):
        folder = write_adapter(tmp_path / str(number), plain | {name: torch.ones(32)}, config=dora)
        adapter = open_adapter(folder)
        found = targets(adapter, base)
        assert found[f"{Q_PROJ}.weight"][0].magnitude.name == name
        assert consumed(found) == sorted(adapter.tensors)
    twice = plain | {stem: torch.ones(32), f"{stem}.weight": torch.ones(32)}
    adapter = open_adapter(write_adapter(tmp_path / "twice", twice, config=dora))
    refused(lambda: targets(adapter, base), stem, "the same part")
    adapter = open_adapter(write_adapter(tmp_path / "short", plain | {stem: torch.ones(31)}, config=dora))
    refused(lambda: targets(adapter, base), stem, "[31]", "[32]")


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
        ({A: torch.ones(4, 32, 3, 3)}, (A, "convolution", "PEFT")),
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


@pytest.mark.parametrize("base_name", [None, "", "org/base"])
def test_the_base_that_it_was_trained_on_is_asked_for(tmp_path, base, base_name):
    tensors = adapter_tensors([Q_PROJ]) | {A: torch.ones(4, 4096)}
    adapter = open_adapter(write_adapter(tmp_path, tensors, config={"base_model_name_or_path": base_name}))
    wanted = (
        f"It was trained on {base_name}. Give that model as model.path=..."
        if base_name
        else "Give the model that it was trained on as model.path=..."
    )
    assert refused(lambda: targets(adapter, base)).endswith(f"this model has 32. {wanted}")


@pytest.mark.parametrize(
    "more",
    [{"alpha_pattern": {"q_proj": 8}}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}],
)
def test_an_alpha_of_zero_is_taken_where_something_else_is_trained(tmp_path, more):
    open_adapter(write_adapter(tmp_path, config={"lora_alpha": 0, **more}))


@pytest.mark.parametrize(
    "part",
    [
        "lora_A.default.weight",
        "lora_B.my_adapter.bias",
        "lora_embedding_A.default",
        "lora_magnitude_vector.default",
        "lora_magnitude_vector.default.weight",
    ],
)
def test_a_raw_state_dict_is_refused_with_what_to_do(tmp_path, base, part):
    names = ("lm_head.weight", f"{Q_PROJ}.base_layer.weight", f"{Q_PROJ}.{part}")
    for prefix in ("base_model.model.", ""):
        tensors = {f"{prefix}{name}": torch.ones(4, 32) for name in names}
        adapter = open_adapter(write_adapter(tmp_path / (prefix or "bare"), tensors))
        refused(lambda adapter=adapter: targets(adapter, base), f"{prefix}{names[2]}", "save_pretrained")


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
    base = open_checkpoint(write_model(tmp_path / "nested", config={"text_config": config}))
    refused(lambda: targets(adapter, base), "is quantized", "16-bit")
    tensors = model_tensors() | {f"{Q_PROJ}.weight": torch.zeros(32, 32).to(torch.float8_e4m3fn)}
    base = open_checkpoint(write_model(tmp_path / "fp8", tensors))
    refused(lambda: targets(adapter, base), "F8_E4M3")


def test_modules_to_save(tmp_path, base):
    head = {"base_model.model.lm_head.weight": torch.ones(64, 32)}
    config = {"modules_to_save": ["lm_head"]}
    adapter = open_adapter(write_adapter(tmp_path / "a", adapter_tensors([Q_PROJ]) | head, config=config))
    found = targets(adapter, base)
    assert set(found) == {"lm_head.weight", f"{Q_PROJ}.weight"}
    assert isinstance(found["lm_head.weight"][0], ReplaceTarget)
    adapter = open_adapter(write_adapter(tmp_path / "b", config=config))
    refused(lambda: targets(adapter, base), "modules_to_save names lm_head")
    narrow = {"base_model.model.lm_head.weight": torch.ones(64, 31)}
    adapter = open_adapter(write_adapter(tmp_path / "c", narrow, config=config))
    refused(lambda: targets(adapter, base), "saved shape [64, 31]", "[64, 32]")
    flat = {"base_model.model.lm_head.weight": torch.ones(64)}
    adapter = open_adapter(write_adapter(tmp_path / "d", flat, config=config))
    refused(lambda: targets(adapter, base), "saved shape [64]", "[64, 32]")
    norm = {"base_model.model.model.norm.weight": torch.ones(33)}
    adapter = open_adapter(write_adapter(tmp_path / "e", norm, config={"modules_to_save": ["model.norm"]}))
    refused(lambda: targets(adapter, base), "model.norm.weight", "[33]", "[32]")


def test_the_copies_of_a_saved_module_are_one(tmp_path, base):
    stem, value = "base_model.model.lm_head", torch.ones(64, 32)
    names = (f"{stem}.weight", f"{stem}.modules_to_save.weight", f"{stem}.original_module.weight")
    config = {"modules_to_save": ["lm_head"]}
    tensors = adapter_tensors([Q_PROJ]) | {name: value * (number != 2) for number, name in enumerate(names)}
    adapter = open_adapter(write_adapter(tmp_path / "a", tensors, config=config))
    assert targets(adapter, base)["lm_head.weight"][0].value.name == names[0]
    check_values(adapter)
    adapter = open_adapter(write_adapter(tmp_path / "b", tensors | {names[1]: value * 2}, config=config))
    refused(lambda: check_values(adapter), names[0], names[1], "differ")
    del tensors[names[0]]
    adapter = open_adapter(write_adapter(tmp_path / "c", tensors, config=config))
    assert targets(adapter, base)["lm_head.weight"][0].value.name == names[1]


EMBEDDING, DELTA = "model.embed_tokens", "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("indices", "shape", "faults"),
    [
        ([3, 64], (2, 32), (DELTA, "token 64", "64 rows")),
        ([3, 2**70], (2, 32), (DELTA, f"token {2**70}")),
        ([3], (2, 32), (DELTA, "[2, 32]", "[1, 32]")),
        ([3, 4], (2, 31), (DELTA, "[2, 31]", "[2, 32]")),
        ({"lm_head": [3, 4]}, (2, 32), (DELTA, "has no list for model.embed_tokens")),
        ({"embed_tokens": [3, 4], "model.embed_tokens": [5, 6]}, (2, 32), (DELTA, "several lists")),
    ],
)
def test_token_rows_that_do_not_fit(tmp_path, base, indices, shape, faults):
    config = {"trainable_token_indices": indices}
    adapter = open_adapter(write_adapter(tmp_path / "lora", {DELTA: torch.ones(shape)}, config=config))
    refused(lambda: targets(adapter, base), *faults)


def test_token_rows(tmp_path, base):
    config = {"trainable_token_indices": {"embed_tokens": [5, 3]}}
    adapter = open_adapter(write_adapter(tmp_path / "lora", {DELTA: torch.ones(2, 32)}, config=config))
    (target,) = targets(adapter, base)[f"{EMBEDDING}.weight"]
    assert isinstance(target, RowsTarget)
    assert target.rows == (5, 3)


@pytest.mark.parametrize(
    ("indices", "said"),
    [
        ([5, 3], "2 rows of the embedding"),
        ({"embed_tokens": [5]}, "1 row of embed_tokens"),
        ({"embed_tokens": [5], "lm_head": [3, 4]}, "1 row of embed_tokens"),
    ],
)
def test_token_rows_that_were_lost(tmp_path, base, indices, said):
    config = {"trainable_token_indices": indices}
    adapter = open_adapter(write_adapter(tmp_path / "lora", adapter_tensors([Q_PROJ]), config=config))
    refused(lambda: targets(adapter, base), f"trainable_token_indices names {said}", "holds none", "saved incompletely")


@pytest.mark.parametrize(("tied", "head"), [(False, [5, 3]), (True, [5])])
def test_token_rows_of_the_head_that_were_lost(tmp_path, tied, head):
    tensors = {DELTA: torch.ones(2, 32)}
    config = {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": head}}
    adapter = open_adapter(write_adapter(tmp_path / "lora", tensors, config=config))
    model = open_checkpoint(write_model(tmp_path / "model", config={"tie_word_embeddings": tied}))
    refused(lambda: targets(adapter, model), "rows of lm_head" if len(head) > 1 else "1 row of lm_head")


def test_no_token_rows_are_none_that_were_lost(tmp_path, base):
    config = {"trainable_token_indices": {"embed_tokens": []}}
    adapter = open_adapter(write_adapter(tmp_path / "lora", adapter_tensors([Q_PROJ]), config=config))
    assert list(targets(adapter, base)) == [f"{Q_PROJ}.weight"]


def test_a_bias_needs_a_bias_of_the_base(tmp_path, base):
    bias = f"base_model.model.{Q_PROJ}.lora_B.bias"
    tensors, config = adapter_tensors([Q_PROJ]) | {bias: torch.ones(32)}, {"lora_bias": True}
    adapter = open_adapter(write_adapter(tmp_path / "lora", tensors, config=config))
    refused(lambda: targets(adapter, base), bias, f"{Q_PROJ}.bias", "lora_bias=False")
    with_bias = model_tensors() | {f"{Q_PROJ}.bias": torch.ones(32)}
    found = targets(adapter, open_checkpoint(write_model(tmp_path / "biased", with_bias)))
    assert isinstance(found[f"{Q_PROJ}.bias"][0], BiasTarget)
    with_bias[f"{Q_PROJ}.bias"] = torch.ones(33)
    other = open_checkpoint(write_model(tmp_path / "other", with_bias))
    refused(lambda: targets(adapter, other), bias, "[32]", "[33]")


def test_an_embedding_of_another_size(tmp_path, base):
    config = {"target_modules": ["embed_tokens"]}
    stem = f"base_model.model.{EMBEDDING}.lora_embedding_"
    for number, (a, b, fault) in enumerate(
        [((4, 65), (32, 4), "65 inputs, this model has 64"), ((4, 64), (31, 4), "31 outputs, this model has 32")]
    ):
        tensors = {f"{stem}A": torch.ones(a), f"{stem}B": torch.ones(b)}
        adapter = open_adapter(write_adapter(tmp_path / str(number), tensors, config=config))
        refused(lambda adapter=adapter: targets(adapter, base), EMBEDDING, fault)


def test_attention_of_torch_s_own_is_refused(tmp_path):
    base = open_checkpoint(
        write_model(tmp_path / "base", model_tensors() | {"attn.in_proj_weight": torch.ones(96, 32)})
    )
    tensors = {"base_model.model.attn.lora_A.weight": torch.ones(4, 32)}
    tensors["base_model.model.attn.lora_B.weight"] = torch.ones(96, 4)
    adapter = open_adapter(write_adapter(tmp_path / "lora", tensors))
    refused(lambda: targets(adapter, base), "MultiheadAttention", "PEFT")


def test_a_name_that_may_be_two_is_refused(tmp_path):
    twice = model_tensors() | {
        name.replace("model.", "model.text_model.", 1): tensor for name, tensor in model_tensors().items()
    }
    base = open_checkpoint(write_model(tmp_path / "base", twice))
    adapter = open_adapter(write_adapter(tmp_path / "exact"))
    assert set(targets(adapter, base)) == {f"{Q_PROJ}.weight"}
    moved = {
        name.replace("model.layers", "model.language_model.layers"): t for name, t in adapter_tensors([Q_PROJ]).items()
    }
    adapter = open_adapter(write_adapter(tmp_path / "lora", moved))
    refused(lambda: targets(adapter, base), "may be", f"{Q_PROJ}.weight", "model.text_model.layers")


def test_two_names_of_one_tensor_are_refused(tmp_path, base):
    moved = {
        name.replace("model.layers", "model.language_model.layers"): tensor
        for name, tensor in adapter_tensors([Q_PROJ]).items()
    }
    assert set(targets(open_adapter(write_adapter(tmp_path / "one", moved)), base)) == {f"{Q_PROJ}.weight"}
    adapter = open_adapter(write_adapter(tmp_path / "two", adapter_tensors([Q_PROJ]) | moved))
    refused(lambda: targets(adapter, base), "two adapter tensors", f"{Q_PROJ}.weight")


STACKS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
EXPERTS = "model.layers.0.mlp.experts"


def expert_base(folder, **changed):
    shapes = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}
    linears = {f"{EXPERTS}.{e}.{name}.weight": torch.ones(shape) for e in range(3) for name, shape in shapes.items()}
    return open_checkpoint(write_model(folder, model_tensors() | linears | changed))


def expert_lora(folder, a=(12, 32), b=(48, 12), config=STACKS, **more):
    tensors = {"base_layer.lora_A.weight": a, "base_layer.lora_B.weight": b}
    tensors |= {"lora_A.weight": (12, 24), "lora_B.weight": (32, 12)} | more
    named = {f"base_model.model.{EXPERTS}.{name}": torch.ones(shape) for name, shape in tensors.items()}
    return open_adapter(write_adapter(folder, named, config=config))


def test_experts_one_by_one(tmp_path):
    found = targets(expert_lora(tmp_path / "lora"), expert_base(tmp_path / "base"))
    assert len(found) == 9
    (up,) = found[f"{EXPERTS}.2.up_proj.weight"]
    assert (up.a.shape, up.b.shape) == ((4, 32), (24, 4))


@pytest.mark.parametrize(
    ("lora", "base", "faults"),
    [
        ({"a": (8, 32)}, {}, ("gate_up_proj", "8 rows", "3 experts make 12")),
        ({"a": (12, 31)}, {}, ("31", "[24, 32]")),
        ({"b": (50, 12)}, {}, ("[50, 32]", "[24, 32]")),
        ({"b": (40, 12)}, {}, ("[40, 32]", "[24, 32]")),
        ({}, {f"{EXPERTS}.1.down_proj.weight": torch.ones(32, 25)}, ("experts.1.down_proj", "[32, 25]")),
        ({}, {f"{EXPERTS}.gate_up_proj": torch.ones(3, 32)}, ("gate_up_proj", "2 dimensions")),
        ({}, {f"{EXPERTS}.gate_up_proj": torch.ones(3, 47, 32)}, ("[48, 32]", "[47, 32]")),
        ({"lora_B.bias": (32,)}, {}, ("no feature", "lora_B.bias")),
        ({"base_layer.base_layer.lora_A.weight": (4, 32)}, {}, ("target_parameters",)),
        ({"config": {"target_parameters": ["experts.gate_up_proj_bias", "down_proj"]}}, {}, ("gate_up_proj_bias",)),
    ],
)  # fmt: skip
def test_experts_that_do_not_fit(tmp_path, lora, base, faults):
    adapter, there = expert_lora(tmp_path / "lora", **lora), expert_base(tmp_path / "base", **base)
    refused(lambda: targets(adapter, there), *faults)


def test_experts_that_are_not_there(tmp_path, base):
    refused(lambda: targets(expert_lora(tmp_path / "lora"), base), "gate_up_proj", "neither stacked nor one")
