"""Files made to hurt: a reader reads them right or refuses them; no other exception, no hang, bounded memory."""

import contextlib
import functools
import io
import json
import os
import pickle
import pickletools
import random
import re
import struct
import subprocess
import sys
import zipfile

import pytest
import safetensors.torch
import small_models
import torch
from composing import composed

from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.headers import read_header
from orchestrator.checkpoint.reader import read_tensor, read_words
from orchestrator.checkpoint.weights import MODEL_FORMATS, read_weights
from orchestrator.errors import CheckpointError, DoesNotFitError, RequestError
from orchestrator.tasks.session import fits, look
from tests.checkpoints import CONFIG, raw_bin, raw_safetensors, write_json, write_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),  # torch's, while it is compared with
    pytest.mark.filterwarnings("error:invalid escape sequence"),  # pickletools', where warnings are errors
]

SEED = 1
CASES = 300

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.arange(5).to(torch.bfloat16),
    "c": torch.tensor([True, False, True]),
    "d": torch.zeros(0, 4),
    "e": torch.arange(3),
}
SUFFIXES = {"safetensors": ".safetensors", "zip": ".bin", "legacy": ".bin"}
EXTREMES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


@functools.cache
def good(form):
    """A small file of each format, as its own library writes it."""
    if form == "safetensors":
        return safetensors.torch.save(TENSORS, metadata={"format": "pt"})
    base = torch.arange(12.0).view(3, 4)
    views = {"turned": base.t(), "part": base[1:, ::2], "same": base}
    stream = io.BytesIO()
    torch.save({**TENSORS, **views}, stream, _use_new_zipfile_serialization=form == "zip")
    return stream.getvalue() if form == "zip" else numbered(stream.getvalue(), [*TENSORS.values(), base])


def numbered(data, tensors):
    """A legacy file that is the same in every run: its storages are named by memory addresses, and sorted by them."""
    stream = io.BytesIO(data)
    ends = []
    for _ in range(4):
        list(pickletools.genops(stream))
        ends.append(stream.tell())
    reference = rb"X.\0\0\0(\d{9,})"
    keys = list(dict.fromkeys(re.findall(reference, data[ends[2] : ends[3]])))
    names = [f"{number:03d}" for number in range(len(keys))]
    saved = re.sub(reference, lambda match: text(names[keys.index(match[1])]), data[ends[2] : ends[3]])
    stored = (struct.pack("<Q", tensor.numel()) + as_bytes(tensor) for tensor in tensors)
    return data[: ends[2]] + saved + pickle.dumps(names, 2) + b"".join(stored)


def as_bytes(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.fixture(params=SUFFIXES)
def form(request):
    return request.param


@pytest.fixture
def check(tmp_path, form):
    """Writes a file of the format and reads it: every tensor's bytes, or None where it is refused."""

    def checked(data):
        file = tmp_path / f"fuzz{SUFFIXES[form]}"
        file.write_bytes(data)
        found = outcome(file)
        if found is not None:
            compare(file, found)
        return found

    return checked


def outcome(file):
    said = refusal(file)
    if said is not None:
        assert file.name in said
        assert said.isprintable()
        return None
    header = read_header(file)
    size = file.stat().st_size
    found = {}
    for info in header.tensors:
        assert 0 <= info.offset <= info.offset + info.span <= size
        found[info.name] = read_words(info, 0, info.shape[0] if info.shape else 1).tobytes()
        assert len(found[info.name]) == info.nbytes
        assert read_tensor(info).shape == info.shape
    return found


def refusal(file):
    try:
        read_header(file)
    except CheckpointError as error:
        return str(error)
    return None


def compare(file, found):
    """What was read is what the format's own library reads, unless that refuses the file."""
    try:
        if file.suffix == ".bin":
            wanted = torch.load(file, weights_only=True)
        else:
            wanted = safetensors.torch.load(file.read_bytes())
    except Exception:  # whatever it raises for a damaged file
        return
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name] == as_bytes(tensor), name


