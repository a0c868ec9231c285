import contextlib
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint.headers import read_header
from orchestrator.checkpoint.reader import read_rows, read_tensor, read_words, row_ranges
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


LAYOUTS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}
WRAPPINGS = {
    "bare": lambda tensors: tensors,
    "state_dict": lambda tensors: {"epoch": 3, "state_dict": tensors, "note": "the best", "loss": 0.5, "done": None},
    "model": lambda tensors: {"model": tensors, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "module": lambda tensors: {"module": tensors, "model": {"layers": 2}, "betas": (0.9, 0.99), "tags": ["a", "b"]},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_kind_of_tensor_is_found_and_read_as_torch_does(tmp_path, wrap, layout):
    tensors = every_kind()
    file = tmp_path / "pytorch_model.bin"
    torch.save(wrap(tensors), file, **layout)
    found = {info.name: info for info in read_header(file).tensors}
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        info = found[name]
        assert info.shape == tuple(tensor.shape)
        assert info.contiguous == tensor.is_contiguous()
        read = read_tensor(info)
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


HUGE = "\x8a\x08" + "\0" * 7 + "\x40"  # 2**62


def test_what_a_stride_or_an_offset_says_of_nothing_may_be_as_large_as_it_likes(tmp_path):
    shapes = {"K\x01\x85": (1,), "K\0\x85": (0,)}
    for text, shape in shapes.items():
        data = tensor_pickle(offset=0 if shape == (1,) else 200, shape=text, strides=f"{HUGE}\x85")
        (info,) = read_header(raw_bin(tmp_path / "good.bin", data, {"0": b"\0" * 16})).tensors
        assert torch.equal(read_tensor(info), torch.zeros(shape))
        assert read_tensor(info).nbytes == info.nbytes
    data = tensor_pickle(shape=f"K\0{HUGE}{HUGE}\x87", strides="K\0K\0K\0\x87")
    assert "no file can hold" in refused(raw_bin(tmp_path / "bad.bin", data, {"0": b"\0" * 16}))


def test_one_storage_has_one_type(tmp_path):
    data = tensor_pickle()
    second = data[3:-2].replace(b"FloatStorage", b"IntStorage").replace(b"\0\0\0a", b"\0\0\0b", 1)
    file = raw_bin(tmp_path / "bad.bin", data[:-1] + second + b"s.", {"0": b"\0" * 16})
    assert "two types or sizes" in refused(file)


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


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_legacy_file_is_read_as_torch_reads_it_wherever_its_data_begin(tmp_path, protocol):
    file = tmp_path / "pytorch_model.bin"
    for size in range(9):  # the keys' lengths and the first tensor's move what follows off any alignment
        half = torch.arange(30).to(torch.bfloat16).view(5, 6)
        tensors = {
            "odd": torch.arange(size, dtype=torch.int8),
            "whole": half,
            "part": half[1:4, ::2],
            "turned": half.t(),
            "numbers": torch.arange(7),
            "nothing": torch.zeros(2, 0),
            "x" * size: torch.randn(3, 5),
        }
        torch.save(tensors, file, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
        wanted = torch.load(file, weights_only=True) if protocol == 2 else tensors
        header = read_header(file)
        for info in header.tensors:
            assert torch.equal(read_tensor(info), wanted[info.name]), info
            assert read_words(info, 0, info.shape[0] if info.shape else 1).tobytes() == bytes(
                wanted[info.name].contiguous().view(torch.uint8).numpy() if info.parameters else b""
            )
            rows = torch.cat([read_rows(info, *part) for part in row_ranges(info, 8)])
            assert torch.equal(rows, wanted[info.name])
    assert len({read_header(file).digest, header.digest}) == 1


def test_a_legacy_file_s_shared_storage_is_found_once(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    base = torch.randn(8, 4)
    torch.save({"a": base, "b": base, "c": base[2:]}, file, _use_new_zipfile_serialization=False)
    a, b, c = read_header(file).tensors
    assert a.shares_all(b)
    assert c.offset == a.offset + 2 * 4 * 4


def legacy(value, keys, data, *, system=None, magic=0x1950A86A20F9469CFC6C, version=1001):
    """A legacy file by hand; `value` is the object's pickle as bytes."""
    parts = [magic, version, {"little_endian": True} if system is None else system]
    return b"".join(pickle.dumps(part, protocol=2) for part in parts) + value + pickle.dumps(keys, protocol=2) + data


def legacy_tensor(view="N", text="X", key="0", **options):
    """`tensor_pickle` with the sixth field of its reference; SHORT_BINSTRING is what Python 2 wrote."""
    data = tensor_pickle(key=key, **options).replace(b"K\x04tQ", b"K\x04" + view.encode("latin-1") + b"tQ")
    if text == "U":
        data = re.sub(rb"X(.)\0\0\0", lambda match: b"U" + match[1], data)
    return data


STORED = struct.pack("<Q4f", 4, 1.0, 2.0, 3.0, 4.0)


@pytest.mark.parametrize("text", ["X", "U"])
def test_a_file_that_python_2_wrote_is_read(tmp_path, text):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(legacy(legacy_tensor(text=text), ["0"], STORED))
    (info,) = read_header(file).tensors
    assert read_tensor(info).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (legacy(legacy_tensor(), ["0"], STORED, version=1000), "version 1001"),
        (legacy(legacy_tensor(), ["0"], STORED, system={"little_endian": False}), "big-endian"),
        (legacy(legacy_tensor(), ["0"], STORED, system=[]), "version 1001"),
        (legacy(legacy_tensor(), [], b""), "each of its storages once: 0"),
        (legacy(legacy_tensor(), ["0", "0"], STORED * 2), "each of its storages once"),
        (legacy(legacy_tensor(), ["0", "1"], STORED * 2), "each of its storages once: 1"),
        (legacy(legacy_tensor(), [0], STORED), "no list of its storages"),
        (legacy(legacy_tensor(), ["0"], b"\x05" + STORED[1:]), "has 5 elements, not 4"),
        (legacy(legacy_tensor(), ["0"], b"\xff" * 8 + STORED[8:]), "18,446,744,073,709,551,615 elements, not 4"),
        (legacy(legacy_tensor(), ["0"], STORED + b"more"), "4 bytes more"),
        (legacy(legacy_tensor(view="(X\1\0\0\x001K\0K\4t"), ["0"], STORED), "a part of another"),
        (legacy(b"\x80\x02}.", ["0"], STORED), "each of its storages once"),
        (legacy(b"\x80\x02}X" + struct.pack("<I", 2**32 - 1), ["0"], STORED), "more than the 16,777,216 bytes"),
        (legacy(b"\x80\x02c" + b"x" * 5000, ["0"], STORED), "damaged pickle"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_contradictory_legacy_file_is_refused(tmp_path, content, fault):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(content)
    assert fault in refused(file)


def test_a_storage_that_is_a_part_of_another_is_refused_with_a_line_that_really_converts_it(tmp_path):
    file = tmp_path / "very old.bin"
    view = "(" + "X\1\0\0\x001" + "K\1K\2t"
    file.write_bytes(legacy(legacy_tensor(view=view, shape="K\2\x85"), ["0"], STORED))
    converted(refused(file), "Save it again: ")
    (info,) = read_header(file).tensors
    assert read_tensor(info).tolist() == [2, 3]


@pytest.mark.parametrize("cut", [30, 120, -100, -25, -17, -16, -1])
def test_a_truncated_legacy_file_is_incomplete(tmp_path, cut):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(legacy(legacy_tensor(), ["0"], STORED)[:cut])
    assert "truncated" in refused(file, IncompleteError)


def test_a_malicious_legacy_file_is_refused_and_nothing_runs(tmp_path):
    file, target = tmp_path / "pytorch_model.bin", tmp_path / "owned"
    torch.save({"a": torch.ones(2), "b": Attack(target)}, file, _use_new_zipfile_serialization=False)
    assert "wants to call posix.system: refused, nothing was executed" in refused(file)
    assert not target.exists()


def test_several_state_dicts_in_one_file_are_refused_by_their_names(tmp_path):
    file = tmp_path / "a.bin"
    torch.save({"model": {"a": torch.ones(1)}, "state_dict": {"a": torch.zeros(1)}}, file)
    assert "several state dicts: state_dict and model" in refused(file)


def converted(message, start):
    """The command that a message gives, done."""
    subprocess.run(message.split(start)[1].replace("python ", f"{sys.executable} ", 1), shell=True, check=True)


def test_a_tar_of_long_ago_is_refused_with_a_line_that_really_converts_it(tmp_path):
    file = tmp_path / "it's old.bin"
    data = {
        "storages": pickle.dumps(1, 2) + pickle.dumps((7, "cpu", torch.FloatStorage), 2) + STORED + pickle.dumps([], 2),
        "tensors": pickle.dumps(1, 2)
        + pickle.dumps((8, 7, torch.FloatTensor), 2)
        + struct.pack("<iiqqq", 1, 0, 4, 1, 0),
        "pickle": b"\x80\x02}X\x01\0\0\0aX\x01\0\0\x008Qs.",
    }
    with tarfile.open(file, "w") as tar:
        for name, content in data.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    message = refused(file)
    assert "a .tar of PyTorch before" in message
    converted(message, "save it again: ")
    (info,) = read_header(file).tensors
    assert read_tensor(info).tolist() == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program_is_refused_with_a_line_that_really_converts_it(tmp_path):
    file = tmp_path / "a script.bin"
    torch.jit.script(torch.nn.Linear(3, 2)).save(file)
    message = refused(file)
    assert "TorchScript" in message
    converted(message, "save its weights: ")
    assert [info.name for info in read_header(file).tensors] == ["weight", "bias"]


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
from orchestrator.stages.merged import merged_checkpoint
checkpoint = open_checkpoint(Path({str(folder)!r}))
assert model_spec(checkpoint).layers == 2
assert fingerprint(checkpoint)["weights"]
assert merged_checkpoint(checkpoint, [], "bfloat16").nbytes * 2 == merged_checkpoint(checkpoint, [], None).nbytes
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
