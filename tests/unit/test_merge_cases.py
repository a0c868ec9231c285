"""Every kind of LoRA that PEFT trains on a language model, against PEFT's own merge_and_unload."""

import json
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
)

from orchestrator.checkpoint.adapter import fingerprint, open_adapter
from orchestrator.checkpoint.adapter_match import targets
from orchestrator.checkpoint.architectures import layout_of, text_config
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.reader import read_tensor
from orchestrator.checkpoint.spec import model_spec
from orchestrator.errors import CheckpointError
from orchestrator.stages.change import Change
from orchestrator.stages.merge import merge
from orchestrator.stages.merge_plan import plan_merge
from orchestrator.stages.merged import merged_checkpoint, merged_tokenizer
from tests.checkpoints import Q_PROJ, adapter_tensors, model_tensors, save, write_adapter, write_json, write_model

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": None,
}
EXPERTS = {
    "num_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "head_dim": 8,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)),
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(text_config=LlamaConfig(**SIZES), vision_config=CLIPVisionConfig(**VISION), image_token_index=39)
    ),
    "gemma3": lambda: Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**SIZES, "head_dim": 8, "pad_token_id": 0},
            vision_config=SiglipVisionConfig(**VISION).to_dict(),
            mm_tokens_per_image=1,
        )
    ),
    "qwen2_vl": lambda: Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={**SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        )
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**{**SIZES, "intermediate_size": 32, "num_local_experts": 3, "head_dim": 8})
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """name of MODELS -> its folder, made once."""
    made = {}

    def base(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp(name)
            model = MODELS[name]()
            for parameter in model.parameters():
                parameter.data.normal_(0, 0.1)
            model.save_pretrained(made[name])
        return made[name]

    return base


def load(base, rows=None):
    made_as = getattr(transformers, config_of(base)["architectures"][0])
    model = made_as.from_pretrained(base, dtype=torch.float32)
    if rows:
        torch.manual_seed(1)
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def train(base, folder, seed=0, rows=None, **options):
    """An adapter of PEFT's with random values, saved; the model as PEFT merges it."""
    model = peft.get_peft_model(load(base, rows), LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(seed + 2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(load(base, rows), folder).merge_and_unload()


def run(base, adapters, out, dtype=None):
    pairs = [pair if isinstance(pair, tuple) else (pair, 1.0) for pair in adapters]
    opened = [(open_adapter(path), weight) for path, weight in pairs]
    return merge(open_checkpoint(base), opened, out, dtype=dtype, shard_size=2**30, progress=lambda *_: None)


def weights(folder):
    """What a folder holds; a nested model's head under one of the two names that transformers reads."""
    found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {name.replace("language_model.lm_head.", "lm_head."): tensor for name, tensor in found.items()}


def saved(model, folder):
    """What a model's own save_pretrained writes: names as on the disk, tied tensors once."""
    model.save_pretrained(folder)
    return weights(folder)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def refused(action, *faults):
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for fault in faults:
        assert fault in message


PEFT = "base_model.model"
EMBEDDING = f"{PEFT}.model.embed_tokens"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
Q = {"r": 4, "target_modules": ["q_proj"]}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

CASES = {
    "plain": ("llama", {"r": 4, "lora_alpha": 16, "target_modules": LINEARS}),
    "rslora": ("llama", {"r": 8, "lora_alpha": 3, "target_modules": LINEARS, "use_rslora": True}),
    "patterns": ("llama", {"target_modules": LINEARS, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"mlp.*": 5}}),
    "conv1d": ("gpt2", {"r": 2, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d, rslora": ("gpt2", {"r": 2, "target_modules": ["c_proj", "c_attn"], "use_rslora": True}),
    "dora": ("llama", {"r": 4, "target_modules": LINEARS, "use_dora": True}),
    "dora and rslora": ("qwen2", {"r": 4, "target_modules": ATTENTION, "use_dora": True, "use_rslora": True}),
    "dora on conv1d": ("gpt2", {"r": 2, "target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "dora on an embedding": ("llama", {"r": 4, "target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "lora_bias": ("qwen2", {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_bias": True, "lora_alpha": 3}),
    "bias=all": ("qwen2", {**Q, "bias": "all"}),
    "bias=all and a saved module": ("qwen2", {**Q, "bias": "all", "modules_to_save": ["k_proj"]}),
    "bias=lora_only": ("qwen2", {"r": 4, "target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "embedding": ("llama", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": ("llama", {"r": 4, "target_modules": ["embed_tokens", "lm_head"]}),
    "saved norms": ("llama", {**Q, "modules_to_save": ["norm"]}),
    "saved modules of several tensors": ("qwen2", {**Q, "modules_to_save": ["mlp"]}),
    "saved embedding and head": ("llama", {**Q, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "token rows": ("llama", {**Q, "trainable_token_indices": [7, 3, 39]}),
    "token rows of both": ("llama", {**Q, "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [5]}}),
    "stacked experts": ("gpt_oss", {**Q, "target_parameters": STACKS}),
    "one stack": ("gpt_oss", {**Q, "target_parameters": ["mlp.experts.down_proj"]}),
    "experts one by one": ("qwen3_moe", {**Q, "target_parameters": STACKS, "rank_pattern": {"experts.down_proj": 3}}),
    "gates and ups only": ("qwen3_moe", {**Q, "target_parameters": STACKS[:1], "lora_alpha": 3}),
    "mixtral": ("mixtral", {**Q, "target_parameters": STACKS, "use_rslora": True}),
    "mixtral's old names": ("mixtral", {"r": 4, "target_modules": ["w1", "w2", "w3", "gate"]}),
    "a router": ("qwen3_moe", {"r": 2, "target_modules": ["gate", "q_proj"], "rank_pattern": {"gate.weight": 3}}),
    "fused names": ("phi3", {"r": 4, "target_modules": ["qkv_proj", "gate_up_proj"]}),
    "tied token rows": ("tied", {**Q, "trainable_token_indices": [7, 3]}),
    "tied, token rows of both": ("tied", {**Q, "trainable_token_indices": {"embed_tokens": [7], "lm_head": [7]}}),
    "tied, saved embedding": ("tied", {**Q, "modules_to_save": ["embed_tokens"]}),
    "tied, saved head": ("tied", {**Q, "modules_to_save": ["lm_head"]}),
    "tied, saved both": ("tied", {**Q, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "tied, saved as one": ("tied", {**Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "nested": ("llava", {"r": 4, "target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "nested, all of it": ("llava", {"r": 4, "target_modules": ["q_proj", "linear_1", "fc1"]}),
    "nested, flat on the disk": ("qwen2_vl", {"r": 4, "target_modules": ["q_proj", "qkv", "fc1"], "use_dora": True}),
    "nested, a saved head": ("llava", {**Q, "modules_to_save": ["lm_head"]}),
    "nested, tied": ("gemma3", {"r": 4, "target_modules": ["q_proj"]}),
    "nested, tied, a saved head": ("gemma3", {**Q, "modules_to_save": ["lm_head"]}),
    "nested, resized": ("llava", {**Q, "rows": 44, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "nested, tied, resized": ("gemma3", {**Q, "rows": 44, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "resized": ("llama", {**Q, "rows": 44}),
    "resized, fewer": ("llama", {**Q, "rows": 36}),
    "resized and saved": ("llama", {**Q, "rows": 44, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "resized, both targeted": ("llama", {"r": 4, "target_modules": ["embed_tokens", "lm_head"], "rows": 44}),
    "resized, token rows": ("llama", {**Q, "rows": 44, "trainable_token_indices": [43, 3]}),
    "resized and tied": ("tied", {**Q, "rows": 44}),
    "resized and tied, token rows": ("tied", {**Q, "rows": 44, "trainable_token_indices": [43, 3]}),
    "resized and tied, saved": ("tied", {**Q, "rows": 44, "modules_to_save": ["embed_tokens", "lm_head"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_peft_merges(tmp_path, bases, case):
    name, options = CASES[case]
    model = train(bases(name), tmp_path / "lora", **options)
    wanted = saved(model, tmp_path / "peft")
    report = run(bases(name), [tmp_path / "lora"], tmp_path / "out")
    found = weights(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")
        for kind in (torch.bfloat16, torch.float16):
            assert torch.equal(found[key].to(kind), tensor.to(kind)), key
    config, theirs = config_of(tmp_path / "out"), config_of(tmp_path / "peft")
    assert config["tie_word_embeddings"] == theirs["tie_word_embeddings"]
    assert text_config(config)["vocab_size"] == text_config(theirs)["vocab_size"]
    used = {name for module in report["modules"] for name in module["used"]}
    spare = {name for name in open_adapter(tmp_path / "lora").tensors if "original_module" in name}
    assert {name for name in open_adapter(tmp_path / "lora").tensors if "modules_to_save" not in name} == used | spare
    written = sum(tensor.nbytes for tensor in found.values())
    assert (
        merged_checkpoint(open_checkpoint(bases(name)), [(open_adapter(tmp_path / "lora"), 1.0)], None).nbytes
        == written
    )
    planned_as_written(bases(name), [tmp_path / "lora"], tmp_path / "out")


def planned_as_written(base, adapters, out, dtype=None):
    """What headers said of a merge is what it wrote: every tensor, and with them the model that a plan is of."""
    planned = merged_checkpoint(open_checkpoint(base), [(open_adapter(path), 1.0) for path in adapters], dtype)
    there = open_checkpoint(out)
    assert [(t.name, t.dtype, t.shape, t.nbytes) for t in planned.tensors.values()] == [
        (t.name, t.dtype, t.shape, t.nbytes) for t in there.tensors.values()
    ]
    if layout_of(there.config) is not None:
        expected, found = (vars(model_spec(model)) | {"notes": ()} for model in (planned, there))
        assert expected == found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", ["plain", "resized", "tied, saved head"])
def test_a_plan_is_of_what_is_written_as_another_type_too(tmp_path, bases, case, dtype):
    name, options = CASES[case]
    train(bases(name), tmp_path / "lora", **options)
    run(bases(name), [tmp_path / "lora"], tmp_path / "out", dtype)
    planned_as_written(bases(name), [tmp_path / "lora"], tmp_path / "out", dtype)


@pytest.mark.parametrize(("case", "more"), [("resized and tied", True), ("plain", False), ("resized", False)])
def test_what_only_a_hub_has_is_planned_by_its_headers(tmp_path, bases, case, more):
    name, options = CASES[case]
    train(bases(name), tmp_path / "lora", **options)
    base, lora = open_checkpoint(bases(name)), open_adapter(tmp_path / "lora")
    there = {key: replace(info, file=tmp_path / "hub" / info.file.name) for key, info in lora.tensors.items()}
    size, exact = (
        merged_checkpoint(base, [(found, 1.0)], None).nbytes for found in (replace(lora, tensors=there), lora)
    )
    assert (size > exact) == more  # whether a head that is saved too is its embedding cannot be seen: both count
    assert size >= exact


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[1, 2, 3, 7, 39]])).logits


@pytest.mark.parametrize(
    "targeted", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"], ["q_proj", "lm_head"]], ids="+".join
)
@pytest.mark.parametrize("name", ["tied", "gemma3"])
def test_a_lora_on_one_of_two_that_are_tied_is_that_one_s_alone(tmp_path, bases, name, targeted):
    # In training it was. PEFT's merge adds it to the tensor that both share, so PEFT's unmerged model is the measure.
    train(bases(name), tmp_path / "lora", r=4, target_modules=targeted)
    trained = PeftModel.from_pretrained(load(bases(name)), tmp_path / "lora")
    report = run(bases(name), [tmp_path / "lora"], tmp_path / "out")
    assert any("tie_word_embeddings=false" in note for note in report["notes"])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(trained), rtol=1e-4, atol=1e-5)
    planned_as_written(bases(name), [tmp_path / "lora"], tmp_path / "out")


@pytest.mark.parametrize(
    "edit",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.q_proj"},
        {"exclude_modules": ["v_proj"]},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
    ],
    ids=str,
)
def test_a_config_that_does_not_ask_for_what_is_there_is_refused(tmp_path, bases, edit):
    train(bases("llama"), tmp_path / "lora", r=4, target_modules=["q_proj", "v_proj"])
    file = tmp_path / "lora" / "adapter_config.json"
    config = json.loads(file.read_text())
    write_json(file, config | edit)
    refused(lambda: run(bases("llama"), [tmp_path / "lora"], tmp_path / "out"), "does not ask for one there")
    write_json(file, config | {"target_modules": "all-linear"})
    run(bases("llama"), [tmp_path / "lora"], tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*layers\.0.*(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
    ],
    ids=str,
)
def test_configs_that_narrow_their_targets_merge(tmp_path, bases, options):
    train(bases("llama"), tmp_path / "lora", r=4, **options)
    report = run(bases("llama"), [tmp_path / "lora"], tmp_path / "out")
    assert 0 < len(report["modules"]) < 7


def test_a_lora_that_a_tied_head_shares_keeps_the_tie(tmp_path, bases):
    options = {"r": 4, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    train(bases("tied"), tmp_path / "lora", **options)
    trained = PeftModel.from_pretrained(load(bases("tied")), tmp_path / "lora")
    run(bases("tied"), [tmp_path / "lora"], tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in weights(tmp_path / "out")
    planned_as_written(bases("tied"), [tmp_path / "lora"], tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(trained), rtol=1e-4, atol=1e-5)


def test_shared_rows_and_a_head_of_its_own_have_no_meaning(tmp_path, bases):
    model = peft.get_peft_model(
        load(bases("tied")), LoraConfig(r=4, target_modules=["lm_head"], trainable_token_indices=[3])
    )
    for parameter in model.parameters():
        parameter.data += 0.1
    model.save_pretrained(tmp_path / "lora")
    refused(lambda: run(bases("tied"), [tmp_path / "lora"], tmp_path / "out"), "lm_head.weight", "not defined")


def test_a_tied_head_that_is_stored_all_the_same(tmp_path):
    double = model_tensors()
    double["lm_head.weight"] = double["model.embed_tokens.weight"].clone()
    base = write_model(tmp_path / "base", double, config={"tie_word_embeddings": True})
    rows = {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": torch.ones(1, 32)}
    lora = write_adapter(tmp_path / "rows", rows, config={"trainable_token_indices": [5]})
    assert run(base, [lora], tmp_path / "kept")["dropped"] == ["lm_head.weight"]
    head = {f"{PEFT}.lm_head.weight": torch.ones(64, 32)}
    lora = write_adapter(tmp_path / "head", head, config={"modules_to_save": ["lm_head"]})
    assert run(base, [lora], tmp_path / "apart")["dropped"] == []
    found = weights(tmp_path / "apart")
    assert torch.equal(found["lm_head.weight"], head[f"{PEFT}.lm_head.weight"])
    assert torch.equal(found["model.embed_tokens.weight"], double["model.embed_tokens.weight"])


# --- several adapters -------------------------------------------------------------------------------------------


def test_several_adapters_at_once(tmp_path, bases):
    base = bases("llama")
    train(base, tmp_path / "a", r=4, target_modules=LINEARS)
    train(base, tmp_path / "b", seed=7, r=2, target_modules=["q_proj", "embed_tokens"], use_rslora=True)
    model = PeftModel.from_pretrained(load(base), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    wanted = model.merge_and_unload(adapter_names=["a", "b"]).state_dict()
    refused(lambda: run(base, [tmp_path / "a", (tmp_path / "b", 0.5)], tmp_path / "x"), "embed_tokens", "0.5")
    run(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, wanted[name]), name


def special(folder, kind):
    """An adapter of which nothing can be scaled, or added up with another's."""
    if kind == "dora":
        tensors = adapter_tensors([Q_PROJ]) | {f"{PEFT}.{Q_PROJ}.lora_magnitude_vector": torch.ones(32)}
        return write_adapter(folder, tensors, config={"use_dora": True})
    if kind == "rows":
        tensors = {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": torch.ones(2, 32)}
        return write_adapter(folder, tensors, config={"trainable_token_indices": [9, 4]})
    if kind == "bias":
        tensors = adapter_tensors([Q_PROJ]) | {f"{PEFT}.{Q_PROJ}.base_layer.bias": torch.ones(32)}
        return write_adapter(folder, tensors, config={"bias": "lora_only"})
    tensors = {f"{EMBEDDING}.weight": torch.ones(64, 32)}
    return write_adapter(folder, tensors, config={"modules_to_save": ["embed_tokens"]})


@pytest.mark.parametrize(
    ("kind", "tensor", "what"),
    [
        ("dora", f"{Q_PROJ}.weight", "scales (DoRA)"),
        ("rows", "model.embed_tokens.weight", "replaces rows of"),
        ("bias", f"{Q_PROJ}.bias", "replaces"),
        ("saved", "model.embed_tokens.weight", "replaces"),
    ],
)
def test_what_is_no_sum_is_neither_weighted_nor_shared(tmp_path, kind, tensor, what):
    base = write_model(tmp_path / "base", model_tensors() | {f"{Q_PROJ}.bias": torch.zeros(32)})
    one = special(tmp_path / "one", kind)
    refused(lambda: run(base, [(one, 0.5)], tmp_path / "out"), str(one), what, tensor, "0.5", "weight 1")
    refused(lambda: run(base, [one, one], tmp_path / "out"), what, tensor, "another")
    plain = write_adapter(tmp_path / "plain", adapter_tensors(["model.layers.1.self_attn.q_proj"]))
    run(base, [one, (plain, 0.5)], tmp_path / "out")
    if kind == "dora":
        other = write_adapter(tmp_path / "other")
        refused(lambda: run(base, [other, one], tmp_path / "no"), what, tensor, "another")
        refused(lambda: run(base, [one, (other, 2.0)], tmp_path / "no"), what, tensor, "another")


# --- vocabularies and their tokenizers --------------------------------------------------------------------------


def tokenizer(folder, tokens, added=0):
    vocabulary = {f"t{number}": number for number in range(tokens)}
    extra = [{"id": tokens + number, "content": f"<{number}>"} for number in range(added)]
    write_json(folder / "tokenizer.json", {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": extra})
    write_json(folder / "tokenizer_config.json", {"of": str(folder)})


@pytest.fixture
def grown(tmp_path):
    """A bfloat16 base of 64 tokens, and an adapter that saved 66 rows and its own tokenizer."""
    base = write_model(tmp_path / "base", model_tensors(dtype=torch.bfloat16))
    tokenizer(base, 64)
    (base / "tokenizer.model").write_bytes(b"the base's")
    saved = {f"{EMBEDDING}.weight": torch.randn(66, 32), f"{PEFT}.lm_head.weight": torch.randn(66, 32)}
    lora = write_adapter(tmp_path / "lora", saved, config={"modules_to_save": ["embed_tokens", "lm_head"]})
    tokenizer(lora, 64, added=2)
    return base, lora


def test_a_resized_vocabulary_comes_with_the_adapter_s_tokenizer(tmp_path, grown):
    base, lora = grown
    before = fingerprint(open_adapter(lora))
    report = run(base, [lora], tmp_path / "out")
    found = weights(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found[name], load_file(lora / "adapter_model.safetensors")[f"{PEFT}.{name}"].bfloat16())
    assert config_of(tmp_path / "out")["vocab_size"] == 66
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (lora / name).read_bytes()
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert set(report["carried"]) == {file.name for file in (tmp_path / "out").iterdir()} - {
        "model.safetensors",
        "merge-report.json",
    }
    assert any("66 rows" in note for note in report["notes"])
    assert any("adapter's" in note and str(lora) in note for note in report["notes"])
    assert merged_tokenizer(open_checkpoint(base), [(open_adapter(lora), 1.0)]) == lora
    planned_as_written(base, [lora], tmp_path / "out")
    tokenizer(lora, 64, added=1)
    assert fingerprint(open_adapter(lora)) != before


def test_more_tokens_than_rows_are_refused_with_both_numbers(tmp_path, grown):
    base, lora = grown
    tokenizer(lora, 64, added=3)
    refused(lambda: run(base, [lora], tmp_path / "out"), str(lora), "67 tokens", "66 rows")
    (lora / "tokenizer.json").unlink()
    report = run(base, [lora], tmp_path / "out")
    assert any("no tokenizer of its own" in note for note in report["notes"])
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"the base's"
    tokenizer(base, 67)
    refused(lambda: run(base, [lora], tmp_path / "no"), str(base), "67 tokens", "66 rows")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "tokenizer.json"),
        ('{"model": {"vocab": {"a": -1}}}', "the number -1"),
        ('{"model": {"vocab": {"a": "x"}}}', "the number x"),
        ('{"model": {"vocab": {"a": 1e9}}}', "the number 1"),
        ('{"model": {"vocab": [["a", 0]]}, "added_tokens": [{"id": 99}]}', "100 tokens"),
    ],
)
def test_a_tokenizer_that_is_damaged_is_named(tmp_path, grown, content, fault):
    base, lora = grown
    (lora / "tokenizer.json").write_text(content)
    refused(lambda: run(base, [lora], tmp_path / "out"), str(lora), fault)


@pytest.mark.parametrize("kept_in", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("known", [None, "other", "same"])
def test_a_chat_template_that_was_trained_with_comes_with_its_tokenizer(tmp_path, kept_in, known):
    base, lora = write_model(tmp_path / "base"), write_adapter(tmp_path / "lora")
    for folder, text in ((base, {"other": "{{ 1 }}", "same": "{{ 2 }}"}.get(known)), (lora, "{{ 2 }}")):
        tokenizer(folder, 60)
        if text and kept_in == "chat_template.jinja":
            (folder / kept_in).write_text(text)
        elif text:
            write_json(folder / kept_in, {"chat_template": text, "of": str(folder)})
    report = run(base, [lora], tmp_path / "out")
    owner = base if known == "same" else lora
    for name in {"tokenizer.json", "tokenizer_config.json", kept_in}:
        assert (tmp_path / "out" / name).read_bytes() == (owner / name).read_bytes()
    assert any("tokenizer and chat template are the adapter's" in note for note in report["notes"]) == (owner is lora)


def test_a_chat_template_without_a_fitting_tokenizer_is_told(tmp_path):
    base, lora = write_model(tmp_path / "base"), write_adapter(tmp_path / "lora")
    (lora / "chat_template.jinja").write_text("{{ 2 }}")
    report = run(base, [lora], tmp_path / "out")
    assert any("no tokenizer, the base has none" in note for note in report["notes"])
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    tokenizer(lora, 70)
    refused(lambda: run(base, [lora], tmp_path / "no"), "70 tokens", "64 rows")


def test_trained_rows_come_with_the_adapter_s_tokenizer(tmp_path, grown):
    base, _ = grown
    lora = special(tmp_path / "rows", "rows")
    run(base, [lora], tmp_path / "base's")
    assert merged_tokenizer(open_checkpoint(base), [(open_adapter(lora), 1.0)]) == base
    assert (tmp_path / "base's" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    tokenizer(lora, 60, added=4)
    run(base, [lora], tmp_path / "adapter's")
    assert (tmp_path / "adapter's" / "tokenizer.json").read_bytes() == (lora / "tokenizer.json").read_bytes()
    tokenizer(lora, 60, added=5)
    refused(lambda: run(base, [lora], tmp_path / "no"), "65 tokens", "64 rows")


def test_an_embedding_and_a_head_of_different_sizes_are_refused(tmp_path, grown):
    base, lora = grown
    saved = {f"{EMBEDDING}.weight": torch.randn(66, 32)}
    lora = write_adapter(tmp_path / "half", saved, config={"modules_to_save": ["embed_tokens"]})
    refused(lambda: run(base, [lora], tmp_path / "out"), "embed_tokens.weight 66 rows", "lm_head.weight 64 rows")
    tied = write_model(tmp_path / "tied", model_tensors(head=False), config={"tie_word_embeddings": True})
    refused(lambda: run(tied, [lora], tmp_path / "out"), "embed_tokens.weight 66 rows", "lm_head.weight 64 rows")


# --- arithmetic and its limits ----------------------------------------------------------------------------------


def test_stacked_experts_are_merged_as_those_one_by_one(tmp_path, bases):
    single, stacks = bases("qwen3_moe"), {**Q, "target_parameters": STACKS}
    train(single, tmp_path / "lora", **stacks)
    run(single, [tmp_path / "lora"], tmp_path / "single")

    def stacked(tensors):
        experts = [name for name in tensors if ".experts." in name]
        linears = {
            kind: torch.stack([tensors[f"model.layers.0.mlp.experts.{number}.{kind}.weight"] for number in range(3)])
            for kind in ("gate_proj", "up_proj", "down_proj")
        }
        rest = {name: tensor for name, tensor in tensors.items() if name not in experts}
        rest["model.layers.0.mlp.experts.gate_up_proj"] = torch.cat([linears["gate_proj"], linears["up_proj"]], 1)
        return rest | {"model.layers.0.mlp.experts.down_proj": linears["down_proj"]}

    base = write_model(tmp_path / "base", stacked(weights(single)), config=config_of(single))
    run(base, [tmp_path / "lora"], tmp_path / "out")
    wanted = stacked(weights(tmp_path / "single"))
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ["dora", "dora on an embedding", "lora_bias", "token rows of both", "stacked experts"])
def test_rows_may_be_given_in_pieces_and_in_any_order(tmp_path, bases, case):
    name, options = CASES[case]
    train(bases(name), tmp_path / "lora", **options)
    plan = plan_merge(open_checkpoint(bases(name)), [(open_adapter(tmp_path / "lora"), 1.0)])
    touched = [output for output in plan.outputs if output.changes]
    assert touched
    for output in touched:
        change, rows = Change(output), read_tensor(output.source)
        assert change.whole == (case == "dora on an embedding" and "embed_tokens" in output.name)
        wanted = change.apply(rows.clone(), 0)
        assert not torch.equal(wanted, rows)
        if change.whole:
            with pytest.raises(ValueError, match="all are needed"):
                change.apply(rows[:2].clone(), 0)
            continue
        half = len(rows) // 2
        second, first = change.apply(rows[half:].clone(), half), change.apply(rows[:half].clone(), 0)
        torch.testing.assert_close(torch.cat([first, second]), wanted, rtol=1e-6, atol=1e-7)


DAMAGES = {
    "another name": lambda name, tensor: (f"{name}.x", tensor),
    "a dimension more": lambda name, tensor: (name, tensor[None]),
    "a dimension less": lambda name, tensor: (name, tensor.reshape(-1) if tensor.dim() > 1 else tensor[0]),
    "one too many": lambda name, tensor: (name, torch.cat([tensor, tensor[..., :1]], -1)),
    "none": lambda name, tensor: (name, tensor[:0]),
    "whole numbers": lambda name, tensor: (name, tensor.to(torch.int32)),
}


@pytest.mark.parametrize(
    "case",
    ["dora", "dora on an embedding", "lora_bias", "bias=all", "token rows of both", "mixtral", "tied, saved both"],
)
def test_every_tensor_that_is_damaged_is_refused_by_name(tmp_path, bases, case):
    name, options = CASES[case]
    train(bases(name), tmp_path / "lora", **options)
    base, whole = open_checkpoint(bases(name)), load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for key, tensor in whole.items():
        for damage in DAMAGES.values():
            damaged, value = damage(key, tensor)
            rest = {other: tensor for other, tensor in whole.items() if other != key}
            save(tmp_path / "lora" / "adapter_model.safetensors", rest | {damaged: value.contiguous()})
            module = key.removeprefix(f"{PEFT}.").partition(".lora_")[0].partition(".base_layer")[0]
            refused(lambda: targets(open_adapter(tmp_path / "lora"), base), module.partition(".token_adapter")[0][-40:])


def test_a_saved_module_that_is_missing_is_named(tmp_path, bases):
    train(bases("tied"), tmp_path / "lora", **Q, modules_to_save=["lm_head"])
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save(file, {name: tensor for name, tensor in load_file(file).items() if "lm_head" not in name})
    refused(lambda: run(bases("tied"), [tmp_path / "lora"], tmp_path / "out"), "modules_to_save names lm_head")


def test_a_dora_without_a_direction_is_named(tmp_path):
    tensors = model_tensors()
    tensors[f"{Q_PROJ}.weight"][3] = 0
    factors = adapter_tensors([Q_PROJ])
    factors[f"{PEFT}.{Q_PROJ}.lora_B.weight"][3] = 0
    factors[f"{PEFT}.{Q_PROJ}.lora_magnitude_vector"] = torch.ones(32)
    lora = write_adapter(tmp_path / "lora", factors, config={"use_dora": True})
    base = write_model(tmp_path / "base", tensors)
    refused(lambda: run(base, [lora], tmp_path / "out"), f"{Q_PROJ}.weight", "infinite or NaN")


def test_numbers_that_are_too_large_are_named(tmp_path):
    base = write_model(tmp_path / "base")
    lora = write_adapter(tmp_path / "lora", adapter_tensors([Q_PROJ], scale=1e15), config={"lora_alpha": 9e29})
    refused(lambda: run(base, [lora], tmp_path / "out"), f"{Q_PROJ}.weight", "infinite or NaN")


def test_factors_of_half_precision_are_multiplied_in_float32(tmp_path, bases):
    train(bases("llama"), tmp_path / "lora", r=4, target_modules=["q_proj"])
    file = tmp_path / "lora" / "adapter_model.safetensors"
    halves = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save(file, halves)
    wanted = PeftModel.from_pretrained(load(bases("llama")), tmp_path / "lora").merge_and_unload().state_dict()
    run(bases("llama"), [tmp_path / "lora"], tmp_path / "out", "bfloat16")
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, wanted[name].bfloat16()), name
