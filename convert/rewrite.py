"""Writes GGUF files that differ from another in their kvmix.* keys alone, or that hold nothing else.

Every other key, the list of tensors and their data are copied as bytes, never decoded: what this file does not know
stays as it is. Keys that are added follow the old ones. The input has been checked by libkvmix before (validate.py).

    magic "GGUF" | u32 version | u64 n_tensors | u64 n_keys | keys | tensor list | zeros up to the alignment | data
    a key: u64 length, name | u32 type | value;  a string: u64 length, bytes;  an array: u32 type, u64 n, values
    a tensor: u64 length, name | u32 n_dims | u64 dims[n_dims] | u32 type | u64 offset in the data
"""

import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

from kvmix.errors import ArgumentError, KvmixError, ModelIOError

Item = str | int | float
Progress = Callable[[int, int], None]  # bytes done, bytes in all

OURS = "kvmix."
COPIED_AT_ONCE = 8 << 20


class Kind(IntEnum):
    """Of values, as far as one is written or has a length; of the others the size is enough."""

    UINT32 = 4
    FLOAT32 = 6
    STRING = 8
    ARRAY = 9
    UINT64 = 10


SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
FORMATS = {Kind.UINT32: "<I", Kind.UINT64: "<Q", Kind.FLOAT32: "<f"}


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """All that comes before the data, in pieces."""

    version: int
    n_tensors: int
    keys: dict[str, bytes]  # each key's whole bytes, name and value
    tensors: bytes  # the list
    alignment: int
    data_offset: int
    file_bytes: int
    crc32: int  # of the file's first data_offset bytes

    @property
    def architecture(self) -> bytes:
        return self.keys["general.architecture"]


def read_header(path: Path) -> Header:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _, version, n_tensors, n_keys = struct.unpack_from("<4sIQQ", data)
        at = 24
        keys: dict[str, bytes] = {}
        alignment = 32
        for _ in range(n_keys):
            start = at
            at = skip_string(data, at)
            name = data[start + 8 : at].decode("utf-8", "surrogateescape")
            if name == "general.alignment":
                (alignment,) = struct.unpack_from("<I", data, at + 4)
            at = skip_value(data, at + 4, *struct.unpack_from("<I", data, at))
            keys[name] = data[start:at]
        first = at
        for _ in range(n_tensors):
            at = skip_string(data, at)
            (n_dims,) = struct.unpack_from("<I", data, at)
            at += 4 + 8 * n_dims + 4 + 8
        data_offset = at + -at % alignment
        crc32 = zlib.crc32(data[:data_offset])
        return Header(version, n_tensors, keys, data[first:at], alignment, data_offset, len(data), crc32)


def skip_string(data: mmap.mmap, at: int) -> int:
    (n_bytes,) = struct.unpack_from("<Q", data, at)
    return at + 8 + int(n_bytes)


def skip_value(data: mmap.mmap, at: int, kind: int) -> int:
    if kind == Kind.STRING:
        return skip_string(data, at)
    if kind != Kind.ARRAY:
        return at + SIZES[kind]
    item, n = struct.unpack_from("<IQ", data, at)
    at += 12
    if item in SIZES:
        return at + int(n) * SIZES[item]
    for _ in range(n):
        at = skip_value(data, at, item)
    return at


# ---- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Value:
    """Of a key; a sequence is an array of the kind."""

    kind: Kind
    data: Item | Sequence[Item]

    def encode(self) -> bytes:
        """Type and value."""
        if isinstance(self.data, (str, int, float)):
            return struct.pack("<I", self.kind) + encode_item(self.kind, self.data)
        items = b"".join(encode_item(self.kind, item) for item in self.data)
        return struct.pack("<IIQ", Kind.ARRAY, self.kind, len(self.data)) + items


def encode_item(kind: Kind, item: Item) -> bytes:
    if isinstance(item, str):
        data = item.encode()
        return struct.pack("<Q", len(data)) + data
    return struct.pack(FORMATS[kind], item)


def encode_key(name: str, value: Value) -> bytes:
    return encode_item(Kind.STRING, name) + value.encode()


def write_annotated(source: Path, header: Header, out: Path, values: Mapping[str, Value], progress: Progress) -> None:
    """A copy of the source whose kvmix.* keys are these."""
    kept = [data for name, data in header.keys.items() if not name.startswith(OURS)]
    keys = [*kept, *(encode_key(name, value) for name, value in values.items())]
    head = struct.pack("<4sIQQ", b"GGUF", header.version, header.n_tensors, len(keys)) + b"".join(keys) + header.tensors
    head += bytes(-len(head) % header.alignment)
    n_data = header.file_bytes - header.data_offset
    with replacing(out) as file, source.open("rb") as data:
        free = shutil.disk_usage(out.parent).free
        if free < len(head) + n_data:
            raise ModelIOError(f"{out} needs {len(head) + n_data} bytes, its disk has {free}: free some, or --sidecar")
        file.write(head)
        data.seek(header.data_offset)
        done = 0
        while chunk := data.read(COPIED_AT_ONCE):
            file.write(chunk)
            done += len(chunk)
            progress(done, n_data)


def write_sidecar(header: Header, out: Path, values: Mapping[str, Value]) -> None:
    """A file without tensors that holds these keys, and says which file they belong to."""
    whose = {
        "kvmix.sidecar.file_bytes": Value(Kind.UINT64, header.file_bytes),
        "kvmix.sidecar.header_crc32": Value(Kind.UINT32, header.crc32),
    }
    keys = [header.architecture, *(encode_key(name, value) for name, value in [*values.items(), *whose.items()])]
    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, len(keys)) + b"".join(keys)
    with replacing(out) as file:
        file.write(head + bytes(-len(head) % 32))


@contextmanager
def replacing(out: Path) -> Iterator[BinaryIO]:
    """A file that takes `out`'s place when it is complete; on any error or interrupt nothing is left of it."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, KvmixError):
            raise
        raise ModelIOError(f"cannot write {out}: {error.strerror}") from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_output(source: Path, out: Path, force: bool) -> None:
    if out.exists() and out.samefile(source):
        raise ArgumentError(f"{out} is the input itself: give another path, or --sidecar to leave the file as it is")
    if out.exists() and not force:
        raise ArgumentError(f"{out} is there already: --force replaces it")
