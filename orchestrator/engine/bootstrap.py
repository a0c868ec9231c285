"""What the child's interpreter runs: makes our package importable by itself, then hands over to the host.

The child may be another interpreter than the parent's, with other packages. So nothing of the parent's
sys.path comes along: `orchestrator` is loaded from its own folder, and everything else is the child's own.

This runs as a script, before the package is importable: standard library only, Python 3.11 to 3.13.
"""

import importlib
import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.realpath(__file__))
_PACKAGE = os.path.dirname(_HERE)


def _install_package() -> None:
    # Python put the script's folder first: `import wire` or `import host` of an engine would find our files.
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or os.curdir) != _HERE]
    if "orchestrator" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "orchestrator", os.path.join(_PACKAGE, "__init__.py"), submodule_search_locations=[_PACKAGE]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["orchestrator"] = module
    spec.loader.exec_module(module)


# Not only in the main process: workers that an engine spawns run this file again, as `__mp_main__`.
_install_package()

if __name__ == "__main__":
    sys.exit(importlib.import_module("orchestrator.engine.host").main(sys.argv[1:]))
