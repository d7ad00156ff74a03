"""Damaged and malicious GGUF files: each is refused with its status and a sentence that says where and what.

The reader runs in a process of its own (gguf_probe, built under sanitizers): a crash, a sanitizer's report or a hang is
a failure. The bulk, hundreds of thousands of mutants, runs inside tests/c/test_gguf.c.
"""

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
GiB = 2**30


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: bytes, n: int | None = None) -> bytes:
    return u64(len(text) if n is None else n) + text


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return string(name) + u32(kind) + value


def array(kind: int, n: int, elements: bytes) -> bytes:
    return u32(kind) + u64(n) + elements


def tensor(name: bytes = b"t", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    """A record of 8 + len(name) + 4 + 8 len(dims) + 4 + 8 bytes; as it stands, 32 bytes of f32 data."""
    return string(name) + u32(len(dims)) + b"".join(u64(dim) for dim in dims) + u32(kind) + u64(offset)


def gguf(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file whose first key, or first tensor where it has no keys, is at byte 24."""
    keys, tensors = keys or [], tensors or []
    counts = u64(len(tensors) if n_tensors is None else n_tensors) + u64(len(keys) if n_keys is None else n_keys)
    head = b"GGUF" + u32(version) + counts + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data if tensors else head


def with_alignment(value: bytes, kind: int = U32) -> bytes:
    """The value is at byte 24 + 8 + 17 + 4 = 53."""
    return gguf([key(b"general.alignment", kind, value)])


ONE_KEY = key(b"k", U32, u32(7))  # its type is at byte 33, its value at byte 37
D32 = bytes(32)


def valued(kind: int, value: bytes) -> bytes:
    return gguf([key(b"k", kind, value)])


def listed(kind: int, n: int, elements: bytes) -> bytes:
    return valued(ARRAY, array(kind, n, elements))


def lone(name: bytes = b"t", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0, data: bytes = D32) -> bytes:
    return gguf(tensors=[tensor(name, dims, kind, offset)], data=data)


# What is damaged or no GGUF at all. name: (file, what the sentence holds)
BAD: dict[str, tuple[bytes, str]] = {
    # the wrong kind of file
    "empty": (b"", "byte 0: the file is empty"),
    "one byte": (b"G", "byte 0: this is no GGUF file"),
    "other magic": (b"GGML" + bytes(60), "byte 0: this is no GGUF file, which begins with the bytes 'GGUF'"),
    "zeros": (bytes(64), "byte 0: this is no GGUF file"),
    "html": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "this is an HTML page"),
    "html behind space": (b"\r\n \t<html lang=en>" + bytes(50), "this is an HTML page"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "safetensors": (u64(16) + b'{"__metadata__":' + bytes(64), "this is a safetensors file; convert it"),
    "version 0": (gguf(version=0), "byte 4: there is no GGUF version 0"),
    # counts
    "no version": (b"GGUF\3\0", "byte 4: the version needs 4 bytes, 2 are left"),
    "no tensor count": (b"GGUF" + u32(3), "byte 8: a count needs 8 bytes, 0 are left"),
    "no key count": (b"GGUF" + u32(3) + bytes(11), "byte 16: a count needs 8 bytes, 3 are left"),
    "tensors past the limit": (gguf(n_tensors=65537), "byte 8: 65537 tensors, at most 65536 are allowed"),
    "2^63 tensors": (gguf(n_tensors=2**63), "byte 8: 9223372036854775808 tensors"),
    "tensors past the end": (gguf(n_tensors=2), "byte 8: 2 tensors do not fit the 8 bytes left"),
    "keys past the limit": (gguf(n_keys=65537), "byte 16: 65537 keys, at most 65536 are allowed"),
    "2^64 - 1 keys": (gguf(n_keys=2**64 - 1), "byte 16: 18446744073709551615 keys"),
    "keys past the end": (gguf([ONE_KEY], n_keys=2), "byte 16: 2 keys do not fit the 17 bytes left"),
    # keys
    "empty key": (gguf([key(b"", U32, u32(1)), D32]), "byte 24: a key has 0 bytes, allowed are 1 to 65535"),
    "long key": (gguf([key(b"k" * 65536, U8, b"1")]), "byte 24: a key has 65536 bytes"),
    "key past the end": (gguf([string(b"k" * 9, 99)]), "byte 32: a key needs 99 bytes, 9 are left"),
    "key of 2^64 - 1": (gguf([string(b"k" * 9, 2**64 - 1)]), "byte 24: a key has 18446744073709551615 bytes"),
    "zero byte in a key": (gguf([key(b"a\0b", U32, u32(1))]), "byte 24, key 'a?b': the name holds a zero byte"),
    "key twice": (gguf([ONE_KEY, ONE_KEY]), "byte 41, key 'k': the name is there twice"),
    "no type": (
        gguf([string(b"key567"), b"123"], n_keys=1),
        "byte 38, key 'key567': the type needs 4 bytes, 3 are left",
    ),
    "value type 13": (valued(13, u32(1)), "byte 33, key 'k': type 13, the last known is 12"),
    "value type 2^32 - 1": (valued(2**32 - 1, u32(1)), "byte 33, key 'k': type 4294967295"),
    "escape in a key": (gguf([key(b"\x1b[31m", 13, b"1")]), "key '?[31m': type 13"),
    "value past the end": (valued(U64, bytes(7)), "byte 37, key 'k': the value needs 8 bytes, 7 are left"),
    "bool 2": (valued(BOOL, b"\2"), "byte 37, key 'k': a bool is 2, allowed are 0 and 1"),
    # strings
    "string past the end": (valued(STRING, string(b"abc", 4)), "byte 45, key 'k': a string needs 4 bytes, 3 are left"),
    "string of 64 MiB + 1": (valued(STRING, string(b"", 2**26 + 1)), "byte 37, key 'k': a string has 67108865 bytes"),
    "string of 2^64 - 8": (valued(STRING, string(b"", 2**64 - 8)), "18446744073709551608 bytes"),
    "string without length": (valued(STRING, b"123"), "byte 37, key 'k': a string needs 8 bytes, 3 are left"),
    # arrays: the element type is at byte 37, the count at 41, the elements at 49
    "array of arrays": (listed(ARRAY, 1, D32), "byte 37, key 'k': an array of arrays"),
    "array of type 13": (listed(13, 1, D32), "byte 37, key 'k': type 13"),
    "array without count": (valued(ARRAY, u32(U8)), "byte 41, key 'k': a count needs 8 bytes, 0 are left"),
    "2^24 + 1 elements": (
        listed(U8, 2**24 + 1, D32),
        "byte 41, key 'k': 16777217 elements, at most 16777216 are allowed",
    ),
    "2^63 elements": (listed(U8, 2**63, D32), "9223372036854775808 elements"),
    "2^61 + 1 of u64": (listed(U64, 2**61 + 1, D32), "2305843009213693953 elements"),
    "elements past the end": (listed(U32, 9, D32), "9 elements do not fit the 32 bytes left"),
    "strings past the end": (listed(STRING, 5, D32), "5 elements do not fit the 32 bytes left"),
    "second string past the end": (
        listed(STRING, 2, string(b"ab") + string(b"cd", 9)),
        "byte 67, key 'k': a string needs 9 bytes, 2 are left",
    ),
    "long string in an array": (
        listed(STRING, 1, string(b"abc", 2**63)),
        "byte 49, key 'k': a string has 9223372036854775808 bytes, allowed are 0 to 67108864",
    ),
    "bool 255 in an array": (listed(BOOL, 3, b"\0\1\xff"), "a bool is 255"),
    # alignment
    "alignment 0": (with_alignment(u32(0)), "byte 53, key 'general.alignment': alignment 0, allowed are powers of two"),
    "alignment 4": (with_alignment(u32(4)), "alignment 4, allowed are powers of two from 8 to 65536"),
    "alignment 24": (with_alignment(u32(24)), "alignment 24"),
    "alignment 131072": (with_alignment(u32(131072)), "alignment 131072"),
    "alignment 2^31": (with_alignment(u32(2**31)), "alignment 2147483648"),
    "alignment 2^32 - 1": (with_alignment(u32(2**32 - 1)), "alignment 4294967295"),
    "alignment u64": (with_alignment(u64(32), U64), "byte 53, key 'general.alignment': the alignment must be a u32"),
    "alignment array": (with_alignment(array(U32, 1, u32(32)), ARRAY), "the alignment must be a u32"),
    # tensors: without keys the name is at byte 24, n_dims at 33, the dimensions from 37, with one of them the type at
    # 45, the offset at 49
    "no tensor name": (lone(b""), "byte 24: a tensor name has 0 bytes"),
    "name of 65": (lone(b"n" * 65), "byte 24: a tensor name has 65 bytes, allowed are 1 to 64"),
    "name past the end": (
        gguf([tensor(b"n" * 40)[:40]], n_keys=0, n_tensors=1),
        "byte 32: a tensor name needs 40 bytes",
    ),
    "newline in a name": (lone(b"a\nb"), "byte 24, tensor 'a?b': the name holds byte 10"),
    "umlaut in a name": (lone(b"\xc3\xbc"), "tensor '??': the name holds byte 195"),
    "tensor twice": (
        gguf(tensors=[tensor(), tensor(offset=32)], data=D32 * 2),
        "byte 57, tensor 't': the name is there twice",
    ),
    "0 dimensions": (lone(dims=()), "byte 33, tensor 't': 0 dimensions, allowed are 1 to 4"),
    "5 dimensions": (lone(dims=(8, 1, 1, 1, 1)), "byte 33, tensor 't': 5 dimensions"),
    "dimension 0": (lone(dims=(8, 0)), "byte 45, tensor 't': dimension 1 is 0"),
    "dimension 2^63": (lone(dims=(2**63,)), "byte 37, tensor 't': the dimensions' product passes 9223372036854775807"),
    "product wraps to 8": (lone(dims=(8, 2**62, 4)), "byte 45, tensor 't': the dimensions' product passes"),
    "product 2^64": (lone(dims=(2**32, 2**32)), "the dimensions' product passes"),
    "size wraps": (lone(dims=(2**62,)), "byte 45, tensor 't': the size of 4611686018427387904 values of F32 overflows"),
    "row is no whole block": (lone(dims=(33, 32), kind=2, data=bytes(640)), "rows of 33 values"),
    "row of K values": (lone(dims=(128, 2), kind=12, data=bytes(160)), "Q4_K's block of 256"),
    "no type of a tensor": (gguf(tensors=[tensor()])[:47], "byte 8: 1 tensors do not fit the 31 bytes left"),
    "record cut": (
        gguf([tensor(b"name")[:35]], n_keys=0, n_tensors=1),
        "byte 52, tensor 'name': the offset needs 8 bytes",
    ),
    # where the data is: it begins at byte 64
    "no data": (gguf(tensors=[tensor()])[:57], "byte 57: the tensor data is missing: the file ends at byte 57"),
    "data one byte short": (lone(data=bytes(31)), "its data ends at 32, past the 31 bytes of tensor data"),
    "offset no multiple": (
        lone(offset=8, data=bytes(64)),
        "byte 49, tensor 't': offset 8 is no multiple of the alignment 32",
    ),
    "offset past the end": (lone(offset=32), "byte 49, tensor 't': its data ends at 64, past the 32 bytes"),
    "offset wraps": (lone(offset=2**64 - 32), "offset 18446744073709551584 and size 32 overflow"),
    "offset 2^63": (lone(offset=2**63), "ends at 9223372036854775840, past the 32 bytes"),
    "an exabyte": (lone(dims=(2**58,)), "its data ends at 1152921504606846976, past the 32 bytes"),
    "same data twice": (
        gguf(tensors=[tensor(b"a"), tensor(b"b")], data=D32 * 2),
        "its data at offset 0 overlaps that of '",
    ),
    "overlap by two bytes": (
        gguf(tensors=[tensor(b"a", offset=64), tensor(b"b", dims=(33,), kind=1)], data=D32 * 4),
        "byte 49, tensor 'a': its data at offset 64 overlaps that of 'b', which ends at 66",
    ),
    "offset against a larger alignment": (
        gguf([key(b"general.alignment", U32, u32(64))], [tensor(offset=32)], bytes(128), alignment=64),
        "offset 32 is no multiple of the alignment 64",
    ),
}
BAD |= {
    f"utf-8 {name}": (valued(STRING, string(text)), "byte 37, key 'k': the string is not UTF-8")
    for name, text in {
        "lone continuation": b"a\x80",
        "cut": b"a\xe2\x82",
        "long form of 2": b"\xc0\xaf",
        "long form of 3": b"\xe0\x80\xaf",
        "long form of 4": b"\xf0\x80\x80\xaf",
        "surrogate": b"\xed\xa0\x80",
        "past U+10FFFF": b"\xf4\x90\x80\x80",
        "byte f5": b"\xf5\x80\x80\x80",
        "byte ff": b"\xff",
        "bad third byte": b"\xe2\x82\x28",
    }.items()
}

# What may be sound, but cannot be run.
UNSUPPORTED: dict[str, tuple[bytes, str]] = {
    "version 1": (gguf(version=1), "byte 4: GGUF version 1, versions 2 and 3 are read"),
    "version 4": (gguf(version=4), "byte 4: GGUF version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "byte 4: this is a big-endian GGUF"),
    "type TQ1_0": (lone(dims=(256,), kind=34, data=bytes(54)), "byte 45, tensor 't': type TQ1_0"),
    "type NVFP4": (lone(dims=(64,), kind=40, data=bytes(36)), "NVFP4 (40) cannot be run"),
    "type withdrawn": (lone(kind=4), "type unknown (4) cannot be run; get the model with weights in"),
    "type 2^32 - 1": (
        lone(kind=2**32 - 1),
        "in F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S, "
        "IQ4_NL, IQ3_S, IQ2_S, IQ4_XS, IQ1_M, BF16, MXFP4",
    ),
}

GOOD: dict[str, bytes] = {
    "nothing in it": gguf(),
    "version 2": gguf([ONE_KEY], [tensor()], D32, version=2),
    "no padding behind the last tensor": lone(dims=(3,), data=bytes(12)),
    "more behind the last tensor": lone(data=bytes(100)),
    "a gap": gguf(tensors=[tensor(b"a"), tensor(b"b", offset=96)], data=D32 * 4),
    "any order": gguf(tensors=[tensor(b"a", offset=32), tensor(b"b")], data=D32 * 2),
    "touching": gguf(tensors=[tensor(b"a"), tensor(b"b", offset=32)], data=D32 * 2),
    "alignment 8": gguf([key(b"general.alignment", U32, u32(8))], [tensor(offset=8)], bytes(40), alignment=8),
    "alignment 65536": gguf([key(b"general.alignment", U32, u32(65536))], [tensor()], D32, alignment=65536),
    "longest key": gguf([key(b"k" * 65535, U8, b"1")]),
    "longest tensor name": lone(b"n" * 64),
    "text": valued(STRING, string("\u007f \u0080 \u07ff \u0800 \ud7ff \ue000 \uffff \U00010000 \U0010ffff".encode())),
    "tokens of any bytes": listed(STRING, 2, string(b"\xff\xfe") + string(b"")),
    "empty array at the end": listed(U64, 0, b""),
    "every type of 8 bytes": gguf([key(b"%d" % kind, kind, bytes(8)) for kind in (U64, I64, F64)]),
    "every type of 4 bytes": gguf([key(b"%d" % kind, kind, bytes(4)) for kind in (U32, I32, F32)]),
    "every smaller type": gguf(
        [key(b"%d" % kind, kind, bytes(n)) for kind, n in ((U8, 1), (I8, 1), (U16, 2), (I16, 2))]
    ),
}


@pytest.fixture
def probe(c_build: Path, tmp_path: Path) -> Callable[..., tuple[bool, str]]:
    """Opens bytes as a file; -> (accepted, what the probe said). Anything but an answer fails the test."""

    def open_bytes(data: bytes, mode: str = "mmap", keys: tuple[str, ...] = ("k",)) -> tuple[bool, str]:
        path = tmp_path / "x.gguf"
        path.write_bytes(data)
        return run_probe(c_build, mode, path, keys)

    return open_bytes


def run_probe(c_build: Path, mode: str, path: Path, keys: tuple[str, ...] = ()) -> tuple[bool, str]:
    command = [c_build / "gguf_probe", mode, path, *keys]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode in (0, 1) and result.stderr == "", result.stderr
    assert result.stdout.endswith("\n") and result.stdout.count("\n") == 1
    return result.returncode == 0, result.stdout.rstrip("\n")


@pytest.mark.parametrize("name", [*BAD, *UNSUPPORTED])
def test_bad_file(probe: Callable[..., tuple[bool, str]], name: str) -> None:
    status = "FORMAT" if name in BAD else "UNSUPPORTED"
    data, text = (BAD | UNSUPPORTED)[name]
    for mode in ("mmap", "read"):
        accepted, said = probe(data, mode)
        assert not accepted
        assert said.startswith(f"{status}: ") and text in said
        assert "x.gguf: byte " in said and not said.endswith(".")


@pytest.mark.parametrize("name", GOOD)
def test_good_file(probe: Callable[..., tuple[bool, str]], name: str) -> None:
    for mode in ("mmap", "read"):
        assert probe(GOOD[name], mode) == (True, "ok")


@pytest.mark.parametrize("mode", ["mmap", "read"])
def test_what_is_no_file(c_build: Path, tmp_path: Path, mode: str) -> None:
    assert run_probe(c_build, mode, tmp_path) == (
        False,
        f"IO: {tmp_path}: this is a folder; give the path of a GGUF file",
    )
    accepted, said = run_probe(c_build, mode, tmp_path / "absent.gguf")
    assert not accepted and said.endswith("absent.gguf: cannot be opened: No such file or directory")
    accepted, said = run_probe(c_build, mode, Path("/dev/null"))
    assert not accepted and "this is no regular file" in said


def test_a_long_path_leaves_room_for_the_reason(c_build: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 200) / ("b" * 200) / ("c" * 200) / ("d" * 200)
    folder.mkdir(parents=True)
    path = folder / "x.gguf"
    path.write_bytes(BAD["bool 2"][0])
    accepted, said = run_probe(c_build, "mmap", path)
    assert not accepted and "a bool is 2, allowed are 0 and 1; the file is damaged" in said


def test_a_model_cut_short(probe: Callable[..., tuple[bool, str]], tmp_path: Path) -> None:
    """At every 4 KiB, and around the end of the header and of the file."""
    tiny.write_model(tmp_path / "whole.gguf", n_layer=1, n_embd=128, n_ff=256)
    whole = (tmp_path / "whole.gguf").read_bytes()
    assert len(whole) > 100 * 4096
    keys = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.chat_template")
    assert probe(whole, "mmap", keys) == (True, "ok")
    for n in [*range(0, len(whole), 4096), len(whole) - 32, len(whole) - 1]:
        accepted, said = probe(whole[:n])
        assert not accepted and said.startswith("FORMAT: "), n


def test_a_huge_file_costs_no_memory(c_build: Path, tmp_path: Path) -> None:
    """A sparse file of 64 GiB that claims no more than its header: mapped, not read."""
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(gguf([ONE_KEY]))
        file.truncate(64 * GiB)
    assert run_probe(c_build, "mmap", path) == (True, "ok")


def test_mutants_of_a_model(c_build: Path, tmp_path: Path) -> None:
    """The mutations of test_gguf.c, on a file as a converter writes it."""
    path = tmp_path / "m.gguf"
    tiny.write_model(path, n_layer=1, n_embd=32, n_head=1, n_head_kv=1, head_dim=32, n_ff=32, weight_type="Q4_0")
    result = subprocess.run([c_build / "test_gguf", path], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