def structure(form, folder):
    """Where the file's pieces begin and end."""
    data = good(form)
    file = folder / f"good{SUFFIXES[form]}"
    file.write_bytes(data)
    tensors = read_header(file).tensors
    places = {0, len(data)} | {at for info in tensors for at in (info.offset, info.offset + info.span)}
    if form == "safetensors":
        places.add(8)
    elif form == "zip":
        places |= {match.start() for match in re.finditer(rb"PK[\1-\7]{2}", data)}
        with zipfile.ZipFile(file) as zipped:
            places |= {entry.header_offset + 30 for entry in zipped.infolist()}
    else:
        stream = io.BytesIO(data)
        for _ in range(5):
            places |= {position for *_, position in pickletools.genops(stream)}
        places |= {info.offset - 8 for info in tensors}
    return sorted(places)


def test_the_files_that_are_changed_here_are_good_ones(form, check):
    found = check(good(form))
    assert found.keys() >= TENSORS.keys()
    assert all(found[name] == as_bytes(tensor) for name, tensor in TENSORS.items())


def test_a_file_cut_anywhere_is_refused(form, check, tmp_path):
    data = good(form)
    for place in structure(form, tmp_path):
        for cut in (place - 1, place, place + 1):
            if 0 <= cut < len(data):
                assert check(data[:cut]) is None, cut


def test_more_than_the_file_is_refused_or_not_read(form, check):
    data = good(form)
    assert check(data + b"\0") in (None, check(data))


def test_bytes_changed_at_random_never_escape_as_another_error(form, check):
    chance = random.Random(SEED)
    data = good(form)
    read = 0
    for _ in range(CASES):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 1, 2, 8))):
            changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        read += check(bytes(changed)) is not None
    assert 0 < read < CASES


def test_numbers_changed_at_random_never_escape_as_another_error(form, check):
    chance = random.Random(SEED)
    data = good(form)
    for _ in range(CASES):
        changed = bytearray(data)
        place, width = chance.randrange(len(data) - 8), chance.choice((1, 2, 4, 8))
        number = chance.choice(EXTREMES) & (256**width - 1)
        changed[place : place + width] = number.to_bytes(width, "little")
        check(bytes(changed))


