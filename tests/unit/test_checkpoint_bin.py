import contextlib
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint.headers import read_header
from orchestrator.checkpoint.reader import TensorReader
from orchestrator.checkpoint.trust import IncompleteError
from orchestrator.errors import CheckpointError
from tests.checkpoints import model_tensors, raw_bin, write_model


def refused(file, kind=CheckpointError):
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert type(caught.value) is kind
    assert file.name in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def every_kind():
    base = torch.arange(24, dtype=torch.float32)
    return {
        **model_tensors(1),
        "transposed": base.view(4, 6).t(),
        "sliced": base[5:17:2],
        "shared": base,
        "half": torch.randn(3, 2).half(),
        "brain": torch.randn(3, 2).bfloat16(),
        "float8": torch.randn(5).to(torch.float8_e4m3fn),
        "unsigned": torch.tensor([1, 65535], dtype=torch.uint16),
        "double": torch.randn(2).double(),
        "long": torch.arange(3),
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }


@pytest.mark.parametrize("wrapped", [False, True])
def test_every_kind_of_tensor_is_found_and_read_as_torch_does(tmp_path, wrapped):
    tensors = every_kind()
    file = tmp_path / "pytorch_model.bin"
    torch.save({"epoch": 3, "state_dict": tensors} if wrapped else tensors, file)
    found = {info.name: info for info in read_header(file).tensors}
    assert list(found) == list(tensors)
    with TensorReader() as reader:
        for name, tensor in tensors.items():
            info = found[name]
            assert info.shape == tuple(tensor.shape)
            assert info.contiguous == tensor.is_contiguous()
            read = reader.read(info)
            assert read.is_contiguous()
            assert read.dtype == tensor.dtype
            assert torch.equal(
                read.contiguous().view(-1).view(torch.uint8), tensor.detach().contiguous().view(-1).view(torch.uint8)
            ), name


def test_a_module_s_own_state_dict_with_its_metadata_is_read(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save(torch.nn.Linear(4, 3).state_dict(), file)
    assert [info.name for info in read_header(file).tensors] == ["weight", "bias"]


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path, protocol):
    target = tmp_path / "owned"
    data = pickle.dumps({"model.norm.weight": Attack(target)}, protocol=protocol)
    message = refused(raw_bin(tmp_path / "pytorch_model.bin", data))
    assert "wants to call posix.system: refused, nothing was executed" in message
    assert not target.exists()
    # The same bytes do run where they are trusted: the attack is a real one.
    pickle.loads(data)
    assert target.exists()


def test_a_pickled_model_is_refused_by_the_name_of_its_class(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save(torch.nn.Linear(2, 2), file)
    message = refused(file)
    assert "torch.nn.modules.linear.Linear" in message
    assert "state_dict()" in message


BOMBS = {
    "a memo index of 2**32": b"\x80\x02Nr\xff\xff\xff\xff.",
    "an array of a terabyte": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "text of a terabyte": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b".",
    "a deeply nested key": b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
    "a class made without a call": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "an old-style instance": b"\x80\x02(icollections\nOrderedDict\n.",
    "state for a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",
    "the copyreg registry": b"\x80\x02\x82\x01.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a storage that is none": b"\x80\x02K\x01Q.",
    "an empty stack": b"\x80\x02.",
    "no end": b"\x80\x02N",
    "nothing": b"",
    "text": b"hello",
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS.keys())
def test_pickles_made_to_hurt_are_refused(tmp_path, data):
    refused(raw_bin(tmp_path / "pytorch_model.bin", data))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_pickle_escapes_as_another_error(tmp_path, data):
    good = zipfile_pickle(tmp_path)
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    file = raw_bin(tmp_path / "fuzz.bin", bytes(changed), {"0": b"\0" * 16, "1": b"\0" * 24})
    with contextlib.suppress(CheckpointError):
        read_header(file)


def zipfile_pickle(tmp_path):
    file = tmp_path / "good.bin"
    if not file.exists():
        torch.save({"a": torch.zeros(4), "b": torch.zeros(2, 3)}, file)
    with zipfile.ZipFile(file) as zipped:
        return zipped.read("good/data.pkl")


def tensor_pickle(offset=0, shape="K\x04\x85", strides="K\x01\x85", elements="K\x04", key="0"):
    """{'a': _rebuild_tensor_v2(storage, offset, shape, strides, False, {})}, by hand."""
    text = (
        "\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n"
        f"X\x01\0\0\0{key}X\x03\0\0\0cpu{elements}tQK{chr(offset)}{shape}{strides}\x89}}tRs."
    )
    return text.encode("latin-1")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"offset": 1}, "beyond its storage"),
        ({"strides": "K\x02\x85"}, "beyond its storage"),
        ({"shape": "K\x05\x85"}, "more elements"),
        ({"shape": "K\x64\x85", "strides": "K\x00\x85"}, "more elements"),
        ({"shape": "J\xff\xff\xff\xff\x85"}, "negative"),
        ({"strides": "J\xff\xff\xff\xff\x85"}, "negative"),
        ({"strides": ")"}, "do not match"),
        ({"elements": "K\x09"}, "not 36"),
        ({"key": "7"}, "no entry"),
    ],
)
def test_a_tensor_cannot_reach_out_of_its_storage(tmp_path, options, fault):
    assert read_header(raw_bin(tmp_path / "good.bin", tensor_pickle(), {"0": b"\0" * 16})).tensors
    assert fault in refused(raw_bin(tmp_path / "bad.bin", tensor_pickle(**options), {"0": b"\0" * 16}))


