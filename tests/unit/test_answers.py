"""answers.jsonl survives kills; answers are shown in the order of their prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.errors import RequestError
from orchestrator.prompts import Prompt
from orchestrator.tasks.answers import AnswersFile
from orchestrator.tasks.run import InOrder


def prompt(index: int, **carried: object) -> Prompt:
    return Prompt(index, [{"role": "user", "content": f"question {index}"}], carried)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def test_an_answer_is_on_the_disk_as_soon_as_it_is_added(path: Path) -> None:
    AnswersFile(path).add(prompt(0, id="a"), {"answer": "é, \u2028 and\nmore"})
    assert lines_of_jsonl(path) == [{"id": "a", "index": 0, "prompt": "question 0", "answer": "é, \u2028 and\nmore"}]


def lines_of_jsonl(path: Path) -> list[dict[str, object]]:
    """As a JSONL reader does it: a newline and nothing else ends a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_carried_fields_cannot_replace_the_answers_own(path: Path) -> None:
    answers = AnswersFile(path)
    mine = {"index": "mine", "answer": "mine", "id": 1}
    answers.add(Prompt(3, [{"role": "user", "content": "question 3"}], mine), {"answer": "its"})
    assert lines_of_jsonl(path) == [{"index": 3, "answer": "its", "id": 1, "prompt": "question 3"}]


def test_at_the_end_they_are_in_the_order_of_the_prompts(path: Path) -> None:
    answers = AnswersFile(path)
    for i in (2, 0, 10, 1):
        answers.add(prompt(i), {"answer": str(i)})
    answers.finish()
    assert [line["index"] for line in lines_of_jsonl(path)] == [0, 1, 2, 10]
    assert list(path.parent.iterdir()) == [path]


def test_a_second_process_keeps_what_the_first_one_wrote(path: Path) -> None:
    AnswersFile(path).add(prompt(1), {"answer": "one"})
    answers = AnswersFile(path)
    assert set(answers.answered) == {1}
    answers.add(prompt(0), {"answer": "zero"})
    answers.finish()
    assert [line["answer"] for line in lines_of_jsonl(path)] == ["zero", "one"]


def test_answers_with_unusual_line_separators_are_read_again(path: Path) -> None:
    AnswersFile(path).add(prompt(0), {"answer": "one\u2028two\x85three"})
    assert AnswersFile(path).answered[0]["answer"] == "one\u2028two\x85three"


def test_the_half_line_that_a_kill_leaves_is_dropped(path: Path) -> None:
    whole = json.dumps({"index": 0, "answer": "é"}, ensure_ascii=False) + "\n"
    path.write_bytes(whole.encode() + '{"index": 1, "answer": "é'.encode()[:-1])
    answers = AnswersFile(path)
    assert set(answers.answered) == {0}
    answers.add(prompt(1), {"answer": "anew"})
    assert [line["answer"] for line in lines_of_jsonl(path)] == ["é", "anew"]


@pytest.mark.parametrize("damage", ["{", "[]", '{"answer": "no index"}', '{"index": null}', "", "\xff"])
def test_a_damaged_line_in_the_middle_is_refused_with_its_number(path: Path, damage: str) -> None:
    before = b'{"index": 0}\n' + damage.encode("latin-1") + b'\n{"index": 2}\n'
    path.write_bytes(before)
    with pytest.raises(RequestError, match=f"{path} line 2"):
        AnswersFile(path)
    assert path.read_bytes() == before


def test_answers_are_shown_in_order_while_the_first_one_streams(capsys: pytest.CaptureFixture[str]) -> None:
    shown = InOrder([prompt(i) for i in range(3)])
    shown.begin()
    shown.text("1", "B1")
    shown.text("0", "A1 ")
    assert capsys.readouterr().out == "> question 0\nA1 "
    shown.end("1")
    shown.text("2", "C1 ")
    shown.text("0", "A2")
    assert capsys.readouterr().out == "A2"
    shown.end("0")
    assert capsys.readouterr().out == "\n\n> question 1\nB1\n\n> question 2\nC1 "
    shown.text("2", "C2")
    shown.end("2")
    assert capsys.readouterr().out == "C2\n\n"
