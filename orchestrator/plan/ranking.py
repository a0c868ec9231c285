"""The order of candidates: what fits, then what loses least, then what is fast."""

from __future__ import annotations

import math
from itertools import takewhile

from orchestrator.backends.table import BACKENDS, METHODS
from orchestrator.checkpoint.spec import ModelSpec
from orchestrator.config import Config
from orchestrator.plan.types import Candidate, Plan

GOAL_CONTEXT = 4096  # tokens that a plan tries to keep where none were asked for
IN_FLIGHT = (4, 2, 1)  # sequences at a time, where they were not asked for: fewer before a shorter context
CONTEXT_STEP = 512  # contexts below the goal count by such steps: a few tokens more are worth no precision


def goal_of(config: Config, spec: ModelSpec) -> int:
    """Tokens of context to reach."""
    return config.model.max_context or min(GOAL_CONTEXT, spec.max_context)


def rank(candidate: Candidate, goal: int) -> tuple[float, ...]:
    speed = BACKENDS[candidate.backend].speed.get(candidate.method, 0.0)
    needs = bool(candidate.needs)  # what nothing here makes comes behind all that can be run
    if not candidate.fits:  # nearest to fitting first
        return (needs, 1, sum(device.total for device in candidate.devices))
    offload_and_context = (is_short(candidate, goal), candidate.offloads, steps(candidate, goal))
    return (needs, 0, *offload_and_context, loss(candidate), -candidate.bits, -speed, not candidate.installed)


def steps(candidate: Candidate, goal: int) -> int:
    """How far the context is from the goal."""
    return math.ceil(max(0, goal - candidate.max_context) / CONTEXT_STEP)


def is_short(candidate: Candidate, goal: int) -> bool:
    """Whether the context is less than half of the goal: then an offload that keeps it is better."""
    return 2 * steps(candidate, goal) > math.ceil(goal / CONTEXT_STEP)


def loss(candidate: Candidate) -> float:
    return METHODS[candidate.method].loss_at(candidate.bits)


def why(chosen: Candidate, plan: Plan, config: Config) -> str:
    """The choice in one sentence."""
    others = [c for c in plan.candidates if c is not chosen and not c.needs]
    if not others:
        return "nothing else matches the request"
    if not any(c.fits for c in others):
        return "the only one that fits"
    better = [c for c in others if c.fits and loss(c) < loss(chosen)]
    if better and better[0] in takewhile(lambda c: c is not chosen, plan.candidates):
        return f"installed, unlike {better[0].label}"
    if better and better[0].offloads and not chosen.offloads:
        return f"it needs no offload, unlike {better[0].label}, which would be far slower"
    if better:  # all that stands before the loss of precision
        return f"it has room for {chosen.max_context} tokens of context, {better[0].label} for {better[0].max_context}"
    asked = f" with {config.quant.bits:g} bits" if config.quant.bits is not None else ""
    return f"it fits{asked} and loses the least"
