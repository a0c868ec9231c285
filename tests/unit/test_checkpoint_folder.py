import json
import os
import subprocess
import sys

import pytest
import torch

from orchestrator.checkpoint.folder import carried_files, fingerprint, open_checkpoint
from orchestrator.checkpoint.spec import model_spec
from orchestrator.errors import CheckpointError
from tests.checkpoints import CONFIG, model_tensors, save, write_adapter, write_json, write_model


def refused(path, *faults):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    for fault in faults:
        assert fault in message
    return message


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_whole_model_opens(tmp_path, kind, shards):
    tensors = model_tensors()
    checkpoint = open_checkpoint(write_model(tmp_path / "model", tensors, kind=kind, shards=shards))
    assert checkpoint.tensors.keys() == tensors.keys()
    assert (checkpoint.format, len(checkpoint.files), checkpoint.notes) == (kind, shards, ())
    assert (checkpoint.index_digest is None) == (shards == 1)
    assert checkpoint.config == CONFIG


def test_no_folder_and_a_file(tmp_path):
    refused(tmp_path / "none", "there is no folder", "none")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path / "model.safetensors", "is a file", f"Give the folder: {tmp_path}")


def test_a_folder_without_a_config(tmp_path):
    refused(tmp_path, str(tmp_path), "no config.json")
    write_adapter(tmp_path)
    refused(tmp_path, "is an adapter", f"model.adapter={tmp_path}", "model.path=")


@pytest.mark.parametrize("text", ["{", "[]", "3", '"x"', "\xff", '{"a": ' + "[" * 100_000, '{"a": 1' + "0" * 5000])
def test_a_damaged_config(tmp_path, text):
    folder = write_model(tmp_path / "model")
    (folder / "config.json").write_text(text, encoding="latin-1")
    refused(folder, "config.json")


def test_no_weights(tmp_path):
    write_json(tmp_path / "config.json", CONFIG)
    refused(tmp_path, "holds no weights")
    save(tmp_path / "consolidated.safetensors", model_tensors())
    refused(tmp_path, "holds no weights", "consolidated.safetensors")
    write_adapter(tmp_path)
    refused(tmp_path, "adapter's weights", "model.adapter=")


def test_weight_files_without_a_tensor(tmp_path):
    write_json(tmp_path / "config.json", CONFIG)
    save(tmp_path / "model.safetensors", {})
    refused(tmp_path, str(tmp_path), "there are no tensors in model.safetensors", "Download the model again")
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    refused(tmp_path, "there are no tensors in model.safetensors")
    for number in (1, 2):
        save(tmp_path / f"model-0000{number}-of-00002.safetensors", {})
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "no tensors in model-00001-of-00002.safetensors, model-00002-of-00002.safetensors")


def test_whole_safetensors_win_over_bin_beside_them(tmp_path):
    write_model(tmp_path, kind="bin", shards=2)
    checkpoint = open_checkpoint(write_model(tmp_path, shards=2))
    assert checkpoint.format == "safetensors"
    assert any("safetensors and bin weights: the safetensors ones are used" in note for note in checkpoint.notes)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_bin_is_used_where_the_safetensors_are_not_whole(tmp_path, damage):
    write_model(tmp_path, kind="bin")
    shard = write_model(tmp_path, shards=2) / "model-00002-of-00002.safetensors"
    if damage == "missing":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size - 1)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "bin"
    assert any("not complete" in note and shard.name in note for note in checkpoint.notes)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_index_that_names_a_missing_shard(tmp_path, kind):
    folder = write_model(tmp_path, kind=kind, shards=3)
    shard = next(folder.glob("*-00002-of-00003*"))
    shard.unlink()
    refused(folder, shard.name, "missing")


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "a\\b.safetensors", "a\0.safetensors",
     "C:x.safetensors", 3, None, "x" * 300 + ".safetensors"],
)  # fmt: skip
def test_an_index_that_leads_out_of_its_folder_is_refused_even_beside_a_whole_bin(tmp_path, name):
    folder = write_model(tmp_path / "model", shards=2)
    write_model(folder, kind="bin")
    index = folder / "model.safetensors.index.json"
    write_json(index, {"weight_map": {"model.norm.weight": name}})
    refused(folder, "index.json", "outside its folder", "refused")


@pytest.mark.parametrize("value", [[], {}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_a_weight_map(tmp_path, value):
    folder = write_model(tmp_path, shards=2)
    write_json(folder / "model.safetensors.index.json", value)
    refused(folder, "index.json")


def test_an_index_that_names_another_kind_of_file(tmp_path):
    folder = write_model(tmp_path, shards=2)
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "config.json"}})
    refused(folder, "config.json", "no .safetensors file")


