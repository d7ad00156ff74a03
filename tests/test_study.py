"""The page hook, and the codecs for study that enter through it (tests/ref/study.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvmix
import tiny
from kvmix import Row
from kvmix._native import Page
from ref.codec import KVTYPES, Side, encode_side, nmse
from ref.study import CODECS, V_CODECS, Precondition, Study, min_max


@dataclass
class FakePage:
    k: np.ndarray  # [d_k, 128]
    v: np.ndarray  # [128, d_v]
    q_rms: np.ndarray
    layer: int = 0
    head: int = 0
    page: int = 0
    first: int = 16
    n_valid: int = 128


def random_page(seed: int = 0, d: int = 64) -> FakePage:
    """Keys whose channels differ in size and mean, f16 as in a cache."""
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((d, 128)) * np.exp(rng.standard_normal((d, 1))) + 3 * rng.standard_normal((d, 1))
    sides = (k, rng.standard_normal((128, d)), np.abs(rng.standard_normal((d, 128))) + 0.1)
    return FakePage(*(side.astype(np.float16).astype(np.float32) for side in sides))


@pytest.mark.parametrize("name", [name for name, kvtype in KVTYPES.items() if kvtype.quantized])
@pytest.mark.parametrize("d", [64, 80, 128])
def test_the_runtimes_types_are_what_they_are(name: str, d: int) -> None:
    """In float64 and without bytes, but the same values: less than a thousandth of the codec's own error apart."""
    page = random_page(d=d)
    k = encode_side(KVTYPES[name], Side.K, page.k, 16, 128, page.q_rms.astype(np.float16)).raw()[:, 16:]
    v = encode_side(KVTYPES[name], Side.V, page.v.T.copy(), 16, 128).raw()[:, 16:].T
    before = random_page(d=d)
    Study(CODECS[name], V_CODECS[name], v_rotation=-1 if d == 80 else 64)(page)
    for want, got, raw in ((k, page.k[:, 16:], before.k[:, 16:]), (v, page.v[16:], before.v[16:])):
        assert nmse(want, got) < 0.02 * nmse(raw, want)
    assert np.array_equal(page.k[:, :16], before.k[:, :16])
    assert np.array_equal(page.v[:16], before.v[:16])


@pytest.mark.parametrize(("name", "bound"), [("1", 0.364), ("1.58", 0.191)])
def test_one_bit_and_three_levels(name: str, bound: float) -> None:
    """No worse than the best fixed quantizer of a Gaussian with as many levels."""
    x = np.random.default_rng(1).standard_normal((128, 4096))
    assert 0.9 * bound < nmse(x, CODECS[name](x)) < bound


def test_the_papers_quantizer() -> None:
    x = np.random.default_rng(2).standard_normal((128, 256))
    for along in ("channels", "positions"):
        for bits, n_levels in ((1, 2), (1.58, 3), (2, 4), (4, 16)):
            y = min_max(bits, 64, along)(x)
            group = y[:64, 0] if along == "channels" else y[0, :64]
            assert 2 <= len(np.unique(group)) <= n_levels
            assert abs(group.min() - (x[:64, 0] if along == "channels" else x[0, :64]).min()) < 2e-3
    exact = min_max(8, 64)(np.tile(np.arange(64.0), (2, 1)).T)  # 64 of 256 levels
    assert np.abs(exact - np.arange(64.0)[:, None]).max() < 0.13


def test_what_preconditioning_is_worth() -> None:
    """Channels with a mean, and of a size that queries do not need: each step takes error out of the logits."""

    def error(precondition: Precondition) -> float:
        page, rng = random_page(), np.random.default_rng(3)
        before = page.k.copy()
        q = rng.standard_normal((64, 64)) * page.q_rms.mean(axis=1)
        Study(CODECS["q3"], precondition=precondition)(page)
        return nmse(q @ before[:, 16:], q @ page.k[:, 16:])

    full = error(Precondition())
    assert full < error(Precondition(balance="none")) < error(Precondition(balance="none", mean=False))
    assert error(Precondition(statistics=64)) < error(Precondition(mean=False))
    assert full < error(Precondition(rotation=0))
    assert abs(error(Precondition(vector_bits=8)) / full - 1) < 0.1


def test_a_frozen_balance_is_that_of_the_first_page() -> None:
    study = Study(CODECS["q4"])
    study(random_page(0))
    frozen = study.frozen[0, 0].copy()
    other = random_page(1)
    other.page, other.first = 1, 0
    study(other)
    assert np.array_equal(study.frozen[0, 0], frozen)
    assert not np.array_equal(study.balance(random_page(1), *[random_page(1).k] * 2, True), frozen)


# ---- the hook -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> kvmix.Model:
    path: Path = tiny.write_model(tmp_path_factory.mktemp("study") / "tiny.gguf", n_embd=128, n_ff=256).path
    return kvmix.Model(path)


def logits(model: kvmix.Model, n_tokens: int = 300, **options: Any) -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, 256, n_tokens).tolist()
    with model.session(n_ctx=512, n_logits=512, act="f32", n_threads=1, **options) as session:
        session.decode([Row(token, want_logits=True) for token in ids])
        return np.array([session.logits_view(i).copy() for i in range(n_tokens)])


@pytest.mark.parametrize(("v_bits", "strict"), [(3, False), (3, True), (2, False), (2, True)])
def test_a_study_of_the_runtimes_types_gives_their_logits(model: kvmix.Model, v_bits: int, strict: bool) -> None:
    real = logits(model, kv=f"k4v{v_bits}", strict=strict)
    exact = logits(model, kv="f16")
    v = V_CODECS[f"q{v_bits}"]
    for kv, study in (
        ("f16", Study(CODECS["q4"], v)),
        ("k4vf16", Study(v=v)),
        (f"kf16v{v_bits}", Study(CODECS["q4"])),
    ):
        assert nmse(real, logits(model, kv=kv, page_hook=study, strict=strict)) < 0.1 * nmse(exact, real)


def test_a_hook_that_writes_nothing_changes_nothing(model: kvmix.Model) -> None:
    seen: list[tuple[int, int, int, int, int]] = []

    def look(page: Page) -> None:
        seen.append((page.layer, page.head, page.page, page.first, page.n_valid))
        assert page.k.shape == page.q_rms.shape == (64, 128)
        assert page.v.shape == (128, 64)
        with pytest.raises(ValueError, match="read-only"):
            page.q_rms[0] = 1

    for kv in ("f16", "k4v3"):
        assert nmse(logits(model, kv=kv), logits(model, kv=kv, page_hook=look)) < 1e-7
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert {(page, first, n_valid) for _, _, page, first, n_valid in seen} == {(0, 16, 128)}
    assert len(seen) == 2 * 2 * 2  # twice, layers, heads


def test_what_a_hook_raises_stops_the_batch_and_comes_out(model: kvmix.Model) -> None:
    def fail(page: Page) -> None:
        raise ZeroDivisionError(f"in layer {page.layer}")

    with model.session(n_ctx=512, kv="f16", page_hook=fail) as session:
        session.sync(range(200))
        with pytest.raises(ZeroDivisionError, match="in layer 0"):
            session.sync(range(257))  # the cut passes the first page
        assert session.length == 200
