import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint.headers import read_header
from orchestrator.checkpoint.trust import IncompleteError
from orchestrator.errors import CheckpointError
from tests.checkpoints import model_tensors, raw_safetensors, save


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GOOD = raw_safetensors({"a": entry(), "b": entry("U8", (3,), (8, 11))}, b"\0" * 11)


def refused(tmp_path, data, kind=CheckpointError):
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert type(caught.value) is kind
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_it_finds_every_tensor_where_safetensors_put_it(tmp_path):
    tensors = {**model_tensors(1), "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4, dtype=torch.int64)}
    file = tmp_path / "model.safetensors"
    save(file, tensors)
    data = file.read_bytes()
    found = {info.name: info for info in read_header(file).tensors}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = found[name]
        assert (info.shape, info.nbytes) == (tuple(tensor.shape), tensor.nbytes)
        assert data[info.offset : info.offset + info.nbytes] == tensor.numpy().tobytes()
        assert info.contiguous
        assert info.span == info.nbytes


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 40, len(GOOD) - 12, len(GOOD) - 11, len(GOOD) - 1])
def test_a_truncated_file_is_named_with_what_is_missing(tmp_path, cut):
    message = refused(tmp_path, GOOD[:cut], IncompleteError)
    assert "truncated" in message


def test_the_missing_bytes_are_counted(tmp_path):
    assert "5 of its" in refused(tmp_path, GOOD[:-5], IncompleteError)


@pytest.mark.parametrize(
    ("header", "data", "fault"),
    [
        (b"[1]", b"", "list"),
        (b"{", b"", "JSON"),
        (b"\xff\xfe", b"", "JSON"),
        (b'{"a":' + b"[" * 100_000, b"", "JSON"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
        ({"a": 3}, b"", "dtype, shape"),
        ({"a": {**entry(), "more": 1}}, b"\0" * 8, "dtype, shape"),
        ({"a": entry("F7")}, b"\0" * 8, "F7"),
        ({"a": entry(["F32"])}, b"\0" * 8, "dtype"),
        ({"a": entry(shape=(-2,))}, b"\0" * 8, "shape"),
        ({"a": entry(shape=(True,))}, b"\0" * 8, "shape"),
        ({"a": entry(shape=(2.0,))}, b"\0" * 8, "shape"),
        ({"a": entry(shape=(1,) * 33)}, b"\0" * 8, "shape"),
        ({"a": entry(shape=(2**60, 2**60))}, b"\0" * 8, "no file can hold"),
        ({"a": entry(shape=(0, 2**60, 2**60), offsets=(0, 0))}, b"", "no file can hold"),
        (b'{"a":[' + b"0," * 2**22 + b"0]}", b"", "pieces"),
        ({"a": entry(shape=(3,))}, b"\0" * 8, "does not fill"),
        ({"a": entry(offsets=(8, 0))}, b"\0" * 8, "data_offsets"),
        ({"a": entry(offsets=(0, 8, 9))}, b"\0" * 8, "data_offsets"),
        ({"a": entry(offsets=(4, 12))}, b"\0" * 12, "gap"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12, "overlaps"),
        ({"a": entry()}, b"\0" * 9, "1 bytes more"),
        ({"__metadata__": {"format": 1}}, b"", "__metadata__"),
    ],
)
def test_a_contradictory_header_is_refused(tmp_path, header, data, fault):
    assert fault in refused(tmp_path, raw_safetensors(header, data))


def test_a_header_of_a_terabyte_is_not_believed(tmp_path):
    assert "not a safetensors file" in refused(tmp_path, struct.pack("<Q", 2**40) + b"{}")


def test_control_characters_in_a_name_do_not_reach_the_terminal(tmp_path):
    message = refused(tmp_path, raw_safetensors({"evil\n\x1b[31m": 3}))
    assert message.isprintable()


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    assert "git lfs pull" in refused(tmp_path, pointer, IncompleteError)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["F32", "U8", "BOOL"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_ENTRIES = st.fixed_dictionaries({"dtype": _VALUES, "shape": _VALUES, "data_offsets": _VALUES}) | _VALUES
_HEADERS = st.dictionaries(st.text(max_size=8), _ENTRIES, max_size=4).map(lambda value: json.dumps(value).encode())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=_HEADERS | st.binary(max_size=64), data=st.binary(max_size=16), length=st.none() | st.integers(0, 2**64 - 1)
)
def test_no_header_does_anything_but_parse_or_be_refused(tmp_path, header, data, length):
    file = tmp_path / "fuzz.safetensors"
    size = len(header) if length is None else length
    file.write_bytes(struct.pack("<Q", size) + header + data)
    try:
        found = read_header(file)
    except CheckpointError:
        return
    assert sum(info.nbytes for info in found.tensors) == len(data)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255))
def test_one_wrong_byte_never_escapes_as_another_error(tmp_path, place, value):
    file = tmp_path / "flip.safetensors"
    data = bytearray(GOOD)
    data[place] = value
    file.write_bytes(data)
    try:
        found = read_header(file)
    except CheckpointError:
        return
    assert sum(info.nbytes for info in found.tensors) == 11
