"""Calibration of a conversion to EXL2 with texts of the user's: what the converter gets, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from exl2_bench import Bench, make_bench

from orchestrator import embedded
from orchestrator.backends.exl2_texts import pieces, texts
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.tokenizer import tokenizer_files
from orchestrator.errors import ConfigError, StageError
from orchestrator.pipeline import Source, check_stages
from orchestrator.stages import exl2_calibration, parquet_child
from orchestrator.tokenizer import Tokenizer, count_tokens

ROWS = ("quant.calibration.rows=2", "quant.calibration.length=128")
TALK = [{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A sequence."}]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = make_bench(tmp_path, monkeypatch)
    for file in tokenizer_files(embedded.BASE):
        shutil.copy(file, made.source)
    return made


def given(bench: Bench) -> list[str]:
    """The texts that the converter got, in each of its runs."""
    lines = [line for line in bench.log.splitlines() if line.startswith("calibration ")]
    files = [json.loads(line.removeprefix("calibration ")) for line in lines]
    return ["".join(json.loads(file.removeprefix("PAR1").removesuffix("PAR1"))["text"]) for file in files]


def test_lines_of_a_text_file(bench: Bench) -> None:
    file = bench.folder / "mine.txt"
    file.write_text("First line.\n\n  second, indented\n" + "more of it, and more\n" * 60)
    model = bench.quantize(4.0, f"quant.calibration.file={file}", *ROWS)
    assert given(bench) == [file.read_text().replace("\n\n", "\n")] * 2
    measuring, quantizing = bench.runs()
    assert (measuring["r"], measuring["mr"], measuring["ml"], quantizing["r"]) == (2, 2, 128, 2)
    assert Path(measuring["c"]).parts[-2:] == ("work", "mine.parquet")
    assert not list(model.path.glob("*.parquet"))
    assert bench.quantize(5.0, f"quant.calibration.file={file}", *ROWS).built[0].startswith("exl2-")  # measured once
    file.write_text(file.read_text() + "another\n")
    assert len(bench.quantize(4.0, f"quant.calibration.file={file}", *ROWS).built) == 2


@pytest.mark.parametrize(
    ("line", "messages"),
    [
        ({"messages": TALK}, TALK),
        ({"prompt": "What is a list?", "answer": "A sequence."}, TALK),
        ({"prompt": "What is a list?"}, TALK[:1]),
    ],
)
def test_conversations_as_the_model_sees_them(
    bench: Bench, line: dict[str, Any], messages: list[dict[str, str]]
) -> None:
    file = bench.folder / "mine.jsonl"
    file.write_text(json.dumps({"text": "Plain text."}) + "\n" + f"{json.dumps(line)}\n" * 60)
    bench.quantize(4.0, f"quant.calibration.file={file}", *ROWS)
    text = Tokenizer(bench.source, None, False).conversation(messages)
    assert "A sequence." in text or len(messages) == 1
    assert text != messages[0]["content"]  # the template is around it
    assert given(bench)[0] == "Plain text.\n" + f"{text}\n" * 60


@pytest.mark.parametrize(
    ("lines", "options", "hint"),
    [
        (60, (), "Type quant.calibration.rows=1 quant.calibration.length="),
        (600, (), "Type quant.calibration.rows="),
        (60, ("quant.calibration.rows=30", "quant.calibration.length=128"), "Type quant.calibration.rows="),
        (1, (), "Give more text, or leave quant.calibration.file out"),
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "parquet"])
def test_too_few_tokens(bench: Bench, lines: int, options: tuple[str, ...], hint: str, suffix: str) -> None:
    file = bench.folder / f"mine.{suffix}"
    text = ["more of it, and more"] * lines
    file.write_text(f"PAR1{json.dumps({'a': text})}PAR1" if suffix == "parquet" else "\n".join(text))
    with pytest.raises(ConfigError, match=r"has [\d,]+ tokens, and quant\.calibration\.rows=") as caught:
        bench.quantize(4.0, f"quant.calibration.file={file}", *options)
    assert hint in caught.value.hint
    if "rows" in hint:  # what it says to type works
        words = caught.value.hint.removeprefix("Type ").partition(",")[0].split()
        asked = {"quant.calibration.length": "128"} if options else {}
        asked |= dict(word.split("=") for word in words)
        bench.quantize(4.0, f"quant.calibration.file={file}", *(f"{key}={value}" for key, value in asked.items()))


def check(bench: Bench, file: Path, *options: str, here: bool) -> None:
    """What is looked at before anything is merged: by a plan, and by a run (`here`)."""
    config = bench.config(f"quant.calibration.file={file}", *options)
    check_stages(config, Source(open_checkpoint(bench.source)), bench.chosen(4.0), here=here)


@pytest.mark.parametrize("here", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\nno JSON\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "' + b"more of it, and more " * 500 + b'"}\n{"a": 1}\n', "line 2 has no text"),
        ("a.txt", b"more of it, and more\n" * 500 + b"\xff\n", "is not UTF-8"),
        ("a.txt", b"six words, and no more here\n", r"has (about )?\d+ tokens, and .*rows=2 .*length=128 take 256"),
    ],
)
def test_texts_that_cannot_do_are_refused_before_the_merge(
    bench: Bench, name: str, content: bytes, message: str, here: bool
) -> None:
    file = bench.folder / name
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        check(bench, file, *ROWS, here=here)
    file.write_text('{"text": "more of it, and more"}\n' * 200)
    check(bench, file, *ROWS, here=here)


def test_a_plan_refuses_only_what_it_can_count(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    file = bench.folder / "mine.jsonl"
    file.write_text('{"text": "one"}\n{"prompt": "two"}\n')
    check(bench, file, *ROWS, here=False)  # a template is around it
    with pytest.raises(ConfigError, match=r"has \d+ tokens"):
        check(bench, file, *ROWS, here=True)
    file = bench.folder / "mine.txt"
    file.write_text("more of it\n" * 20)
    check(bench, file, *ROWS, "model.trust_remote_code=true", here=False)
    (bench.source / "tokenizer.json").rename(bench.folder / "kept.json")
    check(bench, file, *ROWS, here=False)
    (bench.source / "tokenizer.json").write_text("{}")
    check(bench, file, *ROWS, here=False)
    (bench.folder / "kept.json").replace(bench.source / "tokenizer.json")
    with pytest.raises(ConfigError, match="has about"):
        check(bench, file, *ROWS, here=False)
    monkeypatch.setattr(exl2_calibration, "_PLANNED", 100)
    check(bench, file, *ROWS, here=False)


def test_tokens_without_transformers(tmp_path: Path) -> None:
    text = (embedded.BASE.parent / "heldout.txt").read_text(encoding="utf-8")[:20_000]
    found = len(Tokenizer(embedded.BASE, None, False).encode_text(text))
    assert count_tokens(embedded.BASE, [text], 10**6) == found
    assert count_tokens(embedded.BASE, [text] * 3, found + 1) == 2 * found
    content = json.loads((embedded.BASE / "tokenizer.json").read_text(encoding="utf-8"))
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"truncation": cut}))
    assert count_tokens(tmp_path, [text], 10**6) == found
    assert count_tokens(tmp_path / "nowhere", [text], 10**6) is None


def test_a_parquet_file_goes_as_it_is(bench: Bench) -> None:
    file = bench.folder / "mine.parquet"
    file.write_text(f"PAR1{json.dumps({'text': ['more of it, and more'] * 60, 'id': list(range(60))})}PAR1")
    bench.quantize(4.0, f"quant.calibration.file={file}", *ROWS)
    assert [run["c"] for run in bench.runs()] == [str(file)] * 2
    file.write_text("PAR1no parquetPAR1")
    with pytest.raises(ConfigError, match=r"cannot be read as \.parquet: .*JSONDecodeError"):
        bench.quantize(4.0, f"quant.calibration.file={file}", *ROWS)


def test_it_is_there_when_a_killed_run_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    file = bench.folder / "mine.txt"
    file.write_text("more of it, and more\n" * 60)
    monkeypatch.setenv("FAKE_FAULT", "kill swapped 2")
    with pytest.raises(StageError, match="killed by signal 9"):
        bench.quantize(4.0, f"quant.calibration.file={file}", *ROWS)
    monkeypatch.delenv("FAKE_FAULT")
    bench.quantize(4.0, f"quant.calibration.file={file}", *ROWS)
    assert given(bench) == [file.read_text()] * 3
    assert bench.modules() == [1, 2, 2, 3, 1, 2, 3]


def test_pieces_are_neither_many_nor_long(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n" + b"two\r\n" * 3000)
    found = list(pieces(str(text) for text in texts(file)))
    assert "".join(found) == "one\n" + "two\n" * 3000
    assert {len(piece) // 1000 for piece in found[:-1]} == {4}
    file.write_bytes(b"one\n\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        list(texts(file))


def test_a_real_parquet_file(tmp_path: Path) -> None:
    pytest.importorskip("fastparquet")
    command = [sys.executable, parquet_child.__file__]
    found = ["with\na break\n", "ünï 漢字", ""]
    lines = "".join(f"{json.dumps(text)}\n" for text in found)
    subprocess.run([*command, "write", tmp_path / "a.parquet"], input=lines, text=True, check=True)
    done = subprocess.run([*command, "read", tmp_path / "a.parquet"], capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == found
