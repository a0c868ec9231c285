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
from orchestrator.checkpoint.tokenizer import tokenizer_files
from orchestrator.errors import ConfigError, StageError
from orchestrator.stages import parquet_child
from orchestrator.tokenizer import Tokenizer

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
