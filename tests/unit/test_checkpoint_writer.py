import json
import os
import stat

import pytest
import safetensors.torch
import torch
import xxhash

from orchestrator.checkpoint.carry import written_config
from orchestrator.checkpoint.headers import read_header
from orchestrator.checkpoint.reader import read_rows, read_tensor, read_words, row_ranges
from orchestrator.checkpoint.writer import Shard, ShardWriter, plan_shards, write_index
from orchestrator.errors import CheckpointError, StageError
from tests.checkpoints import save


def planned(*sizes):
    return plan_shards([(f"t{number}", "U8", (size,)) for number, size in enumerate(sizes)], 10)


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ((3, 4, 3), [[0, 1, 2]]),
        ((3, 4, 4), [[0, 1], [2]]),
        ((30, 4), [[0], [1]]),
        ((4, 30, 4), [[0], [1], [2]]),
        ((0,), [[0]]),
        ((10, 0, 10), [[0, 1], [2]]),
    ],
)
def test_shards_are_filled_in_order(sizes, groups):
    shards = planned(*sizes)
    assert [[tensor.name for tensor in shard.tensors] for shard in shards] == [
        [f"t{number}" for number in group] for group in groups
    ]
    total = len(groups)
    names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    assert [shard.name for shard in shards] == (names if total > 1 else ["model.safetensors"])


def test_what_is_written_is_what_safetensors_reads(tmp_path):
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "wide": torch.randn(2, 3),
        "brain": torch.randn(5).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
    }
    dtypes = {"odd": "U8", "wide": "F32", "brain": "BF16", "empty": "F32", "scalar": "F64"}
    shards = plan_shards([(name, dtypes[name], tuple(tensor.shape)) for name, tensor in tensors.items()], 1000)
    with ShardWriter(tmp_path, shards[0]) as writer:
        for planned_tensor in shards[0].tensors:
            data = tensors[planned_tensor.name].reshape(-1).view(torch.uint8).numpy().tobytes()
            writer.write(planned_tensor.name, data[:3])
            writer.write(planned_tensor.name, data[3:])
        digest = writer.finish()
    file = tmp_path / "model.safetensors"
    read = safetensors.torch.load_file(file)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safetensors.safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert digest == xxhash.xxh3_128(file.read_bytes()).hexdigest()
    assert file.stat().st_size == shards[0].file_bytes
    assert len(shards[0].header) % 8 == 0
    assert all(info.offset % (info.nbytes // max(info.parameters, 1) or 1) == 0 for info in read_header(file).tensors)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_a_file_that_is_not_whole_never_gets_its_name(tmp_path):
    (shard,) = planned(3, 4)

    def write(*tensors):
        with ShardWriter(tmp_path, shard) as writer:
            for name, data in tensors:
                writer.write(name, data)
            writer.finish()

    with pytest.raises(StageError, match="t1 was not written to its end"):
        write(("t0", b"abc"))
    with pytest.raises(StageError, match="expected t0, was given t1"):
        write(("t1", b"abcd"))
    with pytest.raises(StageError, match="t0 was not written to its end"):
        write(("t0", b"ab"))
    with pytest.raises(StageError, match="t0 has 2 bytes too many"):
        write(("t0", b"abcde"))
    with pytest.raises(StageError, match="expected the end, was given t0"):
        write(("t0", b"abc"), ("t1", b"abcd"), ("t0", b"abc"))
    assert list(tmp_path.iterdir()) == []


def test_the_format_s_own_name_is_refused():
    with pytest.raises(StageError, match="__metadata__"):
        plan_shards([("__metadata__", "U8", (1,))], 10)


def test_the_index_covers_several_shards_and_a_stale_one_goes(tmp_path):
    write_index(tmp_path, planned(6, 6))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 12}
    assert index["weight_map"] == {
        "t0": "model-00001-of-00002.safetensors",
        "t1": "model-00002-of-00002.safetensors",
    }
    write_index(tmp_path, planned(6))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_the_reader_s_ways_agree(tmp_path, suffix):
    tensor = torch.randn(7, 5).bfloat16()
    file = tmp_path / f"a{suffix}"
    save(file, {"a": tensor, "b": torch.ones(3)})
    info = next(info for info in read_header(file).tensors if info.name == "a")
    assert torch.equal(read_tensor(info), tensor)
    ranges = list(row_ranges(info, 25))
    assert ranges == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert torch.equal(torch.cat([read_rows(info, *rows) for rows in ranges]), tensor)
    assert read_words(info, 2, 5).tobytes() == tensor[2:5].view(torch.uint8).numpy().tobytes()


def test_a_strided_tensor_is_read_in_row_major_order(tmp_path):
    file = tmp_path / "a.bin"
    tensor = torch.arange(12.0).view(3, 4).t()
    save(file, {"a": tensor})
    (info,) = read_header(file).tensors
    assert not info.contiguous
    assert torch.equal(read_tensor(info), tensor)
    assert read_words(info, 1, 3).tobytes() == tensor[1:3].contiguous().numpy().tobytes()


@pytest.mark.parametrize("tensor", [torch.tensor(3.5), torch.empty(0), torch.empty(0, 4), torch.empty(4, 0)])
def test_tensors_without_rows_are_one_range(tmp_path, tensor):
    file = tmp_path / "a.safetensors"
    save(file, {"a": tensor})
    (info,) = read_header(file).tensors
    [rows] = row_ranges(info, 1)
    assert torch.equal(read_rows(info, *rows), tensor)


def test_a_file_that_shrinks_or_goes_is_an_error(tmp_path):
    file = tmp_path / "a.safetensors"
    save(file, {"a": torch.zeros(100)})
    (info,) = read_header(file).tensors
    os.truncate(file, 300)
    with pytest.raises(CheckpointError, match=r"shorter.*Was it changed while it was read\? Run it again"):
        read_tensor(info)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read: No such file or directory.*Run it again"):
        read_tensor(info)


@pytest.mark.parametrize(
    ("source", "added"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            {"rope_theta": 1e6, "rope_scaling": None},
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}},
            {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, {}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 4.0}},
            {
                "rope_scaling": {"type": "yarn", "factor": 4.0},  # one of the two, for exllamav2
                "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
            },
        ),
        (
            {"rope_scaling": {"type": "llama3", "rope_type": "llama3", "factor": 8.0}},
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
        ({"rope_scaling": {"type": "linear"}}, {}),
        ({}, {}),
    ],
)
def test_both_forms_of_the_rope_keys_are_written(source, added):
    assert written_config(source, "float16") == {**source, **added}


def test_only_the_dtype_keys_that_are_there_are_set():
    assert written_config({"torch_dtype": "float32"}, "float16") == {"torch_dtype": "float16"}
    assert written_config({"torch_dtype": "a", "dtype": "b"}, "float16") == {
        "torch_dtype": "float16",
        "dtype": "float16",
    }
    assert written_config({"x": 1}, "float16") == {"x": 1}


def test_a_shard_is_plain_data():
    assert planned(3) == [Shard("model.safetensors", planned(3)[0].tensors)]
