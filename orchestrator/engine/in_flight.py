"""The requests that an engine has, as its parent sees them, and the most that they held at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.backends.protocol import Delta, Event, Request


@dataclass(frozen=True)
class Held:
    """Requests at one moment: how many, and the tokens of their prompts, and with their answers."""

    sequences: int = 0
    prompt_tokens: int = 0
    tokens: int = 0


class InFlight:
    """Requests from their submission to their last event. Not for several threads at a time.

    Attributes:
        most: what was held when it was most. Never more than the engine had: a request that gave no token may wait.
    """

    def __init__(self) -> None:
        self.most = Held()
        self._prompts: dict[str, int] = {}  # request id -> tokens
        self._made: dict[str, int] = {}  # of those that gave some

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._prompts

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, request: Request) -> None:
        """It has been submitted."""
        self._prompts[request.id] = len(request.tokens)

    def take(self, events: Iterable[Event]) -> None:
        """What the engine reported together."""
        ended = []
        for event in events:
            if not isinstance(event, Delta):
                ended.append(event.id)
            elif event.id in self._prompts:
                self._made[event.id] = self._made.get(event.id, 0) + len(event.tokens)
        prompts = sum(self._prompts[name] for name in self._made)
        now = Held(len(self._made), prompts, prompts + sum(self._made.values()))
        self.most = max(self.most, now, key=lambda held: held.tokens)
        for name in ended:
            self._prompts.pop(name, None)
            self._made.pop(name, None)
