"""Cuts the C declarations out of kvmix.h and writes them as `kvmix/_cdef.py`, cffi's out-of-line ABI-mode module.

usage: build_cdef.py KVMIX_H OUTPUT

The public header is the only place where the API is declared; CMake runs this when a wheel is built, so that the
binding cannot drift from the library that lies beside it.
"""

import sys
from pathlib import Path

from cffi import FFI

BEGIN, END = "/* cdef begin */", "/* cdef end */"


def cut(header: str) -> str:
    """The block between the two marks, without the export macro (cffi removes the comments itself)."""
    if header.count(BEGIN) != 1 or header.count(END) != 1:
        raise ValueError(f"the header must have exactly one {BEGIN} and one {END}")
    block = header[header.index(BEGIN) + len(BEGIN) : header.index(END)]
    return block.replace("KVMIX_API ", "")


def write(header: Path, output: Path) -> None:
    ffi = FFI()
    ffi.set_source("kvmix._cdef", None)
    ffi.cdef(cut(header.read_text(encoding="utf-8")))
    ffi.emit_python_code(str(output))


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