def test_a_compressed_zip_is_refused(tmp_path):
    file = raw_bin(tmp_path / "a.bin", tensor_pickle(), {"0": b"\0" * 16}, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(file)


def test_a_huge_pickle_is_not_read(tmp_path):
    file = raw_bin(tmp_path / "a.bin", b"N" * (17 * 2**20))
    assert "at most" in refused(file)


def test_a_big_endian_file_is_refused(tmp_path):
    file = tmp_path / "a.bin"
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("a/data.pkl", tensor_pickle())
        zipped.writestr("a/byteorder", "big")
    assert "big-endian" in refused(file)


def test_a_legacy_file_is_refused_with_a_line_that_really_converts_it(tmp_path):
    file = tmp_path / "it's old.bin"
    torch.save({"a": torch.arange(3.0)}, file, _use_new_zipfile_serialization=False)
    message = refused(file)
    assert "before version 1.6" in message
    command = message.split("Save it again: ")[1].replace("python ", f"{sys.executable} ", 1)
    subprocess.run(command, shell=True, check=True)
    assert [info.name for info in read_header(file).tensors] == ["a"]


def test_torchscript_and_other_zips_are_refused(tmp_path):
    file = tmp_path / "a.bin"
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("a/data.pkl", b"N.")
        zipped.writestr("a/constants.pkl", b"N.")
    assert "TorchScript" in refused(file)
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("readme", b"")
    assert "0 data.pkl" in refused(file)


@pytest.mark.parametrize("value", [torch.zeros(2), [torch.zeros(2)], {"a": 3}, {"a": {"b": torch.zeros(1)}}])
def test_something_else_than_a_state_dict_is_refused(tmp_path, value):
    file = tmp_path / "a.bin"
    torch.save(value, file)
    assert "state" in refused(file)


def test_a_truncated_file_is_incomplete_wherever_it_is_cut(tmp_path):
    file = tmp_path / "a.bin"
    torch.save(model_tensors(1), file)
    whole = file.read_bytes()
    for cut in (4, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        file.write_bytes(whole[:cut])
        refused(file, IncompleteError)
    file.write_bytes(b"")
    assert "empty" in refused(file, IncompleteError)
    file.write_bytes(b"<html>")
    assert "not a PyTorch checkpoint" in refused(file)


def test_planning_from_a_bin_imports_no_torch(tmp_path):
    folder = write_model(tmp_path / "model", kind="bin", shards=2)
    code = f"""
import sys
from pathlib import Path
from orchestrator.checkpoint.folder import fingerprint, open_checkpoint
from orchestrator.checkpoint.spec import model_spec
from orchestrator.checkpoint.adapter import open_adapter
from orchestrator.checkpoint.adapter_match import targets
from orchestrator.stages.merge import merged_size
checkpoint = open_checkpoint(Path({str(folder)!r}))
assert model_spec(checkpoint).layers == 2
assert fingerprint(checkpoint)["weights"]
assert merged_size(checkpoint, [], "bfloat16") * 2 == merged_size(checkpoint, [], None)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
