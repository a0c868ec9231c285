"""Prompts: every documented form is read, everything else is refused with its line."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import Config
from orchestrator.errors import RequestError
from orchestrator.prompts import Prompt, read_prompts


def read(file: Path | str | None = None, text: Any = None, default: Path | None = None) -> list[Prompt]:
    config = Config()
    config.prompts.file = None if file is None else str(file)
    config.prompts.text = text
    return read_prompts(config, default)


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    prompts = read(written(tmp_path, "p.txt", "first\n\n  \nsecond, = {x}\r\nlast without an end"))
    assert [p.text for p in prompts] == ["first", "second, = {x}", "last without an end"]
    assert [p.index for p in prompts] == [0, 1, 2]
    assert prompts[0].messages == user("first")


def test_the_first_line_of_a_file_of_any_other_suffix_tells_what_it_is(tmp_path: Path) -> None:
    assert read(written(tmp_path, "p.prompts", '{"prompt": "x"}\n'))[0].text == "x"
    assert read(written(tmp_path, "p.md", "x\n"))[0].text == "x"
    assert read(written(tmp_path, "p.txt", '{"prompt": "x"}\n'))[0].text == '{"prompt": "x"}'


@pytest.mark.parametrize("field", ["answer", "index", "finish_reason"])
def test_a_field_that_the_answer_has_too_is_refused_by_name(tmp_path: Path, field: str) -> None:
    line = json.dumps({"prompt": "x", field: "mine"})
    with pytest.raises(RequestError, match=f"line 1 has a field '{field}'"):
        read(written(tmp_path, "p.jsonl", line))


@pytest.mark.parametrize(
    ("line", "said"), [('{"prompt": "\\ud800"}', "surrogate"), ('{"prompt": "x", "y": NaN}', "NaN")]
)
def test_what_is_no_text_and_what_is_no_json_is_refused(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        read(written(tmp_path, "p.jsonl", line))


@pytest.mark.parametrize("name", ["p.jsonl", "p.ndjson", "p.JSONL", "p.json"])
def test_a_jsonl_file_has_an_object_a_line(tmp_path: Path, name: str) -> None:
    turns = [{"role": "system", "content": "Be short."}, *user("Why?")]
    lines = [{"id": 7, "prompt": "first"}, {"messages": turns, "tags": ["a"], "gold": "x"}]
    first, second = read(written(tmp_path, name, "\n".join(map(json.dumps, lines)) + "\n\n"))
    assert (first.messages, first.carried) == (user("first"), {"id": 7})
    assert (second.messages, second.carried) == (turns, {"tags": ["a"], "gold": "x"})
    assert second.text == "Why?"


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_byte_order_mark_is_not_part_of_a_prompt(tmp_path: Path, name: str) -> None:
    content = "hello" if name == "p.txt" else '{"prompt": "hello"}'
    assert read(written(tmp_path, name, "\ufeff" + content))[0].text == "hello"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_line(tmp_path: Path, separator: str) -> None:
    text = f"one{separator}two"
    line = json.dumps({"prompt": text}, ensure_ascii=False)
    assert [p.text for p in read(written(tmp_path, "p.txt", text + "\n"))] == [text]
    assert [p.text for p in read(written(tmp_path, "p.jsonl", line + "\n"))] == [text]


@pytest.mark.parametrize("content", ["", "\n\n", "   \n\t\n", "\ufeff"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(RequestError, match=f"{path} holds no prompt"):
        read(path)


def test_what_is_not_utf8_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="byte 3 is not UTF-8"):
        read(written(tmp_path, "p.txt", b"abc\xff\n"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("plain text", "not JSON"),
        ("[]", '"prompt" or "messages"'),
        ("3", '"prompt" or "messages"'),
        ("{}", '"prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', '"prompt" or "messages"'),
        ('{"prompt": 3}', "not a text"),
        ('{"prompt": null}', "not a text"),
        ('{"messages": []}', '"messages" is a list'),
        ('{"messages": "hi"}', '"messages" is a list'),
        ('{"messages": ["hi"]}', '"messages" is a list'),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "system|user"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', "system|user"),
        ('{"messages": [{"role": "user"}]}', '"content": text'),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', '"content": text'),
    ],
)
def test_a_wrong_line_is_refused_with_its_number(tmp_path: Path, line: str, said: str) -> None:
    path = written(tmp_path, "p.jsonl", '{"prompt": "right"}\n\n' + line + "\n")
    with pytest.raises(RequestError) as caught:
        read(path)
    assert f"{path} line 3" in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_line_nested_too_deep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="line 1"):
        read(written(tmp_path, "p.jsonl", '{"prompt": "x", "deep": ' + "[" * 100_000 + "\n"))


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ('{"prompt": "one"}\n{"prompt": "two", "id": 1}\n', ["one", "two"]),
        ('\n  {"prompt": "one"}\n', ["one"]),
    ],
)
def test_standard_input_is_text_or_jsonl(monkeypatch: pytest.MonkeyPatch, content: str, texts: list[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert [p.text for p in read("-")] == texts


def test_standard_input_that_is_empty_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(RequestError, match="standard input holds no prompt"):
        read("-")


def test_standard_input_that_is_not_utf8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\xff\n"), encoding="utf-8"))
    with pytest.raises(RequestError, match="UTF-8"):
        read("-")


@pytest.mark.parametrize(
    ("text", "texts"), [("one, two", ["one, two"]), (["a", "b"], ["a", "b"]), (4, ["4"]), ([1.5, "x"], ["1.5", "x"])]
)
def test_texts_of_the_command_line(text: Any, texts: list[str]) -> None:
    assert [p.text for p in read(text=text)] == texts


@pytest.mark.parametrize("text", ["", "  ", [], [""]])
def test_an_empty_text_is_refused(text: Any) -> None:
    with pytest.raises(RequestError, match=r"prompts\.text holds no prompt"):
        read(text=text)


@pytest.mark.parametrize(("file", "said"), [("missing.txt", "No such file"), (".", "directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, file: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        read(tmp_path / file)
    assert str(tmp_path) in str(caught.value)


def test_the_default_is_read_where_nothing_is_named(tmp_path: Path) -> None:
    default = written(tmp_path, "default.jsonl", '{"prompt": "shipped"}\n')
    assert read(default=default)[0].text == "shipped"
    assert read(text="mine", default=default)[0].text == "mine"


def test_without_prompts_the_ways_to_give_them_are_told() -> None:
    with pytest.raises(RequestError, match=r"prompts\.text.*prompts\.file.*task=chat"):
        read()
