"""Prints a command of the README, so that what CI runs and what a user copies are the same line.

usage: python tools/readme_command.py demo|tests
"""

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def command(name: str) -> str:
    """The code block that follows `<!-- command: NAME -->` in the README.

    Raises:
        SystemExit: there is none.
    """
    found = re.search(rf"<!-- command: {re.escape(name)} -->\s*```\w*\n(.*?)\n```", README.read_text(), re.DOTALL)
    if found is None:
        raise SystemExit(f"README.md has no command {name!r}")
    return found.group(1)


if __name__ == "__main__":
    print(command(sys.argv[1]))
