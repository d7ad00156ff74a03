"""Writes runtime/iq_tables.c, the levels and grids of ggml's IQ formats and of MXFP4, from the tables of gguf-py.

Run from the repository root: `python tests/make_iq_tables.py`; tests/test_dtype.py compares the file with what this
script writes. runtime/iq_tables.h says how the tables are laid out.
"""

from collections.abc import Iterable, Iterator
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
from gguf import quants
from gguf.constants import GGMLQuantizationType as Type

FLAG = 8  # the bit of an index that negates: a level, or the shift of IQ1
GRIDS = [Type.IQ1_S, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S]

HEAD = """/* iq_tables.c - written by tests/make_iq_tables.py from the tables of gguf-py; not edited by hand.
 *
 * gguf-py's licence:
 *
{licence} */
#include "iq_tables.h"
"""


def licence() -> str:
    """gguf-py's licence, each line as one of a C comment."""
    texts = [path.read_text(encoding="utf-8") for path in distribution("gguf").files or [] if path.name == "LICENSE"]
    return "".join(f" * {line}".rstrip() + "\n" for line in texts[0].splitlines())


def negated(half: Iterable[int]) -> list[int]:
    """16 levels: those of indexes without the flag, and the same with the other sign for those with it."""
    first = [*half]
    first += [0] * (FLAG - len(first))
    return first + [-level for level in first]


def levels() -> Iterator[tuple[str, list[int]]]:
    def grid_map(kind: Type) -> list[int]:
        return [int(value) for value in quants._type_traits[kind].grid_map]

    shift = int(8 * quants.IQ1_S.delta)  # IQ1 counts in eighths
    eighths = [8 * value for value in grid_map(Type.IQ1_S)]
    rest = [0] * (FLAG - len(eighths))
    yield "iq1", [value + shift for value in eighths] + rest + [value - shift for value in eighths] + rest
    yield "iq2", negated(grid_map(Type.IQ2_S))
    yield "iq3_xxs", negated(grid_map(Type.IQ3_XXS))
    yield "iq3_s", negated(grid_map(Type.IQ3_S))
    yield "iq4", [*quants.IQ4_NL.kvalues]
    yield "mxfp4", [*quants.MXFP4.kvalues]


def grid(kind: Type) -> list[int]:
    """The entries of a grid as dwords of indexes: a byte each where there are four, a nibble each where eight."""
    traits = quants._type_traits[kind]
    traits.init_grid()
    indexes = np.searchsorted(traits.grid_map, traits.grid.reshape(traits.grid_shape)).astype(np.uint32)
    dwords = indexes[:, :4]
    if traits.grid_shape[1] == 8:
        dwords = dwords | indexes[:, 4:] << 4
    return [int(entry) for entry in (dwords << np.array([0, 8, 16, 24], np.uint32)).sum(axis=1)]


def render() -> str:
    """The text of runtime/iq_tables.c."""
    text = HEAD.format(licence=licence()) + "\n"
    for name, values in levels():
        text += f"const int8_t kvm_levels_{name}[16] = {{{', '.join(map(str, values))}}};\n"
    for kind in GRIDS:
        entries = grid(kind)
        text += f"\nconst uint32_t kvm_grid_{kind.name.lower()}[{len(entries)}] = {{\n"
        for i in range(0, len(entries), 9):
            text += "    " + " ".join(f"0x{entry:08x}," for entry in entries[i : i + 9]) + "\n"
        text += "};\n"
    return text


if __name__ == "__main__":
    target = Path(__file__).resolve().parent.parent / "runtime" / "iq_tables.c"
    target.write_text(render(), encoding="utf-8")
