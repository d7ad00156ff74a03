"""The reference of tests/ref against facts that can be worked out without it, and the runtime's codecs against it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import tiny
from ref.cache import CacheOptions, LayerCache, attention
from ref.codec import (
    KVTYPES,
    LEVELS,
    PAGE,
    POSITION,
    Side,
    balance_of,
    decode,
    decode_page,
    encode,
    encode_side,
    group_of,
    hadamard,
    hadamard_block,
    is_trellis,
    levels_of,
    nmse,
    pack_side,
    physical_bits,
    planes_pack,
    planes_unpack,
    precondition_k,
    sum128,
)
from ref.model import Hyper, Model, load, rope
from ref.perplexity import Setting, chunks, divergence, divergence_of, perplexity, perplexity_of

HEAD_DIMS = (64, 80, 96, 128, 256)
QUANTIZED = [t for t in KVTYPES.values() if t.quantized]
F16, K4V3, K8V8 = ("f16", "f16"), ("q4", "q3"), ("q8", "q8")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def gauss(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


# ---- codec ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("side", Side)
def test_hadamard_is_sylvesters_matrix_and_its_own_inverse(d: int, side: Side) -> None:
    block = {64: 64, 80: 16, 96: 32, 128: 128, 256: 256}[d] if side is Side.K else {80: 16, 96: 32}.get(d, 64)
    assert hadamard_block(d, side) == block
    matrix = hadamard(np.eye(d), block)
    signs = np.zeros((d, d))
    for start in range(0, d, block):
        for i, j in np.ndindex(block, block):
            signs[start + i, start + j] = (-1) ** (i & j).bit_count()
    np.testing.assert_allclose(matrix, signs / block**0.5, atol=1e-15)
    np.testing.assert_allclose(hadamard(matrix, block), np.eye(d), atol=1e-14)


def test_sum128_adds_in_the_written_order(rng: np.random.Generator) -> None:
    x = gauss(rng, 50, PAGE)
    for row, got in zip(x, sum128(x), strict=True):
        lanes = [row[j] for j in range(16)]
        for start in range(16, 128, 16):
            lanes = [lane + row[start + j] for j, lane in enumerate(lanes)]
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [lanes[j] + lanes[j + half] for j in range(half)]
        assert got == lanes[0]


@pytest.mark.parametrize("kvtype", QUANTIZED, ids=lambda t: t.name)
def test_nearest_is_nearest(kvtype, rng: np.random.Generator) -> None:
    t = (gauss(rng, 5000) * kvtype.levels[-1]).astype(np.float32)
    used = kvtype.levels[kvtype.nearest(kvtype.levels)]
    assert np.array_equal(used[1:], kvtype.levels[1:])
    best = np.abs(t[:, None] - used).min(axis=1)
    np.testing.assert_array_equal(np.abs(t - kvtype.levels[kvtype.nearest(t)]), best)
    assert kvtype.nearest(np.array([0.0, -0.0, np.nan], np.float32)).tolist() == [1 << (kvtype.bits - 1)] * 3


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("q6", 0.00054, 0.00058),
        ("q5", 0.0021, 0.0023),
        ("q4", 0.0070, 0.0073),
        ("q3", 0.029, 0.030),
        ("q2", 0.111, 0.114),
    ],
)
def test_error_on_gaussian_rows(name: str, low: float, high: float, rng: np.random.Generator) -> None:
    x, kvtype = gauss(rng, 32, 128, PAGE), KVTYPES[name]  # half a million values: the estimate is good to 0.5%
    assert low < nmse(x, decode(kvtype, Side.K, *encode(kvtype, Side.K, x))) < high
    if not kvtype.v_trellis:  # K's codes, but for a gain
        y = decode(kvtype, Side.V, *encode(kvtype, Side.V, x))
        assert low < nmse(x, y * ((x * y).sum() / (y * y).sum())) < high
        assert nmse(x, y) < 1.02 * high / (1 - high)


def test_error_of_the_trellis_on_gaussian_rows(rng: np.random.Generator) -> None:
    x, q2 = gauss(rng, 6, 128, PAGE), KVTYPES["q2"]
    y = decode(q2, Side.V, *encode(q2, Side.V, x))
    assert 0.080 < nmse(x, y) < 0.083
    assert 0.074 < nmse(x, y * ((x * y).sum() / (y * y).sum())) < 0.079


def test_q8_is_within_half_a_step(rng: np.random.Generator) -> None:
    q8 = KVTYPES["q8"]
    x = gauss(rng, 64, PAGE)
    codes, scales = encode(q8, Side.K, x)
    assert codes.min() >= 1
    off = np.abs(x - decode(q8, Side.K, codes, scales))
    assert (off <= scales.astype(np.float32) * 0.56).all()  # clipping by the f16 scale


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("kvtype", QUANTIZED, ids=lambda t: t.name)
def test_encoding_scales_and_mirrors(kvtype, side: Side, rng: np.random.Generator) -> None:
    x = gauss(rng, 128, PAGE)
    codes, scales = encode(kvtype, side, x)
    codes_of_8x, scales_of_8x = encode(kvtype, side, 8 * x)
    assert np.array_equal(codes, codes_of_8x) and np.array_equal(8 * scales, scales_of_8x)
    if not is_trellis(kvtype, side):  # whose levels are not symmetric
        mirrored = decode(kvtype, side, *encode(kvtype, side, -x))
        np.testing.assert_array_equal(mirrored, -decode(kvtype, side, codes, scales))


@pytest.mark.parametrize("kvtype", QUANTIZED, ids=lambda t: t.name)
def test_codes_are_taken_with_the_scale_that_k_stores(kvtype, rng: np.random.Generator) -> None:
    x = gauss(rng, 8, 64, PAGE)
    codes, scales = encode(kvtype, Side.K, x)
    assert np.array_equal(codes, kvtype.nearest(x * (1 / scales.astype(np.float32))))
    assert kvtype.v_trellis or np.array_equal(codes, encode(kvtype, Side.V, x)[0])


@pytest.mark.parametrize("kvtype", QUANTIZED, ids=lambda t: t.name)
def test_v_loses_nothing_on_average(kvtype, rng: np.random.Generator) -> None:
    x = gauss(rng, 4, 64, PAGE)
    k, v = (decode(kvtype, side, *encode(kvtype, side, x)).astype(np.float64) for side in Side)
    k_loss, v_loss = (1 - (x * y).sum(axis=1) / np.square(x.astype(np.float64)).sum(axis=1) for y in (k, v))
    assert np.abs(v_loss).max() < 2**-11 + 1e-6
    if kvtype.bits < 4:  # a least-squares scale loses what the codec errs by
        assert abs(k_loss.mean() / nmse(x, k) - 1) < 0.05


def test_a_trellis_level_is_that_of_its_window(rng: np.random.Generator) -> None:
    codes = rng.integers(0, 4, (3, PAGE)).astype(np.uint8)
    levels = levels_of(KVTYPES["q2"], Side.V, codes)
    assert sorted(POSITION.tolist()) == list(range(PAGE)) and np.abs(LEVELS).max() == 52
    assert POSITION[[0, 1, 4, 32, 127]].tolist() == [0, 4, 16, 1, 127]
    for channel, step in np.ndindex(3, PAGE):
        ring = [int(codes[channel, POSITION[(step - back) % PAGE]]) for back in (3, 2, 1, 0)]
        window = sum(symbol << 2 * i for i, symbol in enumerate(ring))
        assert levels[channel, POSITION[step]] == LEVELS[window]


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("kvtype", QUANTIZED, ids=lambda t: t.name)
def test_degenerate_groups(kvtype, side: Side) -> None:
    x = np.zeros((64, PAGE), np.float32)
    x[3, 1] = np.nan
    x[:, 2] = 1e-30
    x[5, 3] = 1e9
    codes, scales = encode(kvtype, side, x)
    assert scales[0, :3].tolist() == [0, 0, 0] and scales[0, 3] == np.float16(65504)
    if not is_trellis(kvtype, side):
        assert (codes[:, :3] == 1 << (kvtype.bits - 1)).all() and codes[5, 3] == (1 << kvtype.bits) - 1


def odd_pages(rng: np.random.Generator, d: int) -> np.ndarray:
    """Gaussian; an outlier; nothing; huge; NaN, infinities, no square and subnormals; sizes down to where f16 ends."""
    x = gauss(rng, 6, d, PAGE)
    x[1, 5] *= 30
    x[2] = 0
    x[3] *= 6e4
    x[4, 3, 9], x[4, 5, 4], x[4, 6, 4], x[4, 1, 10] = np.nan, np.inf, -np.inf, 3e38
    x[4, :, 7], x[4, :, 11] = 0, np.nan
    x[4, :, 8], x[4, :, 12] = x[4, :, 8] * np.float32(1e37), x[4, :, 12] * np.float32(1e-41)
    x[5] *= np.exp2(-20 - np.arange(PAGE) / 16).astype(np.float32)
    return x


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("kvtype", QUANTIZED, ids=lambda t: t.name)
def test_the_runtime_has_the_same_bits(c_build: Path, kvtype, side: Side, d: int, rng: np.random.Generator) -> None:
    x = odd_pages(rng, d)
    command = [c_build / "encode_cli", kvtype.name, side.value, str(d)]
    got = subprocess.run(command, input=x.tobytes(), capture_output=True, check=True).stdout
    codes, scales = encode(kvtype, side, x)
    decoded = decode(kvtype, side, codes, scales)
    for page in range(len(x)):
        values = decoded[page] if side is Side.K else decoded[page].T
        want = planes_pack(kvtype, side, codes[page]) + scales[page].tobytes()
        assert got[: len(want)] == want
        assert np.array_equal(np.frombuffer(got, np.float32, values.size, len(want)), values.ravel())
        got = got[len(want) + values.nbytes :]
    assert got == b"" and scales.shape == (len(x), d // group_of(d), PAGE)


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("kvtype", QUANTIZED, ids=lambda t: t.name)
def test_planes(kvtype, side: Side, d: int, rng: np.random.Generator) -> None:
    """Every code is where the byte diagram of kvtype.h says, and comes back."""
    codes = rng.integers(0, 1 << kvtype.bits, (d, PAGE)).astype(np.uint8)
    page = planes_pack(kvtype, side, codes)
    assert np.array_equal(planes_unpack(kvtype, side, page, d), codes)
    r = d if side is Side.K else PAGE
    line_bytes = [64 * -(-r * w // 32) for w in kvtype.planes]
    assert len(page) == sum(line_bytes) * (128 * d // r) // 16
    for channel, position in rng.integers(0, (d, PAGE), (200, 2)).tolist():
        fast, reduced = (position, channel) if side is Side.K else (channel, position)
        start, code = fast // 16 * sum(line_bytes), 0
        for w, n_bytes in zip(kvtype.planes, line_bytes, strict=True):
            g, index = divmod(reduced, 32 // w)
            j, i = divmod(index, 4)
            byte = page[start + 64 * g + 4 * (fast % 16) + i]
            code, start = code << w | byte >> w * j & (1 << w) - 1, start + n_bytes
        assert code == codes[channel, position]


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("kvtype", KVTYPES.values(), ids=lambda t: t.name)
@pytest.mark.parametrize("balance_page", [False, True])
def test_page_bytes(kvtype, side: Side, d: int, balance_page: bool, rng: np.random.Generator) -> None:
    x, q_rms = gauss(rng, d, PAGE), np.abs(gauss(rng, d, PAGE)).astype(np.float16)
    page = pack_side(kvtype, side, x, 16, 100, q_rms, balance_page=balance_page)
    got = decode_page(kvtype, side, page, d)
    assert len(page) % 64 == 0
    if d % 64 == 0:  # nothing is padded
        assert len(page) == d * PAGE * physical_bits(kvtype, side, d, balance_page) / 8
    matrix = got if side is Side.K else got.T
    assert matrix.shape == (d, PAGE) and not matrix[:, :16].any() and not matrix[:, 100:].any()
    if not kvtype.quantized:
        assert np.array_equal(matrix[:, 16:100], x[:, 16:100].astype(np.float16))
        return
    encoded = encode_side(kvtype, side, x, 16, 100, q_rms)
    assert np.array_equal(matrix, decode(kvtype, side, encoded.codes, encoded.scales))
    if encoded.mean is not None and d % 32 == 0:
        vectors = np.frombuffer(page, np.float16)[-d * (1 + balance_page) :]
        assert np.array_equal(vectors[:d], encoded.mean)
        if balance_page:
            assert np.array_equal(vectors[d:], encoded.balance)


# ---- preconditioning ------------------------------------------------------------------------------------------------


def biased_keys(rng: np.random.Generator, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys with a large mean and uneven channels, and queries' rms: f32 and f16 [d, 128]."""
    sizes = np.exp(gauss(rng, d, 1))
    return gauss(rng, d, PAGE) * sizes + 50 * gauss(rng, d, 1), (np.abs(gauss(rng, d, PAGE)) / sizes).astype(np.float16)


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_a_query_reads_the_preconditioned_frame(d: int, rng: np.random.Generator) -> None:
    """q.k = H(balance * q).k' + q.mean, before anything is quantized."""
    k, q_rms = biased_keys(rng, d)
    stored, mean, balance = precondition_k(k, 0, PAGE, q_rms)
    q = gauss(rng, d).astype(np.float64)
    turned = hadamard((q * balance)[:, None], hadamard_block(d, Side.K))[:, 0]
    want = q @ k
    np.testing.assert_allclose(turned @ stored + q @ mean, want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_preconditioning_takes_the_mean_and_the_balance_away(rng: np.random.Generator) -> None:
    k, q_rms = biased_keys(rng, 64)
    k[:, :16] = 1e4  # sinks
    stored, mean, balance = precondition_k(k, 16, 120, q_rms)
    inside = k[:, 16:120].astype(np.float64)
    np.testing.assert_allclose(mean, inside.mean(axis=1), rtol=1e-3)
    rk = inside.std(axis=1)  # less its f16 mean, whose rounding is small beside it
    rq = np.sqrt(np.square(q_rms[:, 16:120].astype(np.float64)).mean(axis=1))
    ratio = np.sqrt(rk / rq)
    want = np.clip(ratio / np.exp(np.log(ratio).mean()), 1 / 16, 16)
    np.testing.assert_allclose(balance, want, rtol=2e-3)
    assert not stored[:, :16].any() and not stored[:, 120:].any()


@pytest.mark.parametrize("name", ["q4", "q3"])
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_planted_outliers_cost_little(name: str, d: int, rng: np.random.Generator) -> None:
    """Two channels with a mean of 20 sigma: the logits' error is within 1.2 of what it is without them."""

    def error(k: np.ndarray) -> float:
        """Over pages and queries, of k [16, d, 128]; rms."""
        encoded = encode_side(KVTYPES[name], Side.K, k, 0, PAGE, np.abs(gauss(rng, 16, d, PAGE)).astype(np.float16))
        q = rng.standard_normal((16, 32, d))
        return float(np.sqrt(np.square(q @ (encoded.raw() - k)).mean()))

    clean = gauss(rng, 16, d, PAGE).astype(np.float16).astype(np.float32)
    outlying = clean.copy()
    outlying[:, [3, d - 7]] += np.float32([[20.0], [-20.0]])
    assert error(outlying.astype(np.float16).astype(np.float32)) <= 1.2 * error(clean)


def test_what_is_outside_a_page_has_no_say(rng: np.random.Generator) -> None:
    k, q_rms = biased_keys(rng, 64)
    other, other_q = k.copy(), q_rms.copy()
    other[:, :16], other[:, 90:], other_q[:, :16] = 7, np.nan, 3
    for side in Side:
        args = 16, 90
        assert pack_side(KVTYPES["q3"], side, k, *args, q_rms) == pack_side(KVTYPES["q3"], side, other, *args, other_q)


def test_balance_is_clamped_centred_and_one_without_queries(rng: np.random.Generator) -> None:
    ones = np.ones((64, PAGE), np.float32)
    loud, quiet = ones.copy(), ones.copy()
    loud[5], quiet[5] = 2**20, 2**-20
    assert balance_of(loud, ones, PAGE)[5] == 16 == 1 / balance_of(quiet, ones, PAGE)[5]
    # floored at 2^-10 of the loudest: all the others are alike and sqrt(2^10) = 32 away, before the clamp
    np.testing.assert_allclose(np.delete(balance_of(loud, ones, PAGE), 5), 32 ** (-1 / 64), rtol=1e-3)
    np.testing.assert_allclose(np.delete(balance_of(ones, loud, PAGE), 5), 32 ** (1 / 64), rtol=1e-3)
    gentle = ones * np.exp(gauss(rng, 64, 1))
    assert abs(np.log(balance_of(gentle, ones, PAGE).astype(np.float64)).mean()) < 1e-3
    assert (balance_of(gentle, 0 * ones, PAGE) == 1).all() and (balance_of(0 * ones, gentle, PAGE) == 1).all()


def test_a_frozen_balance_replaces_the_pages_own(rng: np.random.Generator) -> None:
    k, q_rms = biased_keys(rng, 128)
    _, _, own = precondition_k(k, 0, PAGE, q_rms)
    q4 = KVTYPES["q4"]
    assert pack_side(q4, Side.K, k, 0, PAGE, q_rms) == pack_side(q4, Side.K, k, 0, PAGE, frozen=own)
    assert pack_side(q4, Side.K, k, 0, PAGE, q_rms) != pack_side(q4, Side.K, k, 0, PAGE, q_rms, own[::-1])


@pytest.mark.parametrize("side", Side)
def test_raw_undoes_the_preconditioning(side: Side, rng: np.random.Generator) -> None:
    k, q_rms = biased_keys(rng, 96)
    encoded = encode_side(KVTYPES["q8"], side, k, 0, PAGE, q_rms)
    assert nmse(k, encoded.raw()) < 1e-4
    if encoded.mean is not None:  # the mean, which is most of these keys, costs nothing
        assert nmse(k - k.mean(axis=1, keepdims=True), encoded.raw() - k.mean(axis=1, keepdims=True)) < 2e-4


# ---- cache ----------------------------------------------------------------------------------------------------------


def filled(options: CacheOptions, n: int, batch: int, rng: np.random.Generator, pair=K4V3) -> LayerCache:
    cache = LayerCache(*pair, 2, 64, 32, options)
    q, k, v = gauss(rng, n, 4, 64), gauss(rng, n, 2, 64), gauss(rng, n, 2, 32)
    for i in range(0, n, batch):
        cache.append(q[i : i + batch], k[i : i + batch], v[i : i + batch])
    return cache


def packed_positions(cache: LayerCache, t: int) -> list[int]:
    """Which of 0..t row t reads packed: where its view is not the f16 value."""
    k, v = cache.view(cache.cut(t), t + 1)
    differs = (k != cache.k[: t + 1]).any(axis=(1, 2))
    assert np.array_equal(differs, (v != cache.v[: t + 1]).any(axis=(1, 2)))
    return np.flatnonzero(differs).tolist()


@pytest.mark.parametrize(
    ("window", "sink", "t", "first", "end"),
    [
        (128, 16, 255, 0, 0),
        (128, 16, 256, 16, 128),
        (128, 16, 383, 16, 128),
        (128, 16, 384, 16, 256),
        (0, 0, 127, 0, 0),
        (0, 0, 128, 0, 128),
        (0, 64, 399, 64, 384),
        (100, 4, 227, 0, 0),
        (100, 4, 228, 4, 128),
    ],
)
def test_three_segments(window: int, sink: int, t: int, first: int, end: int, rng: np.random.Generator) -> None:
    cache = filled(CacheOptions(window, sink, balance_page=False, strict=False), 400, 400, rng)
    assert packed_positions(cache, t) == list(range(first, end))


def test_strict_reads_all_but_the_sinks_packed(rng: np.random.Generator) -> None:
    cache = filled(CacheOptions(sink=16, strict=True), 300, 128, rng)
    assert packed_positions(cache, 290) == list(range(16, 291))
    alone = filled(CacheOptions(sink=16, strict=True), 10, 128, rng)
    assert packed_positions(alone, 9) == []
    with pytest.raises(ValueError, match="begin on a page"):
        filled(CacheOptions(strict=True), 300, 100, rng)


@pytest.mark.parametrize("balance_page", [False, True])
@pytest.mark.parametrize("batch", [1, 77, 512])
def test_a_page_does_not_depend_on_the_batch(balance_page: bool, batch: int) -> None:
    options = CacheOptions(window=0, sink=16, balance_page=balance_page)
    one, other = (filled(options, 400, n, np.random.default_rng(3)) for n in (400, batch))
    for got, want in zip(other.view(384, 400), one.view(384, 400), strict=True):
        assert np.array_equal(got, want)


def test_the_balance_is_frozen_at_the_first_page() -> None:
    frozen, own = (filled(CacheOptions(0, 16, b), 400, 400, np.random.default_rng(3)) for b in (False, True))
    keys = frozen.k.astype(np.float32).transpose(1, 2, 0)
    rms = frozen.q_rms.transpose(1, 2, 0)
    first = encode_side(KVTYPES["q4"], Side.K, keys[..., :128], 16, 128, rms[..., :128])
    assert frozen.balance is not None and np.array_equal(frozen.balance, first.balance)
    second = encode_side(KVTYPES["q4"], Side.K, keys[..., 128:256], 0, 128, frozen=first.balance)
    view, _ = frozen.view(256, 256)
    assert np.array_equal(view[128:].transpose(1, 2, 0), second.raw())
    other, _ = own.view(256, 256)
    assert np.array_equal(view[:128], other[:128]) and not np.array_equal(view[128:], other[128:])


def test_queries_are_measured_over_the_heads_that_share_a_key(rng: np.random.Generator) -> None:
    cache, q = LayerCache(*K4V3, 2, 64, 64, CacheOptions()), gauss(rng, 5, 6, 64)
    cache.append(q, gauss(rng, 5, 2, 64), gauss(rng, 5, 2, 64))
    for kv, heads in ((0, q[:, :3]), (1, q[:, 3:])):
        np.testing.assert_allclose(cache.q_rms[:, kv], np.linalg.norm(heads, axis=1) / 3**0.5, rtol=1e-3)


def test_f16_saturates(rng: np.random.Generator) -> None:
    cache = LayerCache(*F16, 1, 64, 64, CacheOptions())
    big = np.full((1, 1, 64), -1e6, np.float32)
    cache.append(big, big, -big)
    assert (cache.k == -65504).all() and (cache.v == 65504).all()


def test_attention_is_softmax(rng: np.random.Generator) -> None:
    q, k, v = gauss(rng, 3, 4, 8), gauss(rng, 5, 2, 8), gauss(rng, 5, 2, 6)
    out = attention(q, k.astype(np.float64), v.astype(np.float64), np.array([2, 3, 4]), 0.5)
    for row in range(3):
        for head in range(4):
            visible, kv = slice(0, row + 3), head // 2
            weight = np.exp(0.5 * k[visible, kv].astype(np.float64) @ q[row, head])
            np.testing.assert_allclose(out[row, head], weight @ v[visible, kv] / weight.sum(), rtol=1e-12)


# ---- model ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_model(tmp_path: Path) -> Callable[..., Model]:
    """Two layers, four heads of 64, two KV heads."""
    return lambda arch="llama", **options: load(tiny.write_model(tmp_path / "m.gguf", arch=arch, **options).path)


@pytest.mark.parametrize(("arch", "weight_type", "tied"), [("llama", "Q4_0", False), ("qwen2", "Q4_K", True)])
def test_a_file_is_read(arch: str, weight_type: str, tied: bool, tmp_path: Path) -> None:
    bos = {"tokenizer.ggml.bos_token_id": 7, "tokenizer.ggml.add_bos_token": True}
    want = tiny.write_model(
        tmp_path / "m.gguf", arch=arch, weight_type=weight_type, tied=tied, rope_base=5e5, extra_keys=bos
    )
    model = load(want.path)
    assert (model.hyper.arch, model.hyper.rope_base, model.hyper.n_rot, model.bos) == (arch, 5e5, 64, 7)
    assert set(model.weights) == set(want.tensors)
    assert all(np.array_equal(model.weights[name], want.tensors[name]) for name in want.tensors)
    head = want.tensors["token_embd.weight" if tied else "output.weight"]
    assert np.array_equal(model.logits(np.eye(2, 256)).argmax(axis=1), head[:, :2].argmax(axis=0))


def test_a_file_that_would_be_computed_wrongly_is_refused(tmp_path: Path) -> None:
    yarn = tiny.write_model(tmp_path / "yarn.gguf", extra_keys={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(ValueError, match="no RoPE scaling"):
        load(yarn.path)


def run(model: Model, tokens: np.ndarray, batch: int, pair=F16, **options) -> np.ndarray:
    sequence = model.sequence([pair] * model.hyper.n_layer, CacheOptions(**options))
    hidden = [sequence.feed(tokens[i : i + batch]) for i in range(0, len(tokens), batch)]
    return model.logits(np.concatenate(hidden))


def by_hand(model: Model, tokens: list[int]) -> np.ndarray:
    """The logits of the last token, a token and a head at a time, RoPE in complex numbers."""
    h, w = model.hyper, model.weights

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / (x @ x / len(x) + h.norm_eps) ** 0.5 * w[f"{name}.weight"]

    def turn(x: np.ndarray, t: int) -> np.ndarray:
        order = np.arange(64).reshape((2, 32) if h.arch == "qwen2" else (32, 2))
        real, imaginary = order if h.arch == "qwen2" else order.T
        z = (x[real] + 1j * x[imaginary]) * np.exp(1j * t * h.rope_base ** (-np.arange(32) / 32))
        out = np.empty(64)
        out[real], out[imaginary] = z.real, z.imag
        return out

    states = [w["token_embd.weight"][token] for token in tokens]
    for i in range(h.n_layer):
        blk, q, k, v = f"blk.{i}.", [], [], []
        for t, x in enumerate(states):
            y = norm(x, blk + "attn_norm")
            a, b, c = (w[f"{blk}attn_{s}.weight"] @ y + w.get(f"{blk}attn_{s}.bias", 0) for s in "qkv")
            q.append([turn(head, t) for head in a.reshape(4, 64)])
            k.append([turn(head, t).astype(np.float16) for head in b.reshape(2, 64)])
            v.append(c.reshape(2, 64).astype(np.float16))
        for t, x in enumerate(states):
            heads = []
            for head in range(4):
                p = np.array([np.exp(q[t][head] @ k[s][head // 2].astype(float) / 8) for s in range(t + 1)])
                heads.append(sum(p[s] / p.sum() * v[s][head // 2] for s in range(t + 1)))
            x = x + w[blk + "attn_output.weight"] @ np.concatenate(heads)
            y = norm(x, blk + "ffn_norm")
            gate = w[blk + "ffn_gate.weight"] @ y
            silu = gate * (1 + np.tanh(gate / 2)) / 2
            states[t] = x + w[blk + "ffn_down.weight"] @ (silu * (w[blk + "ffn_up.weight"] @ y))
    return w["output.weight"] @ norm(states[-1], "output_norm")


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_the_forward_pass_by_hand(arch: str, tiny_model) -> None:
    model = tiny_model(arch, norm_eps=0.1, k_bias=3.0)
    tokens = [3, 14, 15, 9, 26]
    np.testing.assert_allclose(run(model, np.array(tokens), 5)[-1], by_hand(model, tokens), atol=1e-9)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("pair", [F16, K4V3])
def test_decoding_one_by_one_is_prefilling(arch: str, pair, rng: np.random.Generator, tiny_model) -> None:
    model, tokens = tiny_model(arch), rng.integers(0, 50, 200)
    np.testing.assert_allclose(
        run(model, tokens, 1, pair, window=0), run(model, tokens, 200, pair, window=0), atol=1e-9
    )


def test_an_f16_cache_does_not_care_about_window_and_sink(rng: np.random.Generator, tiny_model) -> None:
    model, tokens = tiny_model(), rng.integers(0, 50, 300)
    np.testing.assert_allclose(run(model, tokens, 300), run(model, tokens, 300, window=300, sink=0), atol=1e-9)


def test_more_bits_are_closer(rng: np.random.Generator, tiny_model) -> None:
    model, tokens = tiny_model("qwen2"), rng.integers(0, 50, 256)
    exact = run(model, tokens, 256)
    errors = [nmse(exact, run(model, tokens, 256, (t, t), strict=True)) for t in ("q8", "q4", "q3", "q2")]
    assert 0 < errors[0] < 1e-3
    assert all(b > 2 * a for a, b in pairwise(errors))


def test_shared_kv_heads_are_repeated_kv_heads(rng: np.random.Generator, tiny_model) -> None:
    """Grouped-query attention is multi-head attention whose K and V rows are repeated for each group."""
    grouped, tokens = tiny_model("qwen2"), rng.integers(0, 50, 40)
    weights = dict(grouped.weights)
    for name in weights:
        if "attn_k." in name or "attn_v." in name:
            w = weights[name]
            weights[name] = np.repeat(w.reshape(2, 64, *w.shape[1:]), 2, axis=0).reshape(256, *w.shape[1:])
    full = Model(replace(grouped.hyper, n_head_kv=4), weights)
    np.testing.assert_allclose(run(full, tokens, 40), run(grouped, tokens, 40), atol=1e-9)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_rope_turns_pairs_by_the_distance(arch: str, rng: np.random.Generator) -> None:
    hyper = Hyper(arch, 1, 64, 1, 1, 64, 48, 1e4, 1e-5)
    q, k = rng.normal(size=(2, 1, 1, 64))

    def dot(m: int, n: int) -> float:
        return float((rope(q, np.array([m]), hyper) * rope(k, np.array([n]), hyper)).sum())

    assert dot(5, 3) == pytest.approx(dot(102, 100), rel=1e-10) and abs(dot(5, 3) - dot(3, 5)) > 1e-3
    turned = rope(np.ones((1, 1, 64)), np.array([1]), hyper)[0, 0]
    assert np.array_equal(turned[48:], np.ones(16))
    a, b = {"llama": (2, 3), "qwen2": (1, 25)}[arch]  # the second pair
    angle = 1e4 ** (-2 / 48)
    assert turned[a] == pytest.approx(np.cos(angle) - np.sin(angle))
    assert turned[b] == pytest.approx(np.cos(angle) + np.sin(angle))


# ---- perplexity -----------------------------------------------------------------------------------------------------


def test_chunks_drop_the_rest_and_take_a_bos_where_told() -> None:
    assert [c.tolist() for c in chunks(range(10), 4, None)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [c.tolist() for c in chunks(range(8), 4, 99)] == [[99, 1, 2, 3], [99, 5, 6, 7]]


def test_statistics() -> None:
    result = perplexity_of([np.log([2.0, 2.0]), np.log([8.0, 8.0])])
    assert result.running == pytest.approx((2, 4)) and result.ppl == pytest.approx(4)
    assert result.error == pytest.approx(4 * np.log(2) / 3**0.5)  # nll is log 4 -+ log 2
    result = divergence_of(np.arange(1001.0), np.arange(1001) < 910)
    assert (result.mean, result.median, result.p99, result.p999) == pytest.approx((500, 500, 990, 999))
    assert result.error == pytest.approx(np.std(np.arange(1001.0), ddof=1) / 1001**0.5)
    assert result.same_top == 910 / 1001


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(rng: np.random.Generator, tiny_model) -> None:
    model = tiny_model()
    model.weights["output.weight"] = np.zeros((50, 256))
    setting = Setting([F16] * 2, CacheOptions())
    assert perplexity(model, rng.integers(0, 50, 130), 64, setting).running == pytest.approx((50, 50))


def test_scored_positions_predict_the_next_token(rng: np.random.Generator, tiny_model) -> None:
    model, tokens = tiny_model(), rng.integers(0, 50, 64)
    logits = run(model, tokens, 64)
    nll = [np.log(np.exp(logits[t]).sum()) - logits[t, tokens[t + 1]] for t in range(32, 63)]
    got = perplexity(model, tokens, 64, Setting([F16] * 2, CacheOptions(), n_batch=20))
    assert got.ppl == pytest.approx(np.exp(np.mean(nll)), rel=1e-9)


def test_divergence_is_from_the_f16_cache(rng: np.random.Generator, tiny_model) -> None:
    model, tokens = tiny_model(), rng.integers(0, 50, 256)
    options = CacheOptions(sink=0, strict=True)
    same = divergence(model, tokens, 256, Setting([F16] * 2, options, 256))
    assert (same.mean, same.same_top) == (0, 1)
    p, q = run(model, tokens, 256), run(model, tokens, 256, K4V3, sink=0, strict=True)
    kl = []
    for a, b in zip(p[128:255], q[128:255], strict=True):
        a, b = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        kl.append(float((a * np.log(a / b)).sum()))
    got = divergence(model, tokens, 256, Setting([K4V3] * 2, options, 256))
    assert got.mean == pytest.approx(np.mean(kl), rel=1e-9) and got.median == pytest.approx(np.median(kl), rel=1e-9)
