"""What the commands share: flags with llama.cpp's spellings, models by name or path, errors as exit codes.

A command is `def main(argv) -> int`, run as sys.exit(run(main)). Exit codes: 0, 1 for a KvmixError or output that
cannot be written (one sentence on stderr), 2 for a wrong command line, 130 after Ctrl-C, 141 when the reader of a pipe
went away.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

from . import catalog
from .errors import ArgumentError, KvmixError

PROGRAM = "kvmix"
N_CTX_MAX = 1 << 24  # the library's limits, also of a window


def note(text: str) -> None:
    """A line for people, beside the output."""
    print(f"{PROGRAM}: {text}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """argparse without guessed abbreviations; an unknown flag is answered with the nearest name."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.add_argument("--version", action=Version, help="say which version this is, and leave")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        args = sys.argv[1:] if args is None else list(args)
        self._check_flags(args)
        return super().parse_args(args, namespace)

    def _check_flags(self, args: Sequence[str]) -> None:
        known = self._option_string_actions
        for arg in args:
            if arg == "--":
                return
            flag = arg.partition("=")[0]
            is_flag = re.match(r"--?[A-Za-z]", arg) is not None and " " not in arg
            short_with_number = arg[:2] in known and re.fullmatch(r"-\w\d+", arg)
            if is_flag and flag not in known and not short_with_number:
                near = difflib.get_close_matches(flag, known, 1)
                self.error(f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else ""))

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


class Version(argparse.Action):
    """Asks the library, which is loaded only then."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from . import _native

        print(f"{PROGRAM} {_native.version()}")
        parser.exit()


def integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not in {low}..{high}")
        return value

    return parse


def number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """A number from low to high; `above`: low itself is too low."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if value < low or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not " + ("above" if above else "at least") + f" {low:g}")
        if value > high:
            raise argparse.ArgumentTypeError(f"{text} is above {high:g}")
        return value

    return parse


def add_model_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a GGUF file, or a name of the catalog (default: its default model)"
    )
    parser.add_argument("-m", "--model", dest="model_flag", metavar="MODEL", help="the same")
    parser.add_argument("--no-mmap", dest="mmap", action="store_false", help="read the file into private memory")


def add_kv_args(parser: argparse.ArgumentParser, n_batch: int | None = 512) -> None:
    """n_batch: the default of -ub; None where the command chooses one by what fits."""
    run = parser.add_argument_group("running")
    run.add_argument(
        "-c", "--ctx-size", type=integer(0, N_CTX_MAX), metavar="N", help="context in tokens; 0 = the trained one"
    )
    run.add_argument("-t", "--threads", type=integer(1, 1024), metavar="N", help="threads (default: all cores)")
    run.add_argument(
        "-b", "--batch-size", type=integer(1), default=2048, metavar="N", help="as -ub; the smaller of both counts"
    )
    run.add_argument(
        "-ub",
        "--ubatch-size",
        type=integer(1, 4096),
        default=n_batch,
        metavar="N",
        help=f"tokens evaluated at once (default: {n_batch or 'as many as fit, up to 512'})",
    )
    kv = parser.add_argument_group("KV cache")
    kv.add_argument("-ctk", "--cache-type-k", metavar="TYPE", help="type of all keys: f16 q8 q4 q3 q2")
    kv.add_argument("-ctv", "--cache-type-v", metavar="TYPE", help="type of all values")
    kv.add_argument(
        "--kv",
        metavar="RECIPE",
        help="types by layer, as k4v3 or k4v3,0-1:k8v4; norms[:BITS] computes them from the weights; paper is k4v2",
    )
    kv.add_argument("--window", type=integer(0, N_CTX_MAX), metavar="N", help="recent tokens kept in f16")
    kv.add_argument("--sink", type=integer(0, 64), metavar="N", help="first tokens kept in f16")


def session_options(args: argparse.Namespace) -> dict[str, Any]:
    """Model.session()'s keyword arguments; n_ctx only where -c was given."""
    options: dict[str, Any] = {
        "kv": args.kv,
        "k_type": kv_type("-ctk", args.cache_type_k),
        "v_type": kv_type("-ctv", args.cache_type_v),
        "n_batch": min(args.batch_size, args.ubatch_size),
    }
    optional = {"n_ctx": args.ctx_size, "n_threads": args.threads, "window": args.window, "sink": args.sink}
    return options | {name: value for name, value in optional.items() if value is not None}


def kv_type(flag: str, name: str | None) -> str | None:
    """llama.cpp's names stand for our type of the same bits, and we say so."""
    alias = re.fullmatch(r"(q\d)_[01]", name or "")
    if alias is None:
        return name
    note(f"{flag} {name} is llama.cpp's name for a format of its own; {alias[1]} is used here")
    return alias[1]


def resolve_model(name: str | None) -> catalog.ResolvedModel:
    return catalog.resolve(name)


def model_name(args: argparse.Namespace) -> str | None:
    """What add_model_args' flags name, None for the default model."""
    if args.model is not None and args.model_flag is not None:
        raise ArgumentError(f"two models are given, {args.model} and -m {args.model_flag}")
    name: str | None = args.model if args.model_flag is None else args.model_flag
    return name


def mention_long_context(n_ctx: int, n_trained: int) -> None:
    if n_ctx > n_trained:
        note(
            f"a context of {n_ctx} tokens is more than the model was trained for ({n_trained}): what it says may worsen"
        )


def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    """Ctrl-C ends the command."""
    ignore_interrupts()
    raise KeyboardInterrupt


def ignore_interrupts() -> None:
    """On the way out: a Ctrl-C while things are being closed would only leave its traces."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run(main: Callable[[Sequence[str] | None], int]) -> int:
    signal.signal(signal.SIGINT, interrupt)
    # a closed descriptor (>&-) leaves None here; output then goes nowhere, and quietly
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        try:
            code = main(None)
            sys.stdout.flush()
            return code
        finally:
            ignore_interrupts()
    except KvmixError as e:
        note(f"error: {e}")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        write_nowhere()
        return 141
    except OSError as e:
        if e.filename is not None:  # then it is no write that failed
            raise
        with contextlib.suppress(OSError):  # stderr may be what cannot be written
            note(f"error: the output cannot be written: {e.strerror or e}")
        write_nowhere()
        return 1


def write_nowhere() -> None:
    """The interpreter flushes once more at exit, and must not fail at it again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
