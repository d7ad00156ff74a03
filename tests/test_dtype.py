"""The weight decoders give the bits of gguf-py's dequantize: on random blocks and on blocks made of edge values."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

import make_iq_tables

SPLIT = -1  # no place of its own: a nibble each in the high bits of four numbers at the end
# Where the f16 scales of a block are, as byte offsets.
SCALES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ2_XXS": [0],
    "IQ2_XS": [0],
    "IQ3_XXS": [0],
    "IQ1_S": [0],
    "IQ4_NL": [0],
    "IQ3_S": [0],
    "IQ2_S": [0],
    "IQ4_XS": [0],
    "IQ1_M": [SPLIT],
    "MXFP4": [],  # has the exponent of a power of two
}
# Zeros, subnormals, the least and the largest numbers, infinities and NaN, of both signs.
EDGES = [0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x7C00, 0x7E00]
EDGES += [edge | 0x8000 for edge in EDGES]


def decoded(folder: Path, name: str, blocks: np.ndarray) -> np.ndarray:
    result = subprocess.run([folder / "decode_cli", name], input=blocks.tobytes(), capture_output=True, check=True)
    return np.frombuffer(result.stdout, np.float32)


def assert_same_bits(folder: Path, name: str, blocks: np.ndarray) -> None:
    """The same bits, but for NaN: IEEE leaves its sign and payload to the machine."""
    with np.errstate(all="ignore"):
        want = dequantize(blocks, GGMLQuantizationType[name]).ravel()
    got = decoded(folder, name, blocks)
    assert got.shape == want.shape
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    differ = (got.view(np.uint32) != want.view(np.uint32)) & ~nan
    assert not differ.any(), f"value {np.flatnonzero(differ)[0]}: {got[differ][0]!r} is not {want[differ][0]!r}"


def random_blocks(rng: np.random.Generator, name: str, n: int) -> np.ndarray:
    return rng.integers(0, 256, (n, GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]), dtype=np.uint8)


def put_scale(blocks: np.ndarray, offset: int, bits: np.ndarray) -> None:
    if offset == SPLIT:
        nibbles = bits.astype(np.uint16)[:, None] >> np.array([0, 4, 8, 12], np.uint16) & 15
        blocks[:, -7::2] = blocks[:, -7::2] & 15 | nibbles.astype(np.uint8) << 4
    else:
        blocks[:, offset : offset + 2] = bits.astype("<u2")[:, None].view(np.uint8)


@pytest.mark.parametrize("name", SCALES)
def test_random_blocks(c_build: Path, name: str) -> None:
    """Any bytes at all, and any bytes with scales of a usual size."""
    rng = np.random.default_rng(1)
    blocks = random_blocks(rng, name, 4000)
    assert_same_bits(c_build, name, blocks)
    for offset in SCALES[name]:
        put_scale(blocks, offset, rng.normal(0, 0.1, len(blocks)).astype(np.float16).view(np.uint16))
    assert_same_bits(c_build, name, blocks)


@pytest.mark.parametrize("name", SCALES)
def test_edge_scales(c_build: Path, name: str) -> None:
    """Each pair of edge values as the scale and the minimum; each byte value as all the bytes of the rest."""
    rng = np.random.default_rng(2)
    scale, minimum = (grid.ravel() for grid in np.meshgrid(EDGES, EDGES))
    rest = [np.full((len(scale), 1), fill, np.uint8) for fill in (0x00, 0xFF, 0x55, 0xAA, 0x0F, 0xF0, 0x80, 0x7F)]
    for fill in rest:
        blocks = random_blocks(rng, name, len(scale))
        blocks[::2] = fill[::2]
        for offset, values in zip(SCALES[name], (scale, minimum), strict=False):
            put_scale(blocks, offset, values)
        assert_same_bits(c_build, name, blocks)


@pytest.mark.parametrize("name", SCALES)
def test_every_byte_value_at_every_place(c_build: Path, name: str) -> None:
    """So every code, every sub-scale and every place in a block: one byte differs, and only what it may reach."""
    base = random_blocks(np.random.default_rng(3), name, 1)
    for offset in SCALES[name]:
        put_scale(base, offset, np.array([0x2E66]))
    n_bytes = base.shape[1]
    blocks = np.repeat(base, n_bytes * 256, axis=0)
    place = np.repeat(np.arange(n_bytes), 256)
    blocks[np.arange(len(blocks)), place] = np.tile(np.arange(256), n_bytes)
    assert_same_bits(c_build, name, blocks)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_half(c_build: Path, name: str) -> None:
    assert_same_bits(c_build, name, np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(-1, 2))


def test_f32_is_copied(c_build: Path) -> None:
    bits = np.random.default_rng(4).integers(0, 2**32, 10000, dtype=np.uint32)
    assert np.array_equal(decoded(c_build, "F32", bits).view(np.uint32), bits)


def test_the_committed_iq_tables_are_what_the_script_writes() -> None:
    committed = Path(__file__).parent.parent / "runtime" / "iq_tables.c"
    assert committed.read_text(encoding="utf-8") == make_iq_tables.render()


def test_tables_agree_with_gguf() -> None:
    """Our table is what the header lists; its sizes are gguf-py's."""
    header = (Path(__file__).parent.parent / "runtime" / "dtype.h").read_text(encoding="utf-8")
    rows = [line.strip(" \\)").removeprefix("X(").split(", ") for line in header.splitlines() if "    X(" in line]
    assert len(rows) == len(SCALES) + 3
    for name, text, gguf_id, values, n_bytes in rows:
        kind = GGMLQuantizationType(int(gguf_id))
        assert kind.name == name == text.strip('"')
        assert GGML_QUANT_SIZES[kind] == (int(values), int(n_bytes))
