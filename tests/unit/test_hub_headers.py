"""Headers that are read out of a hub's files by ranges: no byte too many, and nothing that is sent is believed."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import pytest
import small_models
import torch
from hub_server import Hub, serving
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from orchestrator.checkpoint.adapter import open_adapter
from orchestrator.checkpoint.files import Opened
from orchestrator.checkpoint.folder import Checkpoint, open_checkpoint
from orchestrator.checkpoint.headers import READERS, read_header
from orchestrator.checkpoint.reader import read_words
from orchestrator.checkpoint.spec import model_spec
from orchestrator.errors import CheckpointError, OrchestratorError
from orchestrator.hub import headers, ranges
from orchestrator.hub.headers import RemoteStream, remote_adapter, remote_checkpoint
from orchestrator.hub.locate import ADAPTER, MODEL, NoPartsError, locate

ID = "org/model"
SHARD = "model-00002-of-00003.safetensors"
SHAPE = small_models.Llama(vocab=4096)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(ranges, "PAUSES_S", (0.01, 0.01))
    with serving() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield hub
        close_session()


def opened(hub_id: str = ID) -> Checkpoint:
    place = locate(f"hf://{hub_id}", None, MODEL, latest=False)
    assert place.remote is not None
    return remote_checkpoint(place.remote)


def same(remote: Checkpoint, local: Checkpoint) -> bool:
    """Whether two are the same but for where they lie."""
    facts = [(c.config, c.format, [f.name for f in c.files], c.digests, c.index_digest) for c in (remote, local)]
    tensors = [
        {name: (t.dtype, t.shape, t.nbytes, t.strides, t.file.name) for name, t in c.tensors.items()}
        for c in (remote, local)
    ]
    return facts[0] == facts[1] and tensors[0] == tensors[1]


def header_bytes(file: Path) -> int:
    with file.open("rb") as stream:
        return 8 + int(struct.unpack("<Q", stream.read(8))[0])


def test_thirty_shards_with_no_byte_behind_the_first_request(hub: Hub, tmp_path: Path) -> None:
    shape = small_models.Llama(layers=29, vocab=4096)
    folder = small_models.write_noise(tmp_path / "repo", shape, 30)
    hub.add(ID, folder)
    found, local = opened(), open_checkpoint(folder)
    assert same(found, local)
    assert {name: tensor.offset for name, tensor in found.tensors.items()} == {
        name: tensor.offset for name, tensor in local.tensors.items()
    }
    spec, other = model_spec(found), model_spec(local)
    assert (spec.tensors, spec.parameters, spec.layers) == (other.tensors, other.parameters, other.layers)
    for file in local.files:
        assert hub.parts(file.name) == ["bytes=0-65535"]
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_a_header_longer_than_the_first_request_takes_one_more_to_its_last_byte(hub: Hub, tmp_path: Path) -> None:
    folder = small_models.write_headers(tmp_path / "repo", small_models.LLAMA_70B)
    hub.add(ID, folder, digests={"model.safetensors": "0" * 64})
    assert same(opened(), open_checkpoint(folder))
    end = header_bytes(folder / "model.safetensors")
    assert hub.parts("model.safetensors") == ["bytes=0-65535", f"bytes=65536-{end - 1}"]
    assert hub.fetched()["model.safetensors"] == end


@pytest.mark.parametrize("legacy", [False, True])
def test_bin_shards_are_read_at_their_ends(hub: Hub, tmp_path: Path, legacy: bool) -> None:
    tensors = checkpoints.model_tensors()
    tensors["model.embed_tokens.weight"] = torch.zeros(100_000, checkpoints.HIDDEN)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    folder = checkpoints.write_model(tmp_path / "repo", tensors, kind="bin", config={"vocab_size": 100_000})
    if legacy:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    hub.add(ID, folder)
    assert same(opened(), open_checkpoint(folder))
    assert len(hub.parts("pytorch_model.bin")) == (1 if legacy else 2)
    assert hub.fetched()["pytorch_model.bin"] <= 2 * ranges.BLOCK


def test_a_long_legacy_pickle_comes_in_a_few_growing_parts(hub: Hub, tmp_path: Path) -> None:
    folder = checkpoints.write_model(tmp_path / "repo", kind="bin")
    many = {f"a.long.name.of.a.module.{'x' * 100}.{i}": torch.zeros(1) for i in range(4000)}
    torch.save(many, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    hub.add(ID, folder)
    assert same(opened(), open_checkpoint(folder))
    assert 2 <= len(hub.parts("pytorch_model.bin")) <= 6


def test_an_adapter_is_opened_by_its_header(hub: Hub, tmp_path: Path) -> None:
    folder = small_models.write_adapter(tmp_path / "lora", small_models.Llama(hidden=512))
    hub.add(ID, folder)
    place = locate(f"hf://{ID}", None, ADAPTER, latest=False)
    assert place.remote is not None
    found, local = remote_adapter(place.remote), open_adapter(folder)
    assert (found.config, found.lora, list(found.tensors)) == (local.config, local.lora, list(local.tensors))
    assert hub.fetched() == {"adapter_model.safetensors": ranges.BLOCK}


def test_there_are_no_data_to_read(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hub.add(ID, small_models.write_noise(tmp_path / "repo", SHAPE))
    tensor = opened().tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match=rf"{ID}@.*model.safetensors"):
        read_words(tensor, 0, 1)


def test_a_server_that_ignores_ranges_is_cut_off(hub: Hub, tmp_path: Path) -> None:
    folder = small_models.write_headers(tmp_path / "repo", small_models.LLAMA_70B)
    hub.add(ID, folder, digests={"model.safetensors": "0" * 64})
    hub.whole = True
    assert same(opened(), open_checkpoint(folder))
    deadline = time.monotonic() + 10
    while (sent := hub.fetched().get("model.safetensors", 0)) == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert 0 < sent < 2**26  # what the sockets hold, of 128 GiB


def test_the_end_of_a_large_file_is_not_waited_for(hub: Hub, tmp_path: Path) -> None:
    tensors = checkpoints.model_tensors()
    tensors["model.embed_tokens.weight"] = torch.zeros(100_000, checkpoints.HIDDEN)
    hub.add(ID, checkpoints.write_model(tmp_path / "repo", tensors, kind="bin"))
    hub.whole = True
    with pytest.raises(NoPartsError, match=r"sends pytorch_model.bin of 12.* only as a whole"):
        opened()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("longer", "asked for 65,536 bytes, it sends more"),
        ("endless", "asked for 65,536 bytes, it sends more"),
        ("shorter", "asked for 65,536 bytes, it sent 65,535"),
        ("elsewhere", r"asked for bytes 0-65535, it sends bytes 1-65536/"),
        ("nonsense", r"asked for bytes 0-65535, it sends bytes"),
        ("another file", r"it has [\d,]+ bytes, the hub lists [\d,]+"),
        ("compressed", "encoded as gzip"),
        ("not there", "answered 416"),
        ("garbage", r"claims a header of [\d,]+ bytes"),
        ("slow", "in time"),
        ("silent", "cannot be reached"),
    ],
)
def test_an_answer_that_is_wrong_costs_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, said: str
) -> None:
    monkeypatch.setattr(ranges, "PATIENCE_S", 0.3)
    monkeypatch.setattr(ranges, "SLOWEST", 2**30)
    if fault == "silent":
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.add(ID, small_models.write_noise(tmp_path / "repo", SHAPE, 3))
    hub.faults[SHARD] = fault
    started = time.monotonic()
    with pytest.raises(OrchestratorError, match=said) as caught:
        opened()
    assert "\n" not in str(caught.value)
    assert SHARD in str(caught.value) or fault in ("not there", "silent")
    assert time.monotonic() - started < 5


def test_a_connection_that_is_lost_once_costs_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, small_models.write_noise(tmp_path / "repo", SHAPE))
    place = locate(f"hf://{ID}", None, MODEL, latest=False)
    assert place.remote is not None
    hub.faults["model.safetensors"] = "hangs up once"
    assert remote_checkpoint(place.remote).tensors
    assert hub.parts("model.safetensors") == ["bytes=0-65535"] * 2


def test_redirects_end(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, small_models.write_noise(tmp_path / "repo", SHAPE))
    hub.circling = True
    with pytest.raises(OrchestratorError, match="redirects without end"):
        opened()


def test_a_header_of_4_gib_is_refused_before_it_is_read(hub: Hub, tmp_path: Path) -> None:
    folder = small_models.write_noise(tmp_path / "repo", SHAPE)
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 2**32))
        file.truncate(2**33)
    hub.add(ID, folder, digests={"model.safetensors": "0" * 64})
    with pytest.raises(CheckpointError, match=r"claims a header of 4,294,967,296 bytes"):
        opened()
    assert hub.fetched()["model.safetensors"] == ranges.BLOCK


def test_what_is_read_in_all_is_bounded(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, small_models.write_noise(tmp_path / "repo", SHAPE, 3))
    monkeypatch.setattr(ranges, "BUDGET", 2**17)
    with pytest.raises(CheckpointError, match=r"take more than 128.* refused"):
        opened()


@pytest.mark.parametrize("size", [0, 7, 100])
def test_a_file_that_the_listing_has_as_too_short(hub: Hub, tmp_path: Path, size: int) -> None:
    hub.add(ID, small_models.write_noise(tmp_path / "repo", SHAPE, 3), sizes={SHARD: size})
    with pytest.raises(OrchestratorError, match=rf"truncated|the hub lists {size}"):
        opened()


def test_a_stream_reads_as_a_file_does(tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    (tmp_path / "file").write_bytes(data)
    asked: list[tuple[int, int]] = []

    def fetch(start: int, stop: int) -> bytes:
        assert 0 <= start < stop <= len(data)
        asked.append((start, stop))
        return data[start:stop]

    stream = RemoteStream(len(data), fetch)
    with (tmp_path / "file").open("rb") as file:
        for at, whence, size in [(0, 0, 8), (0, 1, 70_000), (-22, 2, 22), (-22, 2, -1), (-100_000, 2, 100), (5, 0, 0)]:
            assert stream.seek(at, whence) == file.seek(at, whence)
            assert stream.read(size) == file.read(size)
            assert stream.readline(4096) == file.readline(4096)
            assert stream.tell() == file.tell()
        stream.seek(300_000)
        assert stream.read(10) == stream.readline() == b""
        with pytest.raises(OSError, match="Invalid"):
            stream.seek(-1)
    assert asked[:3] == [(0, 65536), (65536, 70_011), (70_011, 140_022)]


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin", "a.safetensors"])
def test_damaged_files_are_refused_or_read_as_local_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(headers, "BLOCK", 256)  # so that a small file takes many requests
    monkeypatch.setattr(headers, "SHORT", 32)
    tensors = {f"layer.{number}.weight": torch.zeros(5, 7) for number in range(6)}
    file = tmp_path / name
    checkpoints.save(file, tensors)
    if name == "legacy.bin":
        torch.save(tensors, file, _use_new_zipfile_serialization=False)
    whole, chance = file.read_bytes(), random.Random(5)
    both = 0
    for number in range(300):
        data = damaged(whole, chance) if number else whole
        file.write_bytes(data)
        local, remote = outcome(file, None), outcome(file, data)
        # Where a remote storage begins is believed: it is looked at when it is here.
        assert remote == local or (local is None and name.endswith(".bin"))
        both += local is not None
    assert 0 < both < 300


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Cut, or with a few other bytes, mostly where headers and directories are."""
    if chance.random() < 0.15:
        return data[: chance.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        at = chance.choice([chance.randrange(len(data)), chance.randrange(900), -1 - chance.randrange(900)])
        changed[at % len(data)] = chance.randrange(256)
    return bytes(changed)


def outcome(file: Path, sent: bytes | None) -> list[object] | None:
    """What a file's header says, without where its data lie; of a file here, or of one that is sent in parts."""
    try:
        if sent is None:
            found = read_header(file)
        else:
            stream = RemoteStream(len(sent), lambda start, stop: sent[start:stop])
            found = READERS[file.suffix](Opened(stream, len(sent), file, remote=True))
    except CheckpointError:
        return None
    return [found.digest, *((t.name, t.dtype, t.shape, t.strides, t.nbytes) for t in found.tensors)]