def test_an_index_whose_shard_does_not_hold_the_tensor(tmp_path):
    folder = write_model(tmp_path, shards=2)
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    write_json(index, value)
    refused(folder, "model.extra.weight", "it does not")


def test_the_same_tensor_in_two_shards(tmp_path):
    folder = write_model(tmp_path, shards=2)
    save(folder / "model-00002-of-00002.safetensors", model_tensors())
    refused(folder, "model-00002-of-00002.safetensors", "holds too")


def test_shards_without_an_index_are_found_if_they_are_all_there(tmp_path):
    folder = write_model(tmp_path, shards=3)
    (folder / "model.safetensors.index.json").unlink()
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.files) == 3
    assert "no model.safetensors.index.json" in checkpoint.notes[0]
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert "00002" in refused(folder)


def test_tensors_and_shards_that_the_index_does_not_know_are_noted(tmp_path):
    folder = write_model(tmp_path, shards=2)
    save(folder / "model-00009-of-00009.safetensors", model_tensors())
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    del value["weight_map"]["model.norm.weight"]
    write_json(index, value)
    notes = " ".join(open_checkpoint(folder).notes)
    assert "model-00009-of-00009.safetensors is not in" in notes
    assert "model.norm.weight" in notes


def test_links_are_followed_as_a_hub_cache_is_made_of_them(tmp_path):
    blobs, links = write_model(tmp_path / "blobs", shards=2), tmp_path / "links"
    links.mkdir()
    for file in blobs.iterdir():
        (links / file.name).symlink_to(file)
    assert open_checkpoint(links).tensors.keys() == open_checkpoint(blobs).tensors.keys()
    (blobs / "model-00001-of-00002.safetensors").unlink()
    refused(links, "model-00001-of-00002.safetensors", "link to a file that is gone")


def test_a_pipe_in_place_of_weights_does_not_hang(tmp_path):
    folder = write_model(tmp_path)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    refused(folder, "not a regular file")


def test_the_fingerprint_follows_every_file_that_matters(tmp_path):
    folder = write_model(tmp_path, shards=2)
    first = fingerprint(open_checkpoint(folder))
    assert json.loads(json.dumps(first)) == first
    assert fingerprint(open_checkpoint(folder)) == first
    for name in ("tokenizer.json", "config.json", "model-00002-of-00002.safetensors"):
        before = (folder / name).stat().st_mtime_ns
        os.utime(folder / name, ns=(before, before + 1))
        assert fingerprint(open_checkpoint(folder)) != first
        os.utime(folder / name, ns=(before, before))
    assert fingerprint(open_checkpoint(folder)) == first


def test_weights_and_indexes_are_not_carried(tmp_path):
    folder = write_model(tmp_path, shards=2)
    for name in ("tokenizer.model", "merges.txt", "modeling_x.py", "chat_template.jinja", "training_args.bin"):
        (folder / name).write_bytes(b"x")
    carried = "chat_template.jinja generation_config.json merges.txt modeling_x.py tokenizer.json tokenizer.model"
    assert " ".join(file.name for file in carried_files(folder)) == carried


def spec_of(tmp_path, tensors=None, **config):
    return model_spec(open_checkpoint(write_model(tmp_path, tensors, config=config)))


def spec_refused(tmp_path, *faults, tensors=None, **config):
    with pytest.raises(CheckpointError) as caught:
        spec_of(tmp_path, tensors, **config)
    for fault in faults:
        assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dimensions_come_from_the_headers(tmp_path):
    spec = spec_of(tmp_path)
    sizes = (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.intermediate, spec.vocab)
    assert sizes == (2, 32, 4, 2, 8, 48, 64)
    assert (spec.dtype, spec.tied, spec.max_context, spec.quantization, spec.notes) == ("F32", False, 128, None, ())
    assert spec.parameters == sum(tensor.numel() for tensor in model_tensors().values())
    roles = {tensor.name: (tensor.role, tensor.layer) for tensor in spec.tensors}
    assert roles["model.embed_tokens.weight"] == ("embedding", None)
    assert roles["lm_head.weight"] == ("head", None)
    assert roles["model.norm.weight"] == ("other", None)
    assert roles["model.layers.1.mlp.down_proj.weight"] == ("linear", 1)
    assert roles["model.layers.1.input_layernorm.weight"] == ("other", 1)
    assert sum(role == "linear" for role, _ in roles.values()) == 14


