"""task=chat: a conversation in the terminal."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from orchestrator.backends.protocol import Delta, Failed, Finished
from orchestrator.config import Config
from orchestrator.errors import OrchestratorError, RequestError, Terminated
from orchestrator.prompts import Message, Prompt
from orchestrator.report.console import note
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.run import check_stop_tokens, make_request
from orchestrator.tasks.session import Session, look, open_session

HELP = "/reset forgets the conversation, /save FILE writes it (JSON), /quit or Ctrl-D ends; Ctrl-C stops an answer"


@dataclass
class Conversation:
    """The messages so far, and how many turns there were (each turn's request needs an id of its own)."""

    messages: list[Message] = field(default_factory=list)
    turns: int = 0


def chat(config: Config, folder: RunFolder) -> None:
    """Loads the model and talks until the person ends it. The conversation is kept in the run's folder.

    Raises:
        OrchestratorError: as in task=run; a message that does not fit only costs a line.
    """
    planned = look(config, planning=False)
    check_stop_tokens(config, planned.spec.vocab)
    with open_session(planned, folder) as session:
        folder.status("chatting")
        note(HELP)
        conversation = Conversation()
        while (line := _ask()) is not None:
            if line.startswith("/"):
                if not _command(line, conversation):
                    break
            elif line.strip():
                _turn(session, conversation, line)
                folder.write("conversation.json", conversation.messages)
        folder.write("result.json", session.result() | {"turns": conversation.turns})
        with suppress(OrchestratorError):  # the engine may have died since its last answer
            session.remember(session.engine.stats())


def _ask() -> str | None:
    """The person's next line; None at the end. Ctrl-C at the prompt clears the line, as shells do."""
    while True:
        try:
            if sys.stdin.isatty():
                import readline  # noqa: F401  (line editing and history for input)
            line = input("\n> " if sys.stdin.isatty() else "")
            return line.encode(errors="replace").decode()  # bytes that are no UTF-8 come as half surrogate pairs
        except UnicodeDecodeError as error:
            note(f"byte {error.start} is not UTF-8")
        except EOFError:
            return None
        except Terminated:
            raise
        except KeyboardInterrupt:
            if not sys.stdin.isatty():  # nobody is there to type anything more
                raise
            note("\n(/quit or Ctrl-D ends)")


def _command(line: str, conversation: Conversation) -> bool:
    """Does a /command; False ends the conversation."""
    name, _, argument = line.strip().partition(" ")
    if name in ("/quit", "/exit"):
        return False
    if name == "/reset":
        conversation.messages.clear()
        note("forgotten")
    elif name == "/save":
        _save(argument.strip(), conversation)
    else:
        note(HELP)
    return True


def _save(argument: str, conversation: Conversation) -> None:
    if not argument:
        note("/save FILE")
        return
    path = Path(os.path.expanduser(argument))
    try:
        path.write_text(json.dumps({"messages": conversation.messages}, ensure_ascii=False, indent=1) + "\n", "utf-8")
        note(f"saved {len(conversation.messages)} messages to {path}")
    except (OSError, ValueError) as error:
        note(f"{path}: {error}")


def _turn(session: Session, conversation: Conversation, text: str) -> None:
    """One question and its answer; an answer that was stopped stays in the conversation as far as it came."""
    conversation.turns += 1
    conversation.messages.append({"role": "user", "content": text})
    config, context = session.planned.config, session.chosen.max_context
    room = min(config.generation.max_tokens, context // 4)  # an answer gets at least so many tokens
    try:
        dropped = _shorten(session, conversation, context - room)
        request = make_request(
            config, session.tokenizer, Prompt(conversation.turns - 1, conversation.messages, {}), context
        )
    except RequestError as error:
        conversation.messages.pop()
        note(f"error: {error}")
        return
    if dropped:
        note(f"(the context of {context} tokens is full: the oldest {dropped} messages are left out)")
    session.engine.submit(request)
    answer = _stream(session, request.id)
    conversation.messages.append({"role": "assistant", "content": answer})


def _shorten(session: Session, conversation: Conversation, limit: int) -> int:
    """Drops the oldest turns, never a system message, until the conversation leaves room for an answer."""
    dropped = 0
    messages = conversation.messages
    first = 1 if messages[0]["role"] == "system" else 0
    while len(messages) - first > 2 and len(session.tokenizer.encode(messages)) > limit:
        del messages[first : first + 2]
        dropped += 2
    return dropped


def _stream(session: Session, name: str) -> str:
    """Prints an answer as it comes; Ctrl-C stops the answer and not the program.

    Raises:
        EngineError: the engine died.
    """
    parts: list[str] = []
    with _stopped_by_interrupt(session, name):
        while True:
            for event in session.engine.events(timeout=None):
                match event:
                    case Delta(text=text):
                        parts.append(text)
                        sys.stdout.write(text)
                        sys.stdout.flush()
                    case Finished() | Failed():
                        tail = f"[failed: {event.message}]" if isinstance(event, Failed) else ""
                        sys.stdout.write(f"{tail}\n")
                        sys.stdout.flush()
                        return "".join(parts)


@contextmanager
def _stopped_by_interrupt(session: Session, name: str) -> Iterator[None]:
    """Ctrl-C cancels the request; a second one, while the engine does not react, interrupts the program.

    So does the first where the questions do not come from a terminal.

    A handler, not an exception: an exception could fall between two bytes of the engine's messages.
    """
    asked = not sys.stdin.isatty()

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        session.engine.cancel(name)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
