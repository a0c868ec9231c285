"""task=chat as a person has it: in a terminal, and with questions from a pipe."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commands import Orchestrator, gone, hear_interrupts

QUESTION = "What does len do?"
ANSWER = "Return the number of items in a container."


class Terminal:
    """A command in a terminal of its own: what is typed goes in, what is shown comes out."""

    def __init__(self, orchestrator: Orchestrator, *argv: str) -> None:
        self.fd, theirs = pty.openpty()
        env = {**orchestrator.env(), "TERM": "dumb"}
        self.process = subprocess.Popen(
            orchestrator.command(*argv),
            cwd=orchestrator.folder,
            env=env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def read(self, seconds: float) -> bool:
        """Takes in what is shown within some seconds; False at the end."""
        if select.select([self.fd], [], [], seconds)[0]:
            try:
                data = os.read(self.fd, 65536)
            except OSError:  # the other side is closed
                return False
            self.shown += data.decode(errors="replace").replace("\r\n", "\n")
            return bool(data)
        return True

    def until(self, text: str, seconds: float = 60) -> str:
        """Waits until a text is shown; returns what came before it, which is then forgotten."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} is not shown: {self.shown[-2000:]!r}"
            assert self.read(0.2), f"ended before {text!r}: {self.shown[-2000:]!r}"
        before, _, self.shown = self.shown.partition(text)
        return before

    def interrupt_until(self, text: str) -> None:
        """Types Ctrl-C until a text is shown: one that comes just before readline begins to wait is only seen later."""
        for _ in range(10):
            self.type("\x03")
            deadline = time.monotonic() + 3
            while text not in self.shown and time.monotonic() < deadline:
                assert self.read(0.2), f"ended before {text!r}: {self.shown[-2000:]!r}"
            if text in self.shown:
                break
        self.until(text)

    def ask(self, text: str) -> str:
        """Types a line and returns what is shown until the next prompt."""
        self.type(text + "\n")
        self.until(text)
        return self.until("\n> ").strip()

    def end(self) -> int:
        """Waits for the end; the exit code."""
        deadline = time.monotonic() + 20
        while self.read(0.1) and self.process.poll() is None:
            assert time.monotonic() < deadline, self.shown[-2000:]
        return self.process.wait(10)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.fd)


def take_terminal() -> None:
    """Makes the terminal the child's own, so that Ctrl-C typed there reaches it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    hear_interrupts()


@pytest.fixture
def terminal(orchestrator: Orchestrator, merged: Path) -> Iterator[Terminal]:
    """A conversation with the merged embedded model, ready for the first line."""
    opened = Terminal(orchestrator, "task=chat", f"model.path={merged}", "quant.bits=32")
    opened.until("\n> ")
    yield opened
    opened.close()


def conversation(orchestrator: Orchestrator) -> list[dict[str, str]]:
    [run] = orchestrator.runs.iterdir()
    messages: list[dict[str, str]] = json.loads((run / "conversation.json").read_text(encoding="utf-8"))
    return messages


def status(orchestrator: Orchestrator) -> dict[str, object]:
    [run] = orchestrator.runs.iterdir()
    found: dict[str, object] = json.loads((run / "status.json").read_text(encoding="utf-8"))
    return found


def test_a_conversation_is_kept_saved_and_forgotten(orchestrator: Orchestrator, terminal: Terminal) -> None:
    assert terminal.ask(QUESTION) == ANSWER
    terminal.ask("And what is KeyError?")
    messages = conversation(orchestrator)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"] == QUESTION
    assert messages[1]["content"] == ANSWER
    assert "saved 4 messages" in terminal.ask("/save my talk.json")
    assert json.loads((orchestrator.folder / "my talk.json").read_text())["messages"] == messages
    assert "No such file" in terminal.ask("/save nowhere/talk.json")
    assert "forgotten" in terminal.ask("/reset")
    assert "/quit" in terminal.ask("/what")
    assert terminal.ask(QUESTION) == ANSWER
    assert len(conversation(orchestrator)) == 2
    engine = psutil.Process(terminal.process.pid).children()
    terminal.type("/quit\n")
    assert terminal.end() == 0
    assert gone(engine)
    assert status(orchestrator)["state"] == "done"
    [run] = orchestrator.runs.iterdir()
    assert json.loads((run / "result.json").read_text())["turns"] == 3


def test_a_question_longer_than_the_context_costs_a_line(orchestrator: Orchestrator, merged: Path) -> None:
    done = orchestrator(
        *("task=chat", f"model.path={merged}", "quant.bits=32", "model.max_context=64"),
        stdin="word " * 200 + f"\n{QUESTION}\n",
    )
    assert done.code == 0, done.err
    assert "error: prompt 1" in done.err
    assert ANSWER in done.out
    assert [message["content"] for message in done.json("conversation.json")] == [QUESTION, ANSWER]


def test_ctrl_d_ends_a_conversation_and_ctrl_c_does_not(orchestrator: Orchestrator, terminal: Terminal) -> None:
    terminal.type("half a line")
    terminal.until("half a line")  # the terminal drops what is not read yet at Ctrl-C, and readline then waits for more
    terminal.interrupt_until("/quit or Ctrl-D ends")
    terminal.until("\n> ")
    assert terminal.ask(QUESTION) == ANSWER
    terminal.type("\x04")
    assert terminal.end() == 0
    assert status(orchestrator)["state"] == "done"


def test_ctrl_c_stops_an_answer_and_not_the_program(orchestrator: Orchestrator, long_winded: Path) -> None:
    terminal = Terminal(orchestrator, "task=chat", f"model.path={long_winded}", "generation.max_tokens=1900")
    try:
        terminal.until("\n> ")
        terminal.type("go on\n")
        terminal.until("go on\n")
        terminal.read(10)
        time.sleep(0.5)
        terminal.type("\x03")
        stopped = time.monotonic()
        terminal.until("\n> ")
        assert time.monotonic() - stopped < 5
        [_, answer] = conversation(orchestrator)
        assert answer["content"]
        terminal.type("more\n")
        terminal.until("more\n")
        terminal.read(10)
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == 130
        assert status(orchestrator)["state"] == "interrupted"
    finally:
        terminal.close()


def test_questions_from_a_pipe_are_answered_with_their_history(orchestrator: Orchestrator, long_winded: Path) -> None:
    """The history is in the prompt: in so small a context the oldest messages have to go, which is said."""
    done = orchestrator(
        *("task=chat", f"model.path={long_winded}", "model.max_context=96", "generation.max_tokens=20"),
        stdin="one\n\ntwo\nthree\nfour\n/quit\nfive\n",
    )
    assert done.code == 0, done.err
    assert "are left out" in done.err
    assert "> " not in done.err
    messages = done.json("conversation.json")
    assert messages[-2]["content"] == "four"
    assert "one" not in [message["content"] for message in messages]
    assert done.json("result.json")["turns"] == 4


@pytest.mark.parametrize("questions", ["one\n", "go on\n" * 50])
def test_ctrl_c_ends_a_chat_that_no_terminal_feeds(
    orchestrator: Orchestrator, long_winded: Path, questions: str
) -> None:
    argv = orchestrator.command("task=chat", f"model.path={long_winded}", "generation.max_tokens=400")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(argv, cwd=orchestrator.folder, env=orchestrator.env(), text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            process.stdin.write(questions)
            process.stdin.flush()
            assert process.stdout.read(1)  # it answers
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
        finally:
            process.kill()
