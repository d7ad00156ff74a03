"""The texts that quality is measured on, by name.

    python tests/bench/texts.py NAME > FILE

kim and calibration are for choosing (codecs, windows, ladders); novels and wiki are for reported numbers, and nothing
is chosen by them. They are cut out of ../shared/text beside the repository.
"""

import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "text"
BOOKS = ("a-little-princess", "kim", "persuasion")  # in the order of books.test.txt
NAMES = ("calibration", "kim", "novels", "wiki")


def books(text: bytes) -> dict[str, bytes]:
    """The novels of books.test.txt; each begins where the chapters' numbers begin anew."""
    starts = [match.start() for match in re.finditer(rb"^### (?:Chapter )?1\b", text, re.MULTILINE)]
    if len(starts) != len(BOOKS) or starts[0] != 0:
        raise ValueError(f"books.test.txt has {len(starts)} first chapters, not {len(BOOKS)}")
    return {name: text[a:b] for name, a, b in zip(BOOKS, starts, [*starts[1:], len(text)], strict=True)}


def part(name: str, folder: Path = FOLDER) -> bytes:
    if name == "wiki":
        return (folder / "wiki.test.raw").read_bytes()
    if name == "calibration":
        return (folder / "wiki.calibration.txt").read_bytes()
    novels = books((folder / "books.test.txt").read_bytes())
    if name == "kim":
        return novels["kim"]
    if name == "novels":
        return novels["a-little-princess"] + novels["persuasion"]
    raise ValueError(f"{name!r} is none of {', '.join(NAMES)}")


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in NAMES:
        raise SystemExit(f"usage: texts.py {'|'.join(NAMES)}")
    sys.stdout.buffer.write(part(sys.argv[1]))


if __name__ == "__main__":
    main()