def test_the_headers_win_over_a_config_that_contradicts_them(tmp_path):
    spec = spec_of(tmp_path, vocab_size=50, num_key_value_heads=4, intermediate_size=40, num_hidden_layers=1)
    assert (spec.vocab, spec.kv_heads, spec.intermediate, spec.layers) == (64, 2, 48, 2)
    assert len(spec.notes) == 4
    assert any("vocab_size 50" in note and "64" in note for note in spec.notes)


def test_missing_tensors_and_mixed_shapes_are_named(tmp_path):
    tensors = model_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    spec_refused(tmp_path / "a", "model.layers.1.mlp.up_proj.weight is missing", tensors=tensors)
    spec_refused(tmp_path / "b", "model.layers.2.self_attn.q_proj.weight is missing", num_hidden_layers=3)
    spec_refused(tmp_path / "c", "lm_head.weight is missing", tensors=model_tensors(head=False))
    tensors = model_tensors() | {"model.layers.1.mlp.up_proj.weight": torch.zeros(48, 33)}
    spec_refused(tmp_path / "d", "model.layers.1.mlp.up_proj.weight has shape [48, 33]", tensors=tensors)
    spec_refused(tmp_path / "e", "no layers", tensors={"model.norm.weight": torch.zeros(3)})


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"architectures": ["T5Model\n"]}, "Supported: LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": []}, "names no architecture"),
        ({"architectures": "LlamaForCausalLM"}, "names no architecture"),
        ({"num_attention_heads": "4"}, "num_attention_heads"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"num_attention_heads": -4}, "num_attention_heads"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_hidden_layers": 10**9}, "layers"),
        ({"quantization_config": 3}, "quantization_config"),
        ({"num_attention_heads": 32 * 7}, "divide"),
    ],
)
def test_a_config_that_makes_no_sense(tmp_path, config, fault):
    spec_refused(tmp_path, fault, **config)


def test_a_tied_model_counts_its_head_once(tmp_path):
    tensors = model_tensors(head=False)
    alone = spec_of(tmp_path / "a", tensors, tie_word_embeddings=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    both = model_spec(
        open_checkpoint(write_model(tmp_path / "b", tensors, kind="bin", config={"tie_word_embeddings": True}))
    )
    assert alone.tied
    assert (both.parameters, set(both.tensors), both.notes) == (alone.parameters, set(alone.tensors), ())


def test_defaults_are_those_of_the_architecture(tmp_path):
    tensors = model_tensors(head=False)
    config = {
        "architectures": ["GemmaForCausalLM"],
        "head_dim": 16,
        "max_position_embeddings": None,
        "tie_word_embeddings": None,
    }
    spec = spec_of(tmp_path / "gemma", tensors, **config)
    assert (spec.tied, spec.head_dim, spec.heads, spec.kv_heads, spec.max_context) == (True, 16, 2, 1, 8192)
    tensors = model_tensors()
    for layer in range(2):
        for name in ("q_norm", "k_norm"):
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = torch.ones(16)
    spec = spec_of(tmp_path / "qwen3", tensors, architectures=["Qwen3ForCausalLM"])
    assert (spec.head_dim, spec.heads, spec.kv_heads) == (16, 2, 1)
    spec_refused(tmp_path / "qwen2", "q_proj.bias is missing", architectures=["Qwen2ForCausalLM"])


def test_a_quantized_model_s_dimensions_are_the_config_s(tmp_path):
    tensors = model_tensors(1)
    packed = {
        f"{name.removesuffix('weight')}qweight": torch.zeros(4, 4, dtype=torch.int32)
        for name in tensors
        if "proj" in name
    }
    plain = {name: tensor.half() for name, tensor in tensors.items() if "proj" not in name}
    quantization = {"quant_method": "gptq", "bits": 4}
    spec = spec_of(tmp_path, plain | packed, num_hidden_layers=1, quantization_config=quantization)
    assert (spec.quantization, spec.dtype, spec.heads) == (quantization, "F16", 4)
    linears = [tensor for tensor in spec.tensors if "proj" in tensor.name]
    assert {(t.role, t.dtype, t.nbytes, len(t.parts)) for t in linears} == {("linear", "I32", 64, 1)}
    assert linears[0].part("scales", "qweight") == linears[0].parts[0]


@pytest.mark.parametrize("module", ["folder", "spec", "adapter", "reader", "writer", "carry", "tied"])
def test_every_module_imports_without_torch(module):
    code = f"import sys, orchestrator.checkpoint.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
