"""Several transfers at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def together(work: Callable[[T], None], items: Sequence[T], at_once: int) -> Iterator[T]:
    """Does the work for all items, several at a time; yields five times a second which one is being waited for.

    Daemon threads: one that waits for a silent server does not keep an interrupted program from ending.
    """
    todo: queue.SimpleQueue[tuple[int, T]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, BaseException | None]] = queue.SimpleQueue()
    for numbered in enumerate(items):
        todo.put(numbered)

    def loop() -> None:
        while True:
            try:
                number, item = todo.get_nowait()
            except queue.Empty:
                return
            try:
                work(item)
            except BaseException as error:
                done.put((number, error))
                return
            done.put((number, None))

    for _ in range(min(at_once, len(items))):
        threading.Thread(target=loop, daemon=True, name="hub").start()
    waiting = dict(enumerate(items))
    while waiting:
        try:
            number, error = done.get(timeout=0.2)
        except queue.Empty:
            yield next(iter(waiting.values()))
            continue
        if error is not None:
            while not todo.empty():  # whoever still works on another ends with it
                try:
                    todo.get_nowait()
                except queue.Empty:
                    break
            raise error
        del waiting[number]
