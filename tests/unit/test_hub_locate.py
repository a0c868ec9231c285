"""What is a hub id and what a path, which files of a repo are needed, what the cache has."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import pytest
import yaml
from composing import composed, hydra_ready
from huggingface_hub import constants

from orchestrator.checkpoint.weights import ADAPTER_FORMATS, MODEL_FORMATS
from orchestrator.errors import CheckpointError, ConfigError, RequestError
from orchestrator.hub.commit import weight_files
from orchestrator.hub.locate import ADAPTER, MODEL, cached, hub_id, locate
from orchestrator.runfolder import RunFolder

COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", "org/name"),
        ("Qwen/Qwen2.5-0.5B_x", "Qwen/Qwen2.5-0.5B_x"),
        ("hf://org/name", "org/name"),
        ("name", None),
        ("/org/name", None),
        ("./org/name", None),
        ("../name", None),
        ("~/name", None),
        ("~nosuch/x", None),
        ("org/name/more", None),
        ("org/", None),
        ("org//name", None),
        ("org/na me", None),
        ("org/-name", None),
        ("org/a--b", None),
        ("org/name.git", None),
        ("org/" + "x" * 300, None),
        ("", None),
    ],
)
def test_what_is_a_hub_id(text: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id(text) == expected


def test_what_is_there_wins_and_hf_says_that_the_hub_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub_id("org/name") is None
    assert hub_id("hf://org/name") == "org/name"
    assert locate("org/name", None, MODEL, latest=False).path == tmp_path / "org" / "name"
    for text in ("hf://name", "hf://org/name@main", "hf://datasets/org/name", "hf://"):
        with pytest.raises(RequestError, match="is not a hub id"):
            hub_id(text)


def test_paths_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no folder .*/models. .*org/name"):
        locate("models", None, MODEL, latest=False)
    with pytest.raises(CheckpointError, match=r"Give the path of an adapter's folder, or a hub id"):
        locate("adapters", None, ADAPTER, latest=False)
    assert locate("./org/name", None, MODEL, latest=False).path == tmp_path / "org" / "name"  # refused when opened
    with pytest.raises(RequestError, match="has no revisions"):
        locate(str(tmp_path), "main", MODEL, latest=False)


INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors", INDEX, *SHARDS], ["model.safetensors"]),
        ([INDEX, *SHARDS], [INDEX, *SHARDS]),
        ([INDEX, SHARDS[0]], None),
        (SHARDS, SHARDS),
        (SHARDS[1:], None),
        (["pytorch_model.bin"], None),
        (["model.fp16.safetensors"], None),
        ([], None),
    ],
)
def test_the_weights_of_one_format(names: list[str], expected: list[str] | None) -> None:
    index = json.dumps({"weight_map": {"a": SHARDS[1], "b": SHARDS[0], "c": SHARDS[1]}}).encode()
    assert weight_files(dict.fromkeys(names), MODEL_FORMATS[0], lambda name: index) == expected


def test_the_weights_of_an_adapter() -> None:
    names = dict.fromkeys(["adapter_model.bin", "adapter_model-00001-of-00002.safetensors"])
    assert [weight_files(names, form, lambda name: b"") for form in ADAPTER_FORMATS] == [None, ["adapter_model.bin"]]


def test_only_what_is_whole_counts_as_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--org--name"
    snapshot = checkpoints.write_model(place / "snapshots" / COMMIT, shards=2)
    assert cached("org/name", "main", MODEL) is None  # nobody knows what main is
    assert cached("org/name", COMMIT, MODEL) is not None
    (place / "refs" / "pr").mkdir(parents=True)
    (place / "refs" / "pr" / "1").write_text(COMMIT)
    found = locate("hf://org/name", "pr/1", MODEL, latest=False)
    assert (found.path, found.label) == (snapshot, f"org/name@{COMMIT}")
    assert cached("org/name", COMMIT, ADAPTER) is None
    (snapshot / SHARDS[1]).unlink()
    assert cached("org/name", COMMIT, MODEL) is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match=r"HF_HUB_OFFLINE .*not in the cache in full.*hf download org/name"):
        locate("hf://org/name", COMMIT, MODEL, latest=False)


@pytest.mark.parametrize("revision", ["../../x", "/main", "a//b", "a b", ""])
def test_a_revision_that_cannot_be_one(revision: str) -> None:
    with hydra_ready(), pytest.raises(ConfigError, match="not the name of a branch"):
        composed("model.path=org/name", f"model.revision='{revision}'")


def test_a_resumed_run_has_the_commits_of_the_first(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    model = {"path": "hf://org/name", "revision": None, "adapter": "hf://me/lora", "adapters": [{"path": "/b"}]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model, "task": {}}))
    run.pin(COMMIT, [COMMIT[::-1], None])
    model = yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]
    assert (model["revision"], model["adapter"]) == (COMMIT, None)
    assert [(a["path"], a["revision"]) for a in model["adapters"]] == [("hf://me/lora", COMMIT[::-1]), ("/b", None)]
