import errno
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import peft
import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from orchestrator.checkpoint.adapter import open_adapter
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import model_spec
from orchestrator.checkpoint.writer import ShardWriter
from orchestrator.errors import CheckpointError, ConfigError, StageError
from orchestrator.stages import pieces
from orchestrator.stages.merge import merge
from orchestrator.stages.merged import merged_checkpoint
from orchestrator.stages.verify import verify_merge
from tests.checkpoints import (
    CONFIG,
    LINEARS,
    Q_PROJ,
    SCALED,
    adapter_tensors,
    model_tensors,
    write_adapter,
    write_model,
)

Q = f"{Q_PROJ}.weight"
ROOT = Path(__file__).parents[2]
KILLING = Path(__file__).with_name("killing.py")


def run(base, adapters, out, dtype=None, shard_size=2**30, progress=lambda *_: None):
    pairs = [pair if isinstance(pair, tuple) else (pair, 1.0) for pair in adapters]
    opened = [(open_adapter(path), weight) for path, weight in pairs]
    return merge(open_checkpoint(base), opened, out, dtype=dtype, shard_size=shard_size, progress=progress)


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def refused(action, *faults, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for fault in faults:
        assert fault in message


# --- exactness against PEFT -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        **{key: value for key, value in CONFIG.items() if key not in ("architectures", "model_type", "torch_dtype")}
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def train(base, folder, seed=0, model_class=AutoModelForCausalLM, **options):
    """An adapter of PEFT's with random weights, saved; and what merge_and_unload makes of it."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(model_class.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(model_class.from_pretrained(base), folder)
    return loaded.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "options",
    [
        *SCALED.values(),
        {"r": 4, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["norm"]},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=[*SCALED, "saved norms", "saved embeddings"],
)
@pytest.mark.filterwarnings("ignore")
def test_it_is_peft_s_merge_bit_for_bit(tmp_path, llama, options):
    wanted = train(llama, tmp_path / "lora", **options)
    report = run(llama, [tmp_path / "lora"], tmp_path / "out")
    found = weights(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    exact = [name for name, tensor in wanted.items() if torch.equal(found[name], tensor)]
    assert len(exact) >= 0.9 * len(wanted)
    used = sorted(name for module in report["modules"] for name in module["used"])
    assert used == sorted(open_adapter(tmp_path / "lora").tensors)
    assert all(module["relative_change"] > 0 and module["changed"] > 0.5 for module in report["modules"])


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_one_cast_at_the_end(tmp_path, llama, dtype, kind):
    wanted = train(llama, tmp_path / "lora", r=4, target_modules=LINEARS)
    run(llama, [tmp_path / "lora"], tmp_path / "out", dtype=dtype)
    found = weights(tmp_path / "out")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor.to(kind), rtol=2**-7, atol=1e-6)
    same = sum(int((found[name] == tensor.to(kind)).sum()) for name, tensor in wanted.items())
    assert same >= 0.9999 * sum(tensor.numel() for tensor in wanted.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.tensor([[1, 2, 3]]))


def test_linears_stored_the_other_way_round(tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8)).save_pretrained(
        tmp_path / "base"
    )
    wanted = train(tmp_path / "base", tmp_path / "lora", r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    run(tmp_path / "base", [tmp_path / "lora"], tmp_path / "out")
    found = weights(tmp_path / "out")
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight"):
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-6)


def test_pieces_of_a_few_rows_give_the_same(tmp_path, llama, monkeypatch):
    wanted = train(llama, tmp_path / "lora", r=4, target_modules=LINEARS)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    run(llama, [tmp_path / "lora"], tmp_path / "out", shard_size=10_000)
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)


def test_several_adapters_add_up_by_their_weights(tmp_path):
    tensors = model_tensors()
    base = write_model(tmp_path / "base", tensors)
    one = write_adapter(tmp_path / "one", first := adapter_tensors([Q_PROJ], seed=1))
    two = write_adapter(tmp_path / "two", second := adapter_tensors([Q_PROJ], seed=2))
    run(base, [(one, 0.5), (two, -2.0)], tmp_path / "out")
    wanted = tensors[Q].double()
    for lora, weight in ((first, 0.5), (second, -2.0)):
        a, b = (lora[f"base_model.model.{Q_PROJ}.lora_{part}.weight"].double() for part in "AB")
        wanted += weight * 2.0 * b @ a
    torch.testing.assert_close(weights(tmp_path / "out")[Q].double(), wanted, rtol=0, atol=1e-6)


# --- conversion, layout, what travels along ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_without_adapters_it_converts_a_bin(tmp_path, dtype):
    tensors = model_tensors(dtype=torch.float16)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4) / 3
    tensors["transposed"] = torch.randn(3, 4).t()
    base = write_model(tmp_path / "base", tensors, kind="bin", shards=2)
    seen = []
    report = run(base, [], tmp_path / "out", dtype, 20_000, lambda *args: seen.append(args))
    found = weights(tmp_path / "out")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        kept = dtype is None or name.endswith("inv_freq")
        assert torch.equal(found[name], tensor if kept else tensor.to(getattr(torch, dtype)))
    assert report["dtype"] == (dtype or "float16")
    assert len(report["shards"]) > 1
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == seen[-1][1] == merged_checkpoint(open_checkpoint(base), [], dtype).nbytes
    assert {name for _, _, name in seen} == set(tensors)
    assert json.loads(json.dumps(report)) == report
    spec = model_spec(open_checkpoint(tmp_path / "out"))
    assert spec.dtype == {None: "F16", "float32": "F32", "bfloat16": "BF16"}[dtype]


def test_small_files_are_carried_and_stale_ones_are_not(tmp_path):
    base = write_model(tmp_path / "base", kind="bin", shards=2)
    (base / "tokenizer.model").write_bytes(b"\0\1")
    lora = write_adapter(tmp_path / "lora")
    (lora / "tokenizer.json").write_text("the adapter's")
    report = run(base, [lora], tmp_path / "out", "bfloat16")
    out = contents(tmp_path / "out")
    assert out.keys() == {
        "config.json",
        "generation_config.json",
        "merge-report.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    }
    for name in ("generation_config.json", "tokenizer.json", "tokenizer.model"):
        assert out[name] == (base / name).read_bytes()
    config = json.loads(out["config.json"])
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    assert config == {**CONFIG, "torch_dtype": "bfloat16", **rope}
    assert set(report["carried"]) == out.keys() - {"model.safetensors", "merge-report.json"}


def test_a_tied_head_is_written_once(tmp_path):
    tied = {"tie_word_embeddings": True}
    tensors = model_tensors(head=False)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    base = write_model(tmp_path / "base", tensors, kind="bin", config=tied)
    report = run(base, [], tmp_path / "out")
    assert report["dropped"] == ["lm_head.weight"]
    assert "lm_head.weight" not in weights(tmp_path / "out")
    written = sum(file.nbytes for file in weights(tmp_path / "out").values())
    assert written == merged_checkpoint(open_checkpoint(base), [], None).nbytes
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    run(write_model(tmp_path / "copy", tensors, config=tied), [], tmp_path / "out2")
    assert "lm_head.weight" not in weights(tmp_path / "out2")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    base = write_model(tmp_path / "differ", tensors, config=tied)
    refused(lambda: run(base, [], tmp_path / "out3"), "lm_head.weight", "tie_word_embeddings")


def test_shared_storage_that_is_not_tied_is_written_twice(tmp_path):
    tensors = model_tensors(head=False)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    run(write_model(tmp_path / "base", tensors, kind="bin"), [], tmp_path / "out")
    assert torch.equal(weights(tmp_path / "out")["lm_head.weight"], tensors["lm_head.weight"])


def test_memory_is_logged_for_every_shard(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run(write_model(tmp_path / "base"), [], tmp_path / "out", shard_size=40_000)
    assert sum("GiB in use by this process" in record.message for record in caplog.records) == 3


# --- stopping and going on --------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_merge_goes_on_and_ends_the_same(tmp_path, seed):
    base = write_model(tmp_path / "base", kind="bin", shards=2)
    lora = write_adapter(tmp_path / "lora")
    whole = run(base, [lora], tmp_path / "whole", "bfloat16", 8_000)
    left = random.Random(seed).randint(1, whole["tensors"] - 1)

    def progress(done, total, name):
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    with pytest.raises(Killed):
        run(base, [lora], tmp_path / "out", "bfloat16", 8_000, progress)
    finished = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.safetensors")}
    (tmp_path / "out" / "model-00001-of-00005.safetensors.part").write_bytes(b"half")
    report = run(base, [lora], tmp_path / "out", "bfloat16", 8_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == finished
    assert report == {**whole, "kept": sorted(finished)}


def test_killed_at_any_moment_it_ends_the_same_byte_for_byte(tmp_path):
    """Real processes and SIGKILL; the moments are random over the whole of a run."""
    wide = {name: tensor.repeat(*(20,) * tensor.dim()) for name, tensor in model_tensors(2).items()}
    base = write_model(tmp_path / "base", wide, kind="bin", shards=3)
    narrow = adapter_tensors([Q_PROJ, "model.layers.1.mlp.gate_proj"])
    lora = write_adapter(
        tmp_path / "lora", {name: t.repeat(20, 1) if "_B." in name else t.repeat(1, 20) for name, t in narrow.items()}
    )
    command = [sys.executable, KILLING, base, lora, tmp_path / "runs", "24", "7"]
    (tmp_path / "runs").mkdir()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["killed"] == 24
    assert len(set(report["finished_shards"])) > 2, report  # early, in the middle and late
    whole = contents(tmp_path / "runs" / "whole")
    assert len(whole) > 6
    for number in range(1, report["folders"] + 1):
        assert contents(tmp_path / "runs" / f"killed{number}") == whole


def stopped(base, adapters, out, shard_size):
    """Leaves the first shard finished."""

    def progress(done, total, name):
        if done > shard_size:
            raise Killed

    with pytest.raises(Killed):
        run(base, adapters, out, None, shard_size, progress)
    assert len(list(out.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("change", ["weight", "shorter", "one bit", "no record", "shard size"])
def test_a_shard_of_other_inputs_or_without_a_record_is_written_again(tmp_path, change):
    base, lora, out = write_model(tmp_path / "base"), write_adapter(tmp_path / "lora"), tmp_path / "out"
    stopped(base, [lora], out, 40_000)
    (shard,) = out.glob("*.safetensors")
    weight, size = 1.0, 40_000
    if change == "weight":
        weight = 0.5
    elif change == "shorter":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif change == "one bit":
        shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    elif change == "no record":
        shard.with_name(f"{shard.name}.done").unlink()
    else:
        size = 30_000
    report = run(base, [(lora, weight)], out, None, size)
    assert report["kept"] == []
    run(base, [(lora, weight)], tmp_path / "fresh", None, size)
    assert contents(out) == contents(tmp_path / "fresh")


def test_another_model_s_files_are_not_touched(tmp_path):
    base = write_model(tmp_path / "base")
    refused(lambda: run(base, [], base), "is the base itself", kind=StageError)
    other = write_model(tmp_path / "other", shards=3)
    before = contents(other)
    refused(lambda: run(base, [], other), "model-00001-of-00003.safetensors", kind=StageError)
    assert contents(other) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_leaves_the_finished_shards(tmp_path, monkeypatch, code):
    base, lora, out = write_model(tmp_path / "base"), write_adapter(tmp_path / "lora"), tmp_path / "out"
    put = ShardWriter._put

    def full(self, data):
        if self.shard.name.startswith("model-00002"):
            raise OSError(code, "no")
        put(self, data)

    monkeypatch.setattr(ShardWriter, "_put", full)
    words = ("no space left in", "GiB needed", "GiB free") if code == errno.ENOSPC else ("cannot be written",)
    refused(lambda: run(base, [lora], out, shard_size=40_000), str(out), *words, kind=StageError)
    assert sorted(file.name.partition(".")[2] for file in out.iterdir()) == ["safetensors", "safetensors.done"]
    monkeypatch.undo()
    assert run(base, [lora], out, shard_size=40_000)["kept"] == ["model-00001-of-00003.safetensors"]


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [Q, "model.norm.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_is_not_finite_is_named(tmp_path, value, name, dtype):
    tensors = model_tensors(dtype=dtype)
    tensors[name].view(-1)[3] = value
    base, lora = write_model(tmp_path / "base", tensors), write_adapter(tmp_path / "lora")
    refused(lambda: run(base, [lora], tmp_path / "out"), name, "NaN or infinite")
    assert not list((tmp_path / "out").glob("*.safetensors*"))


def test_an_overflow_of_float16_is_named_with_the_way_out(tmp_path):
    tensors = model_tensors()
    tensors["model.norm.weight"][0] = 70000.0
    base = write_model(tmp_path / "base", tensors)
    refused(lambda: run(base, [], tmp_path / "out", "float16"), "model.norm.weight", "7e+04", "convert.dtype=bfloat16")
    run(base, [], tmp_path / "out", "bfloat16")
    big = {name: tensor * 300 for name, tensor in adapter_tensors([Q_PROJ]).items()}
    base = write_model(tmp_path / "half", model_tensors(dtype=torch.float16))
    lora = write_adapter(tmp_path / "lora", big, config={"lora_alpha": 800})
    refused(lambda: run(base, [lora], tmp_path / "out2"), Q, "float16")
    huge = {name: tensor * 1e30 for name, tensor in big.items()}
    lora = write_adapter(tmp_path / "huge", huge)
    refused(lambda: run(base, [lora], tmp_path / "out3"), Q, "infinite or NaN")


def test_a_merge_that_changes_nothing_is_an_error(tmp_path):
    base, lora = write_model(tmp_path / "base"), write_adapter(tmp_path / "lora")
    with pytest.raises(CheckpointError, match=f"changes nothing.*{lora}") as caught:
        run(base, [(lora, 0.0)], tmp_path / "a", shard_size=40_000)
    assert caught.value.hint == "Give a larger weight."  # it is float32 already
    assert list((tmp_path / "a").iterdir()) == []
    # Not zero, but below what the written dtype can tell apart.
    base = write_model(tmp_path / "brain", {**model_tensors(dtype=torch.bfloat16), Q: torch.ones(32, 32).bfloat16()})
    lora = write_adapter(tmp_path / "faint", adapter_tensors([Q_PROJ], scale=1e-3))
    refused(lambda: run(base, [lora], tmp_path / "b"), "changes nothing", "convert.dtype=float32")


def test_weights_and_combinations_without_a_meaning(tmp_path):
    base, out = write_model(tmp_path / "base"), tmp_path / "out"
    lora = write_adapter(tmp_path / "lora")
    head = adapter_tensors([Q_PROJ]) | {"base_model.model.lm_head.weight": torch.ones(64, 32)}
    saved = write_adapter(tmp_path / "saved", head, config={"modules_to_save": ["lm_head"]})
    refused(lambda: run(base, [(lora, float("nan"))], out), "nan")
    refused(lambda: run(base, [(saved, 0.5)], out), "lm_head.weight", "0.5")
    refused(lambda: run(base, [saved, saved], out), "lm_head.weight")
    refused(lambda: run(base, [], out, "float8"), "convert.dtype=float8", kind=ConfigError)
    packed = write_model(tmp_path / "q", config={"quantization_config": {"bits": 4}})
    refused(lambda: run(packed, [], out, "float16"), "quantized")
    refused(lambda: run(packed, [lora], out), "quantized")
    assert not out.exists()
    run(packed, [], out)


# --- memory -----------------------------------------------------------------------------------------------------


def peak(folder, layers):
    """The most resident memory, in bytes above the start, while `layers` matrices of 2 MiB are merged and cast."""
    tensors = {f"model.layers.{layer}.self_attn.q_proj.weight": torch.randn(512, 1024) for layer in range(layers)}
    base = write_model(folder / "base", tensors)
    lora = {}
    for name in tensors:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        lora |= {f"{stem}.lora_A.weight": torch.randn(4, 1024), f"{stem}.lora_B.weight": torch.randn(512, 4)}
    adapter = write_adapter(folder / "lora", lora)
    del tensors, lora
    process = psutil.Process()
    start, most = process.memory_info().rss, 0

    def progress(done, total, name):
        nonlocal most
        most = max(most, process.memory_info().rss - start)

    run(base, [adapter], folder / "out", "bfloat16", 2**24, progress)
    return most


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back by madvise")
def test_peak_memory_does_not_depend_on_the_number_of_layers(tmp_path):
    peak(tmp_path / "warm", 2)
    # Each twice: on a busy machine one run's peak is off by tens of MiB.
    few = max(peak(tmp_path / f"few{i}", 4) for i in range(2))
    many = min(peak(tmp_path / f"many{i}", 28) for i in range(2))
    assert many - few < 24 * 2**20  # the 24 layers more are 48 MiB


# --- reading it back --------------------------------------------------------------------------------------------


def verified(base, adapters, out, dtype=None):
    return verify_merge(open_checkpoint(base), [(open_adapter(path), 1.0) for path in adapters], dtype, out)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_result_is_read_back_against_its_sources(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    base, lora = write_model(tmp_path / "base", kind="bin", shards=2), write_adapter(tmp_path / "lora")
    run(base, [lora], tmp_path / "out", dtype, 20_000)
    names = verified(base, [lora], tmp_path / "out", dtype)
    assert set(names) == set(model_tensors())  # so few that all are looked at


@pytest.mark.parametrize("fault", ["byte", "other adapter", "tensor gone", "other type"])
def test_a_result_that_is_not_what_its_sources_give_is_found(tmp_path, fault):
    base, lora = write_model(tmp_path / "base"), write_adapter(tmp_path / "lora")
    run(base, [lora], tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    if fault == "byte":
        tensors[Q].view(torch.uint8)[-1, -1] ^= 1
    elif fault == "other adapter":
        lora = write_adapter(tmp_path / "other", adapter_tensors([Q_PROJ], seed=5))
    elif fault == "tensor gone":
        del tensors[Q]
    else:
        tensors[Q] = tensors[Q].half()
    save_file(tensors, file)
    refused(lambda: verified(base, [lora], tmp_path / "out"), Q, kind=StageError)


def test_of_many_layers_a_sample_with_every_kind_is_read_back(tmp_path):
    base = write_model(tmp_path / "base", model_tensors(12))
    lora = write_adapter(tmp_path / "lora")
    run(base, [lora], tmp_path / "out")
    names = verified(base, [lora], tmp_path / "out")
    assert len(names) == 64 < len(model_tensors(12))
    kinds = {".".join(part for part in name.split(".") if not part.isdigit()) for name in model_tensors(12)}
    assert {".".join(part for part in name.split(".") if not part.isdigit()) for name in names} == kinds