def test_pieces_taken_out_or_doubled_never_escape_as_another_error(form, check, tmp_path):
    chance = random.Random(SEED)
    data, places = good(form), structure(form, tmp_path)
    for _ in range(CASES // 2):
        start, end = sorted(chance.sample(places, 2))
        check(data[:start] + data[end:])
        check(data[:end] + data[start:])


ZIP_RECORDS = {b"PK\5\6": 22, b"PK\6\7": 20, b"PK\6\6": 56, b"PK\1\2": 46, b"PK\3\4": 30}


@pytest.mark.parametrize("form", ["zip"], indirect=True)
def test_every_field_of_a_zip_out_of_range_is_refused_or_read_right(check):
    data = good("zip")
    for magic, length in ZIP_RECORDS.items():
        start = data.rfind(magic)
        assert start >= 0, magic
        for place in range(start + 4, start + length):
            for width, value in ((2, 2**16 - 1), (4, 2**32 - 1), (4, 2**31), (8, 2**64 - 1), (8, 2**63), (8, 2**40)):
                changed = bytearray(data)
                changed[place : place + width] = value.to_bytes(width, "little")
                check(bytes(changed[: len(data)]))


@pytest.mark.parametrize("form", ["safetensors"], indirect=True)
def test_every_value_of_a_safetensors_header_is_checked(check):
    data = good("safetensors")
    start = 8 + int.from_bytes(data[:8], "little")
    plain = json.loads(data[8:start])
    strange = [*EXTREMES, -1, 0.5, 1e300, True, None, "", "F32", [], [[]], {}, [2**62] * 3, [0, 2**62, 2**62], [1] * 40]
    for name in TENSORS:
        for field in (*plain[name], None, "more"):
            for value in strange:
                entry = {**plain[name], field: value} if field else value
                assert check(raw_safetensors({**plain, name: entry}, data[start:])) in (None, check(data))


@pytest.mark.parametrize("form", ["safetensors"], indirect=True)
@pytest.mark.parametrize("depth", [10, 200, 900, 950, 970, 985, 1000, 5000, 10**6])
def test_a_nested_header_is_refused_however_deep_it_is(check, depth):
    # Deep enough to be parsed and too deep to be printed is a depth that only trying finds.
    for place in (b'{"a":%s}', b'{"a":{"dtype":%s}}', b'{"a":{"dtype":"F32","shape":%s,"data_offsets":[0,0]}}'):
        assert check(raw_safetensors(place % (b"[" * depth + b"]" * depth))) is None


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def attacks(target):
    """Pickles (without the end) that make `target` where they are run."""
    arguments = text(str(target)) + text("w")

    class Shell:
        def __init__(self, function, *arguments):
            self.call = function, arguments

        def __reduce__(self):
            return self.call

    command = f"touch {target}"
    made = {
        "os.system": Shell(os.system, command),
        "subprocess": Shell(subprocess.call, ["touch", str(target)]),
        "exec": Shell(exec, f"open({str(target)!r}, 'w')"),
        "eval": Shell(eval, f"open({str(target)!r}, 'w')"),
        "partial": Shell(functools.partial(os.system, command)),
        "torch's own loader": Shell(torch.storage._load_from_bytes, pickle.dumps(Shell(os.system, command))),
    }
    return {
        **{f"{name} {protocol}": pickle.dumps(one, protocol)[:-1] for name, one in made.items() for protocol in (2, 4)},
        "GLOBAL": b"cio\nopen\n(" + arguments + b"tR",
        "STACK_GLOBAL": text("io") + text("open") + b"\x93(" + arguments + b"tR",
        "a memo's": b"cio\nopen\nq\x070h\x07(" + arguments + b"tR",
        "INST": b"(" + arguments + b"iio\nopen\n",
        "OBJ": b"(cio\nopen\n" + arguments + b"o",
    }


ATTACKS = tuple(attacks("name"))


@pytest.mark.parametrize("name", ATTACKS)
def test_no_pickle_anywhere_in_a_bin_is_executed(tmp_path, name):
    target = tmp_path / "owned"
    attack = attacks(target)[name]
    value = attack + b"." if attack[:1] == b"\x80" else b"\x80\x02" + attack + b"."
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, [])]
    file = raw_bin(tmp_path / "zip.bin", value)
    assert outcome(file) is None
    file = tmp_path / "legacy.bin"
    for place in range(1, 5):
        file.write_bytes(b"".join([*parts[:place], value, *parts[place + 1 :]]))
        assert outcome(file) is None
    assert not target.exists()
    with contextlib.suppress(RuntimeError):  # torch's own loader complains when all is done
        pickle.loads(value)
    assert target.exists(), "the attack is a real one"


LOCAL = struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 33, 0, 0, 0, 0, 0)
FULL = 2**32 - 1


def zip_by_hand(content, entries, *, hole=0, flags=0, count=None):
    """Pieces of a zip64 whose directory says what `entries` (name, offset, size) say, behind a hole."""
    directory = b"".join(
        struct.pack("<4s6H3L5H2L", b"PK\1\2", 45, 45, flags, 0, 0, 33, 0, FULL, FULL, len(name), 28, 0, 0, 0, 0, FULL)
        + name
        + struct.pack("<2H3Q", 1, 24, size, size, offset)
        for name, offset, size in entries
    )
    start = len(content) + hole
    number = len(entries) if count is None else count
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, number, number, len(directory), start)
    end += struct.pack("<4sLQL", b"PK\6\7", 0, start + len(directory), 1)
    end += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, FULL, FULL, 0)
    return content, hole, directory + end


def one_tensor_each(keys, elements):
    """The pickle of a state dict with a tensor of one byte in each storage."""
    size = b"\x8a\x08" + struct.pack("<Q", elements)
    reference = b"((" + text("storage") + b"h\1%s" + text("cpu") + size + b"tQK\0K\1\x85K\1\x85\x89Nt"
    items = (text(key) + b"h\0" + reference % text(key) + b"R" for key in keys)
    return b"\x80\x02" + V2 + BYTES + b"}(" + b"".join(items) + b"u."


V2 = b"ctorch._utils\n_rebuild_tensor_v2\nq\0"
BYTES = b"ctorch\nByteStorage\nq\1"


def stored(pickle_bytes, *entries, **options):
    return zip_by_hand(LOCAL + pickle_bytes, [(b"a/data.pkl", 0, len(pickle_bytes)), *entries], **options)


def many(prefix, count, size=0, offset=0):
    return [(prefix + b"%d" % number, offset, size) for number in range(count)]


