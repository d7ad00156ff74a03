"""python -m kvmix.convert: what a model's weights say about its keys and values, and the recipe that follows.

    norms MODEL        prints the norms, layer by layer
    annotate IN OUT    copies a GGUF file with its recipe written into it

Each lists its flags with --help.
"""

import os
import signal
import sys

if __name__ == "__main__":  # a Ctrl-C while the modules below are loaded
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from collections.abc import Sequence
from importlib import import_module

from kvmix import _cli

COMMANDS = {"annotate": "annotate", "norms": "norms_cli"}  # modules with add_args(parser) and run(args)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        usage = _cli.Parser(prog="python -m kvmix.convert", description=__doc__)
        usage.add_argument("command", choices=COMMANDS)
        usage.parse_args(argv[:1])
    command = import_module(f"kvmix.convert.{COMMANDS[argv[0]]}")
    p = _cli.Parser(prog=f"python -m kvmix.convert {argv[0]}", description=command.__doc__)
    command.add_args(p)
    return int(command.run(p.parse_args(argv[1:])))


if __name__ == "__main__":
    sys.exit(_cli.run(main))
