"""The embedded model: a small Llama with an adapter and prompts, for a machine where nothing else is there yet."""

from pathlib import Path

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"
ADAPTER = FOLDER / "adapter"
PROMPTS = FOLDER / "prompts.jsonl"
BITS = 4.0  # what it is run at where neither an engine nor a width is asked for
