"""An engine for faults that a real one does not have on demand: plan.engine_args["fault"] says which."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time

from orchestrator.backends.protocol import Delta, Event, Finished, LoadPlan, Request, Score, Stats
from orchestrator.engine.placement import members


class Fake:
    """Answers each request with its prompt, one token a step, 10 ms each (1 ms where it is "quick")."""

    gather_s = 0.0

    def load(self, plan: LoadPlan) -> None:
        self.fault = plan.engine_args.get("fault", "")
        self.rows: dict[str, tuple[Request, int]] = {}
        self.cancelled: set[str] = set()
        self.steps = 0
        if self.fault == "chained":
            try:
                {}["rope"]
            except KeyError as error:
                raise RuntimeError("Engine core initialization failed. See root cause above") from error
        if self.fault == "full":
            try:
                raise MemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            except MemoryError as error:
                raise RuntimeError("a kernel failed") from error
        if self.fault == "package":
            import a_package_that_is_not_there  # noqa: F401
        if self.fault == "exit":
            print("no such kernel\n", file=sys.stderr)
            os._exit(3)
        if self.fault == "hang":
            time.sleep(600)
        if self.fault == "worker":
            worker = subprocess.Popen(["sleep", "600"])
            print("worker", worker.pid)
        if self.fault == "fork" and os.fork() == 0:
            time.sleep(600)  # a worker that inherits every open file

    def placement(self) -> dict[str, dict[str, int]]:
        if self.fault == "stray":
            names = [f"layers.{i}.weight" for i in range(5)]
            return {"cpu": {"embed.weight": 100}, "meta": dict.fromkeys(names, 4)}
        return {"cpu": {"weight": 900_000}}

    def versions(self) -> dict[str, str]:
        return {"fake": "1"}

    def submit(self, request: Request) -> None:
        self.rows[request.id] = (request, 0)

    def cancel(self, request_id: str) -> None:
        self.cancelled.add(request_id)

    def events(self) -> list[Event]:
        if self.fault == "idle" and not self.rows:
            raise RuntimeError("the driver has gone")
        self.steps += bool(self.rows)
        if self.fault == "talk":
            print('{"is":"Close"}' * 50, flush=True)
            os.write(1, b"\x00\x00\x00\x02{}")
            ctypes.CDLL(None).puts(b"a C library says hello")
        if self.fault.endswith("step") and self.steps > 20:
            raise RuntimeError("the kernel gave up")
        if self.fault == "segv" and self.steps > 20:
            ctypes.string_at(0)
        time.sleep(0.001 if self.fault.startswith("quick") else 0.01)
        events: list[Event] = []
        for name, (request, count) in list(self.rows.items()):
            if count == min(len(request.tokens), request.max_tokens) or name in self.cancelled:
                del self.rows[name]
                reason = "cancelled" if name in self.cancelled else "stop"
                events.append(Finished(name, reason, len(request.tokens), count, 0, 0, 0, 0))
            else:
                self.rows[name] = (request, count + 1)
                events.append(Delta(name, [request.tokens[count]], "x"))
        return events

    def score(self, tokens: list[int], top_k: int) -> Score:
        worst = float("-inf") if self.fault == "infinite" else -1.0
        return Score([worst] * (len(tokens) - 1), [], [], [0.5] * (len(tokens) - 1))

    def stats(self) -> Stats:
        return Stats(1, [], self.steps, 0.1, self.steps, 0.1)

    def close(self) -> None:
        if self.fault == "deaf":
            time.sleep(600)


class Placed(Fake):
    """One whose tensors lie where they were planned."""

    def load(self, plan: LoadPlan) -> None:
        super().load(plan)
        self.plan = plan
        print("loads", json.dumps({"context": plan.max_context, "in_flight": plan.max_in_flight}))

    def placement(self) -> dict[str, dict[str, int]]:
        return {
            members(group)[0]: {"model.embed_tokens.weight" if group == "cpu" else "weight": size}
            for group, size in self.plan.weights.items()
        }
