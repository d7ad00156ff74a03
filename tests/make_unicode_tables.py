"""Writes runtime/unicode_tables.c, the classes by which the pre-tokenizers split text, from Python's unicodedata.

Run from the repository root with the newest Python at hand: `python tests/make_unicode_tables.py`. The file names its
Unicode version; tests/test_tokenizer.py compares it with what this script writes wherever the versions agree.
"""

import unicodedata
from pathlib import Path

OTHER, LETTER, NUMBER, PUNCTUATION, SPACE = range(5)  # kvm_unicode_class
BY_CATEGORY = {"L": LETTER, "N": NUMBER, "P": PUNCTUATION, "Z": SPACE}
SPACE_CONTROLS = {*range(0x09, 0x0E), 0x85}  # White_Space = these and the category Z

HEAD = """/* unicode_tables.c - written by tests/make_unicode_tables.py from Unicode {version}; not edited by hand. */
#include "unicode_tables.h"

const int32_t kvm_unicode_n_ranges = {n};
const uint32_t kvm_unicode_ranges[] = {{
"""


def class_of(code_point: int) -> int:
    if code_point in SPACE_CONTROLS:
        return SPACE
    return BY_CATEGORY.get(unicodedata.category(chr(code_point))[0], OTHER)


def render() -> str:
    """The text of runtime/unicode_tables.c."""
    ranges: list[int] = []
    previous = None
    for code_point in range(0x110000):
        kind = class_of(code_point)
        if kind != previous:
            ranges.append(code_point << 3 | kind)
            previous = kind
    rows = (ranges[i : i + 12] for i in range(0, len(ranges), 12))
    body = "".join("    " + " ".join(f"0x{entry:x}," for entry in row) + "\n" for row in rows)
    return HEAD.format(version=unicodedata.unidata_version, n=len(ranges)) + body + "};\n"


if __name__ == "__main__":
    target = Path(__file__).resolve().parent.parent / "runtime" / "unicode_tables.c"
    target.write_text(render(), encoding="ascii")