def legacy(pickle_bytes):
    first = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return first + pickle_bytes + pickle.dumps([], 2), 0, b""


def overlapping(pickle_bytes):
    content = LOCAL + pickle_bytes
    data = [(f"a/data/{key}".encode(), len(content), GIBI) for key in KEYS]
    return zip_by_hand(content + LOCAL, [(b"a/data.pkl", 0, len(pickle_bytes)), *data], hole=GIBI)


def header(start, unit, end, length=2**24):
    data = start + unit * (length // len(unit)) + end
    return struct.pack("<Q", len(data)) + data, 0, b""


GIBI = 2**30
FILL = 2**22
DEEP = 300_000
KEYS = [str(number) for number in range(1000)]
MEMO = b"".join(b"}r" + struct.pack("<I", 2**32 - 1 - number) for number in range(FILL // 6))
COLLIDING = b"".join(b"\x8a\x0a" + ((2**61 - 1) * number).to_bytes(10, "little") + b"N" for number in range(50_000))
TENSOR = b"h\0((" + text("storage") + b"h\1" + text("0") + text("cpu") + b"K\1tQK\0]q\2(" + b"K\1" * 32 + b"eh\2\x89Nt"

PICKLES = {
    "dictionaries": b"}" * FILL + b".",
    "a memo": MEMO + b".",
    "memoized": b"}\x94" * FILL + b".",
    "a nested tuple": b")" + b"\x85" * DEEP + b".",
    "a nested list": b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "one hash": b"}(" + COLLIDING + b"u.",
    "tensors": V2 + BYTES + b"}" + TENSOR + b"q\3" + b"h\0h\3R" * (FILL // 40) + b".",
    "text of 4 GiB": b"}X" + struct.pack("<I", FULL) + b".",
    "a number of 2 GiB": b"\x8b" + struct.pack("<I", 2**31 - 1) + b".",
    "a line without end": b"c" + b"x" * FILL,
}

ENDLESS = ("memoized", "text of 4 GiB", "a number of 2 GiB", "a line without end")

BOMBS = {
    **{f"{name}.zip.bin": lambda data=data: stored(data, (b"a/data/0", 0, 1)) for name, data in PICKLES.items()},
    **{f"{name}.legacy.bin": lambda name=name: legacy(PICKLES[name]) for name in ENDLESS},
    "legacy pickles of 4 GiB.bin": lambda: (legacy(b"\x80\x02]")[0][:-30] + b"(" * 99, 4 * GIBI, b""),
    "one entry twice.bin": lambda: stored(b"}.", (b"a/data.pkl", 0, 2)),
    "encrypted.bin": lambda: stored(b"}.", flags=1),
    "overlapping.bin": lambda: overlapping(one_tensor_each(KEYS, GIBI)),
    "its own pickle.bin": lambda: stored(one_tensor_each(["0"], 2), (b"a/data/0", 0, 2)),
    "a pickle of 4 GiB.bin": lambda: zip_by_hand(LOCAL, [(b"a/data.pkl", 0, 4 * GIBI)], hole=4 * GIBI),
    "beyond the file.bin": lambda: stored(one_tensor_each(["0"], 2**40), (b"a/data/0", 0, 2**40)),
    "far away.bin": lambda: stored(one_tensor_each(["0"], 2), (b"a/data/0", 2**63 + 7, 2)),
    "120,000 entries.bin": lambda: stored(b"}.", *many(b"a/", 120_000)),
    "500,000 entries.bin": lambda: zip_by_hand(LOCAL, many(b"", 500_000)),
    "entries that are not there.bin": lambda: stored(b"}.", count=2**60),
    "a directory of a hole.bin": lambda: (
        LOCAL,
        3 * GIBI,
        struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, 3 * GIBI - 1, 30, 0),
    ),
    "a header of 4 GiB.safetensors": lambda: (struct.pack("<Q", 4 * GIBI), 5 * GIBI, b""),
    "a header of a hole.safetensors": lambda: (struct.pack("<Q", 90_000_000), GIBI, b""),
    "a header that is not there.safetensors": lambda: (struct.pack("<Q", 99_999_999) + b"{", 0, b""),
    "lists.safetensors": lambda: header(b'{"a":[', b"[],", b"[]]}"),
    "objects.safetensors": lambda: header(b'{"a":[', b'{"":0},', b"[]]}"),
    "brackets.safetensors": lambda: header(b'{"a":', b"[", b"}"),
    "digits.safetensors": lambda: header(b'{"a":', b"9", b"}"),
    "sizes.safetensors": lambda: header(b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[', b"1,", b"1]}}", FILL),
}
"""What a file holds: its start, a hole of so many bytes, its end."""

HARMLESS = {"a memo.zip.bin", "120,000 entries.bin", "entries that are not there.bin"}
"""Large, and right: an empty state dict among much else."""

READ_THEM = """
import json, resource, sys, time
from pathlib import Path
from orchestrator.checkpoint.headers import read_header
from orchestrator.errors import CheckpointError, DoesNotFitError, RequestError
from orchestrator.tasks.session import fits, look

resource.setrlimit(resource.RLIMIT_AS, (3 * 2**29, 3 * 2**29))
for file in map(Path, sys.argv[1:]):
    start = time.monotonic()
    try:
        said = f"read: {len(read_header(file).tensors)}"
    except CheckpointError as error:
        said = "refused: " + str(error)
    print(json.dumps([file.name, said, time.monotonic() - start]), flush=True)
assert "torch" not in sys.modules
"""


def test_bombs_are_refused_in_little_memory_and_time(tmp_path):
    files = [tmp_path / name for name in BOMBS]
    for file in files:
        start, hole, end = BOMBS[file.name]()
        with file.open("wb") as stream:
            stream.write(start)
            stream.truncate(len(start) + hole)
            stream.seek(0, os.SEEK_END)
            stream.write(end)
    done = subprocess.run([sys.executable, "-c", READ_THEM, *files], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        name, said, seconds = json.loads(line)
        assert said.startswith("read: " if name in HARMLESS else "refused: "), (name, said)
        assert seconds < 20, name
    assert len(done.stdout.splitlines()) == len(BOMBS)


def sharded(folder):
    return write_model(folder, shards=2), folder / "model.safetensors.index.json"


NOT_PLAIN = {
    "a slash": "sub/outside.safetensors",
    "a parent": "../outside.safetensors",
    "a parent by a detour": "sub/../../outside.safetensors",
    "a backslash": "..\\outside.safetensors",
    "an absolute path": "{outside}",
    "a drive": "c:outside.safetensors",
    "a URL": "file:outside.safetensors",
    "NUL": "model\0.safetensors",
    "NUL behind": "../outside.safetensors\0.safetensors",
    "a line break": "model\n.safetensors",
    "an escape": "model\x1b[2J.safetensors",
    "half a character": "model\ud800.safetensors",
    "a right-to-left mark": "model\u202e.safetensors",
    "nothing": "",
    "a dot": ".",
    "two dots": "..",
    "too long": "m" * 300 + ".safetensors",
    "a suffix alone": ".safetensors",
    "another suffix": "config.json",
    "the index": "model.safetensors.index.json",
    "no text": 3,
    "null": None,
    "a list": ["model.safetensors"],
}


@pytest.mark.parametrize("name", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_an_index_leads_nowhere_but_into_its_folder(tmp_path, name):
    folder, file = sharded(tmp_path / "model")
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(good("safetensors"))
    (folder / "sub").mkdir()
    (folder / "sub" / "outside.safetensors").write_bytes(good("safetensors"))
    name = name.format(outside=outside) if isinstance(name, str) else name
    index = json.loads(file.read_text())
    index["weight_map"] |= dict.fromkeys(TENSORS, name)
    write_json(file, index)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert str(caught.value).isprintable()


def test_an_index_changed_at_random_never_escapes_as_another_error(tmp_path):
    chance = random.Random(SEED)
    folder, file = sharded(tmp_path / "model")
    data = file.read_bytes()
    wanted = open_checkpoint(folder).tensors
    for _ in range(CASES):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 2, 8))):
            changed[chance.randrange(len(data))] = chance.choice(b'\0"{}[]:,\\/.0\xff') if chance.random() < 0.7 else 7
        file.write_bytes(changed[: chance.choice((len(data), len(data), chance.randrange(len(data))))])
        with contextlib.suppress(CheckpointError):
            assert open_checkpoint(folder).tensors == wanted


@pytest.mark.parametrize("value", [[], 3, "a", None, {}, {"a": {}}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_of_another_shape_is_refused(tmp_path, value):
    folder, file = sharded(tmp_path / "model")
    write_json(file, value)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model-00000-of-00000", "model-00001-of-00000", "model-00009-of-00002"])
@pytest.mark.parametrize("alone", [True, False])
def test_shards_with_impossible_numbers_are_refused(tmp_path, name, alone):
    folder, file = sharded(tmp_path / "model")
    file.unlink()
    for shard in folder.glob("model-*") if alone else ():
        shard.unlink()
    (folder / f"{name}.safetensors").write_bytes(good("safetensors"))
    with pytest.raises(CheckpointError):
        read_weights(folder, MODEL_FORMATS)


@pytest.mark.parametrize("kind", ["directory", "pipe", "loop"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path, name, kind):
    file = tmp_path / name
    {"directory": file.mkdir, "pipe": lambda: os.mkfifo(file), "loop": lambda: file.symlink_to(file)}[kind]()
    with pytest.raises(CheckpointError, match=re.escape(name)):
        read_weights(tmp_path, MODEL_FORMATS)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_links_are_followed_as_the_hub_s_cache_is_made_of_them(tmp_path, kind):
    plain = write_model(tmp_path / "plain", kind=kind, shards=2)
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(plain.iterdir())):
        file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    (tmp_path / "model").symlink_to(snapshot)
    found = open_checkpoint(tmp_path / "model")
    assert found.config == CONFIG
    assert len(found.files) == 2
    assert found.index_digest
    assert all(
        len(read_words(info, 0, info.shape[0] if info.shape else 1).tobytes()) == info.nbytes
        for info in found.tensors.values()
    )
    for link in snapshot.iterdir():
        if link.suffix == ".json" and "index" not in link.name and link.name != "config.json":
            continue
        blob = blobs / link.readlink().name
        blob.rename(tmp_path / "aside")
        with pytest.raises(CheckpointError, match=re.escape(link.name)):
            open_checkpoint(tmp_path / "model")
        (tmp_path / "aside").rename(blob)


STRANGE = (
    *(None, "", "4", "x" * 100_000, "\x1b[31m\n\0", -1, 0, 7, 2**31, 2**39, 2**63, 10**30, 10**400, 1.5, True),
    *(float("nan"), float("inf"), [], ["x"], [[1]] * 3, [[[[]]]], {}, {"a": 1}, {"rope_type": []}),
    *({"quant_method": []}, {"quant_method": "gptq", "bits": -1, "group_size": 0}),
)
MORE_KEYS = ("rope_scaling", "rope_parameters", "sliding_window", "layer_types", "quantization_config", "text_config")
MORE_KEYS += ("num_experts", "partial_rotary_factor", "attention_bias", "mlp_bias", "dtype")


@pytest.mark.parametrize("weights", [True, False], ids=["headers", "a config alone"])
@pytest.mark.parametrize("argv", [(), ("backend=exllamav2",), ("backend=vllm",)], ids=str)
def test_a_config_changed_at_random_is_planned_or_refused_in_one_line(tmp_path, hydra, every_engine, weights, argv):
    chance = random.Random(SEED)
    folder, shape = tmp_path / "model", small_models.Llama()
    if weights:
        small_models.write_headers(folder, shape)
    folder.mkdir(exist_ok=True)
    config = composed("task=plan", "hardware=2x24gb", f"model.path={folder}", f"paths.artifacts={tmp_path}", *argv)
    ended, said = [], []
    for _ in range(25):
        values = shape.config()
        for key in chance.sample([*values, *MORE_KEYS], chance.choice((1, 1, 2, 4))):
            values[key] = chance.choice(STRANGE)
        write_json(folder / "config.json", values)
        try:
            planned = look(config, planning=True, download=False, bare=True)
            json.dumps(planned.to_json(), allow_nan=False)
            fits(planned)
            ended.append(0)
        except (RequestError, DoesNotFitError) as error:
            ended.append(error.exit_code)
            said.append(str(error))
    assert {0, 2} <= set(ended) <= {0, 2, 3}
    assert all(message.isprintable() and len(message) < 3000 for message in said)
