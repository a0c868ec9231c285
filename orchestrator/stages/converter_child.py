"""What runs a converter in the engine's interpreter: ends it with its parent, prepares it, then becomes it.

    PYTHON converter_child.py --fd N --parent PID [--limits BYTES,BYTES] MODULE ARGUMENTS...

It leads a process group of its own. A thread watches the parent, and kills the group when that is gone (not
PR_SET_PDEATHSIG: that follows the parent's thread, not its process).
"""

import argparse
import contextlib
import os
import runpy
import select
import signal
import sys
import threading

_PACKAGE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def main(argv: list[str]) -> None:
    """Runs MODULE as `python -m MODULE ARGUMENTS...` does."""
    parser = argparse.ArgumentParser(prog="converter")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--limits", default="")
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    os.set_inheritable(args.fd, False)
    threading.Thread(target=_watch, args=(args.fd, args.parent), name="parent", daemon=True).start()
    _install_package()
    if args.module.partition(".")[0] == "exllamav2":
        _prepare([int(limit) for limit in args.limits.split(",") if limit])
    sys.argv = [args.module, *args.arguments]
    runpy.run_module(args.module, run_name="__main__", alter_sys=True)


def _watch(fd: int, parent: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)  # readable at its end: the parent never writes
    # A process that the parent forked may hold the parent's end open: watch the parent itself as well.
    with contextlib.suppress(OSError, AttributeError):  # no such call before Linux 5.3
        poll.register(os.pidfd_open(parent), select.POLLIN)
    if os.getppid() == parent:
        poll.poll()
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _install_package() -> None:
    """Makes `orchestrator` importable by itself, in whichever interpreter this is (see engine/bootstrap.py)."""
    here = os.path.dirname(os.path.realpath(__file__))
    # Python put the script's folder first: an `import merge` of the converter's would find our file.
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or os.curdir) != here]
    runpy.run_path(os.path.join(_PACKAGE, "engine", "bootstrap.py"), run_name="bootstrap")


def _prepare(limits: list[int]) -> None:
    from orchestrator.backends.exl2_setup import limit_memory, prepare_attention

    reason = prepare_attention()
    print(f" -- Attention: {f'without flash-attn ({reason})' if reason else 'flash-attn'}", flush=True)
    if limits:
        limit_memory(limits)


if __name__ == "__main__":
    main(sys.argv[1:])
