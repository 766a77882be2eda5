"""A process of the tuner's own. Run by path, so that it finds what its parent finds, the same way.

Argument: the descriptor of a file with a request; :func:`.process.child_request` makes them.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module


def main() -> None:
    """Have the module that is named in the request do it."""
    descriptor = int(sys.argv[1])
    with open(descriptor, "rb", closefd=descriptor > 0) as file:  # stdin stays as it is
        request = json.load(file)
    sys.argv[:] = request["argv"]
    sys.path[:] = request["sys_path"]
    # Only now can the package be found.
    import_module(request["module"]).main(request)


if __name__ == "__main__":
    main()
