"""Models and adapters by hub id, from a hub on this machine: what comes, what goes on, what each mistake costs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import pytest
import small_models
import torch
from commands import Done, Orchestrator
from hub_server import Hub, serving

CHUNK = 10 * 2**20  # what the library writes at a time
ID = "org/tiny-model"
HUB_VARIABLES = ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")


class Online(Orchestrator):
    """Commands on a machine that knows one hub only."""

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder, folder / "store")
        self.variables = {"HF_ENDPOINT": url, "HF_HOME": str(folder / "hf"), "NO_PROXY": "*"}

    def env(self) -> dict[str, str]:
        known = {key: value for key, value in super().env().items() if key not in HUB_VARIABLES}
        return known | self.variables

    def convert(self, *argv: str) -> Done:
        return self("task=convert", *argv)

    @property
    def cache(self) -> Path:
        return self.folder / "hf" / "hub"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def online(hub: Hub, tmp_path: Path) -> Iterator[Online]:
    place = Online(tmp_path, hub.url)
    yield place
    place.close()


def write_repo(folder: Path, *, kind: str = "safetensors", shards: int = 2) -> Path:
    """A model as it lies on a hub: with much that no run needs."""
    checkpoints.write_model(folder, kind=kind, shards=shards)
    for name in ("README.md", "tiny.gguf", "flax_model.msgpack", "tf_model.h5", "consolidated.00.pth"):
        (folder / name).write_bytes(b"not needed")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"not needed")
    return folder


LARGE_CONFIG = {"vocab_size": 100_000}


def large_tensors() -> dict[str, torch.Tensor]:
    tensors = checkpoints.model_tensors()
    tensors["model.embed_tokens.weight"] = torch.zeros(100_000, checkpoints.HIDDEN)
    tensors["lm_head.weight"] = torch.ones(100_000, checkpoints.HIDDEN)
    return tensors


def large_repo(folder: Path) -> Path:
    """One file of 26 MiB, whose download can be cut in the middle."""
    return checkpoints.write_model(folder, large_tensors(), config=LARGE_CONFIG)


def test_a_bin_repo_is_converted_by_its_hub_id(hub: Hub, online: Online, tmp_path: Path) -> None:
    repo = hub.add(ID, write_repo(tmp_path / "repo", kind="bin"))
    done = online.convert(f"model.path={ID}", f"output.path={tmp_path / 'out'}")
    assert done.code == 0, done.err
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {f.name for f in (tmp_path / "out").iterdir()}
    assert f"downloading {ID}, commit {repo.commit[:12]}" in done.err
    result = done.json("result.json")
    assert (result["model"], result["model_revision"]) == (ID, repo.commit)
    shards = {f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)}
    assert set(hub.fetched()) == shards  # of large files; and none of another format
    snapshot = online.cache / "models--org--tiny-model" / "snapshots" / repo.commit
    small = {"config.json", "generation_config.json", "tokenizer.json", "pytorch_model.bin.index.json"}
    assert {file.name for file in snapshot.iterdir()} == shards | small


def test_of_two_formats_one_comes_and_a_second_run_fetches_nothing(hub: Hub, online: Online, tmp_path: Path) -> None:
    folder = write_repo(tmp_path / "repo")
    checkpoints.write_model(folder, kind="bin")
    hub.add(ID, folder)
    assert online.convert(f"model.path=hf://{ID}").code == 0
    assert all(name.startswith("model-") for name in hub.fetched())
    hub.requests.clear()
    again = online.convert(f"model.path={ID}")
    assert again.code == 0, again.err
    assert "downloading" not in again.err
    assert len([r for r in hub.requests if ID in r.path]) == 1  # which commit it is


def test_an_incomplete_safetensors_set_gives_way_to_the_bin_files(hub: Hub, online: Online, tmp_path: Path) -> None:
    folder = write_repo(tmp_path / "repo")
    checkpoints.write_model(folder, kind="bin")
    (folder / "model-00002-of-00002.safetensors").unlink()
    hub.add(ID, folder)
    done = online.convert(f"model.path={ID}")
    assert done.code == 0, done.err
    assert set(hub.fetched()) == {"pytorch_model.bin"}


def test_an_adapter_of_the_hub_on_a_base_of_the_hub(hub: Hub, online: Online, tmp_path: Path) -> None:
    base = hub.add("org/base", checkpoints.write_model(tmp_path / "base"))
    lora = hub.add("me/lora", checkpoints.write_adapter(tmp_path / "lora"))
    (lora.folder / "optimizer.pt").write_bytes(b"not needed")
    done = online.convert("model.path=org/base", f"model.adapters=[{{path: me/lora, revision: {lora.commit}}}]")
    assert done.code == 0, done.err
    result = done.json("result.json")
    assert (result["model_revision"], result["adapters"]) == (base.commit, [f"me/lora@{lora.commit}"])
    assert set(hub.fetched()) == {"model.safetensors", "adapter_model.safetensors"}
    again = online.convert("model.path=org/base", "model.adapter=me/lora")
    assert "merge: found, nothing to build" in again.err


# What was interrupted goes on


def test_a_connection_that_is_cut_goes_on_in_the_same_run(hub: Hub, online: Online, tmp_path: Path) -> None:
    hub.add(ID, large_repo(tmp_path / "repo"))
    hub.cut["model.safetensors"] = CHUNK + 1000
    done = online.convert(f"model.path={ID}")
    assert done.code == 0, done.err
    assert hub.ranges("model.safetensors")[-1] == f"bytes={CHUNK}-"


def test_a_run_that_was_interrupted_ends_at_once_and_goes_on(hub: Hub, online: Online, tmp_path: Path) -> None:
    repo = hub.add(ID, large_repo(tmp_path / "repo"))
    hub.stall["model.safetensors"] = CHUNK + 1000
    first = online.start("task=convert", f"model.path={ID}")
    partial = online.cache / "models--org--tiny-model" / "blobs" / f"{repo.sha256('model.safetensors')}.incomplete"
    first.until(lambda: hub.silent.is_set() and partial.exists() and partial.stat().st_size == CHUNK)
    started = time.monotonic()
    first.interrupt()
    assert first.done().code == 130
    assert time.monotonic() - started < 5
    again = online.convert(f"model.path={ID}")
    assert again.code == 0, again.err
    assert "10.00 MiB of them is there already" in again.err
    assert set(hub.ranges("model.safetensors")) == {f"bytes={CHUNK}-"}
    assert not partial.exists()


def test_a_partial_file_of_other_data_is_noticed(hub: Hub, online: Online, tmp_path: Path) -> None:
    repo = hub.add(ID, large_repo(tmp_path / "repo"))
    partial = online.cache / "models--org--tiny-model" / "blobs" / f"{repo.sha256('model.safetensors')}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"\x07" * CHUNK)
    done = online.convert(f"model.path={ID}")
    assert done.code == 1
    assert "another SHA-256" in done.error
    assert online.convert(f"model.path={ID}").code == 0


# Without a network


def test_without_a_network_the_cache_serves(hub: Hub, online: Online, tmp_path: Path) -> None:
    repo = hub.add(ID, write_repo(tmp_path / "repo"))
    assert online.convert(f"model.path={ID}").code == 0
    hub.requests.clear()
    online.variables["HF_HUB_OFFLINE"] = "1"
    offline = online.convert(f"model.path={ID}")
    assert offline.code == 0, offline.err
    assert f"taken from the cache, commit {repo.commit[:12]}" in offline.err
    assert hub.requests == []
    online.variables |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    unreachable = online.convert(f"model.path={ID}")
    assert unreachable.code == 0, unreachable.err
    assert "http://127.0.0.1:9 cannot be reached" in unreachable.err


def test_a_plan_of_a_hub_id_reads_headers_and_downloads_nothing(hub: Hub, online: Online, tmp_path: Path) -> None:
    repo = hub.add(ID, write_repo(tmp_path / "repo"))
    lora = hub.add("me/lora", checkpoints.write_adapter(tmp_path / "lora"))
    room = "hardware.memory_gib=4"  # what is free here changes
    asked = (f"model.path={ID}", "model.adapter=me/lora", room)
    plan = online("task=plan", *asked)
    assert plan.code == 0, plan.err
    assert not online.cache.exists()
    assert "is planned by its headers" in plan.err.replace("\n", " ")
    found = plan.json("plan.json")
    assert (found["model"], found["model_revision"]) == (ID, repo.commit)
    assert found["adapters"] == [f"me/lora@{lora.commit}"]
    local = online("task=plan", f"model.path={repo.folder}", f"model.adapter={lora.folder}", room).json("plan.json")
    assert found["candidates"] == local["candidates"]
    assert online.convert(*asked).code == 0
    hub.requests.clear()
    cached = online("task=plan", *asked)
    assert cached.code == 0, cached.err
    assert f"{ID}@" in cached.out
    assert cached.json("plan.json")["candidates"] == local["candidates"]
    assert hub.requests == []


def test_thirty_shards_are_planned_in_the_time_of_one(hub: Hub, online: Online, tmp_path: Path) -> None:
    folder = small_models.write_noise(tmp_path / "repo", small_models.Llama(layers=29), 30)
    hub.add(ID, folder)
    times = []
    for _ in range(2):  # the better one: this machine may be busy
        started = time.monotonic()
        assert online("task=plan", f"model.path={ID}").code == 0
        times.append(time.monotonic() - started)
    assert min(times) < 2
    assert len(hub.parts("model-00030-of-00030.safetensors")) == 2  # one a plan
    hub.requests.clear()
    online.variables["HF_HUB_OFFLINE"] = "1"
    offline = online("task=plan", f"model.path={ID}")
    assert offline.code == 2
    assert "HF_HUB_OFFLINE" in offline.error
    assert f"hf download {ID}" in offline.error
    assert hub.requests == []


def test_what_does_not_fit_is_refused_before_it_is_downloaded(hub: Hub, online: Online, tmp_path: Path) -> None:
    folder = small_models.write_headers(tmp_path / "repo", small_models.LLAMA_70B)
    hub.add(ID, folder, digests={"model.safetensors": "0" * 64})
    asked = (f"model.path={ID}", "hardware.memory_gib=16", "backend=transformers", "quant.bits=16")
    done = online(*asked, "prompts.text=hi")
    assert done.code == 3, done.err
    assert "does not fit" in done.error
    assert not online.cache.exists()
    assert hub.fetched()["model.safetensors"] < 2**18
    assert "of 128.48 GiB were read" in online("task=plan", *asked).err.replace("\n", " ")


def test_a_hub_without_ranges_is_downloaded_from_and_planned_then(hub: Hub, online: Online, tmp_path: Path) -> None:
    folder = checkpoints.write_model(tmp_path / "repo", large_tensors(), kind="bin", config=LARGE_CONFIG)
    hub.add(ID, folder)
    hub.whole = True
    refused = online("task=plan", f"model.path={ID}")
    assert refused.code == 1
    assert "only as a whole" in refused.error
    assert f"hf download {ID}" in refused.error
    done = online.convert(f"model.path={ID}")
    assert done.code == 0, done.err
    assert "looked at when it is here" in done.err.replace("\n", " ")


# Mistakes


def test_what_is_not_there_or_not_for_everybody_ends_with_2(hub: Hub, online: Online, tmp_path: Path) -> None:
    folder = write_repo(tmp_path / "repo")
    hub.add(ID, folder)
    hub.add("org/private", folder, token="secret")
    hub.add("org/gated", folder, token="secret", gated=True)
    hub.add("org/lora", checkpoints.write_adapter(tmp_path / "lora"))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    (bare / "tiny.Q4_K_M.gguf").write_bytes(b"GGUF")
    hub.add("org/bare", bare)
    terms = "ccept its terms at {url}/{id} and set HF_TOKEN"
    for argv, said in {
        ("model.path=org/none",): ("there is neither a folder org/none here nor a model", terms),
        ("model.path=org/private",): ("there is neither", terms),
        ("model.path=org/gated",): ("org/gated is gated", terms),
        (f"model.path={ID}", "model.revision=v9"): (f"{ID} has no revision v9", "/tree/main"),
        ("model.path=org/lora",): ("org/lora is an adapter, not a model", "model.adapter=org/lora"),
        ("model.path=org/bare",): ("org/bare holds no weights (there is tiny.Q4_K_M.gguf)", "original model"),
        (f"model.path={ID}", f"model.adapter={ID}"): (f"{ID} has no adapter_config.json", f"model.path={ID}"),
        ("model.path=hf://tiny",): ("hf://tiny is not a hub id", "hf://org/name"),
    }.items():
        done = online("task=convert", *argv)
        assert done.code == 2, (argv, done.err)
        for text in said:
            wanted = text.format(url=hub.url, id=argv[0].partition("=")[2])
            assert wanted in done.error, (argv, done.error)
    assert hub.fetched() == {}


def test_a_token_opens_a_gated_repo_and_goes_to_nobody_else(hub: Hub, online: Online, tmp_path: Path) -> None:
    hub.add("org/gated", write_repo(tmp_path / "repo"), token="secret", gated=True)
    online.variables["HF_TOKEN"] = "secret"
    done = online.convert("model.path=org/gated")
    assert done.code == 0, done.err
    elsewhere = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert elsewhere
    assert not any("authorization" in request.headers for request in elsewhere)
    assert "secret" not in done.err + done.out


def test_a_disk_that_is_too_small_ends_with_3(hub: Hub, online: Online, tmp_path: Path) -> None:
    huge = small_models.Llama(hidden=2**19, layers=1, intermediate=2**19, vocab=2**19)  # 4 TiB that take no room
    folder = small_models.write_headers(tmp_path / "repo", huge)
    hub.add(ID, folder, digests={"model.safetensors": "0" * 64})
    done = online.convert(f"model.path={ID}")
    assert done.code == 3
    assert "TiB more in" in done.error
    assert "HF_HOME" in done.error
    assert hub.fetched()["model.safetensors"] < 2**16 + 1


def test_a_hub_that_does_not_answer_ends_with_1(hub: Hub, online: Online, tmp_path: Path) -> None:
    hub.add(ID, write_repo(tmp_path / "repo"))
    hub.status = 503
    done = online.convert(f"model.path={ID}")
    assert done.code == 1
    assert "503" in done.error
    online.variables["HF_ENDPOINT"] = "http://127.0.0.1:9"
    done = online.convert(f"model.path={ID}")
    assert done.code == 1
    assert "cannot be reached" in done.error
    online.variables["HF_HUB_OFFLINE"] = "1"
    done = online.convert(f"model.path={ID}")
    assert done.code == 2
    assert "HF_HUB_OFFLINE" in done.error


def test_a_folder_wins_and_a_resumed_run_knows_the_hub_id(hub: Hub, online: Online, tmp_path: Path) -> None:
    local = checkpoints.write_model(tmp_path / ID)
    done = online("task=plan", f"model.path={ID}")
    assert done.code == 0, done.err
    assert str(local) in done.out.replace("\n", "")
    assert hub.requests == []
    other = online("task=plan", "model.path=org/other")
    assert other.folder is not None
    assert "hf://org/other" in (other.folder / "config.yaml").read_text()


def test_two_runs_download_once_and_the_second_goes_on_where_the_first_is_killed(
    hub: Hub, online: Online, tmp_path: Path
) -> None:
    hub.add(ID, large_repo(tmp_path / "repo"))
    hub.stall["model.safetensors"] = CHUNK + 1000
    first = online.start("task=convert", f"model.path={ID}")
    first.until(hub.silent.is_set)
    second = online.start("task=convert", f"model.path={ID}")
    second.until(lambda: len([r for r in hub.requests if r.path.startswith("/api/models/")]) == 2)
    time.sleep(0.8)
    first.kill()
    assert first.done().code == -9
    done = second.done()
    assert done.code == 0, done.err
    assert f"waiting for another process that downloads {ID}" in done.err
    assert hub.ranges("model.safetensors") == [f"bytes={CHUNK}-"] * 2  # the hub's, and where it sends one to


def test_names_of_another_folder_are_refused(hub: Hub, online: Online, tmp_path: Path) -> None:
    folder = write_repo(tmp_path / "repo")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../../../../evil.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.add(ID, folder)
    done = online.convert(f"model.path={ID}")
    assert done.code == 2
    assert "outside its folder" in done.error
