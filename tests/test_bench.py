"""What the scripts of tests/bench compute, where a number could be wrong without anyone seeing it."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader

import kvmix
import tiny

pytestmark = pytest.mark.usefixtures("bench")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by their names."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "bench")


@pytest.mark.parametrize(("weight_type", "arch"), [("Q8_0", "llama"), ("Q4_K", "gemma3")])
def test_an_f32_copy_is_the_same_model(tmp_path: Path, weight_type: str, arch: str) -> None:
    from to_f32 import write_copy

    source = tiny.write_model(tmp_path / "in.gguf", arch=arch, weight_type=weight_type).path
    write_copy(Path(source), tmp_path / "out.gguf")
    before, after = GGUFReader(source), GGUFReader(tmp_path / "out.gguf")
    assert {t.tensor_type for t in after.tensors} == {GGMLQuantizationType.F32}
    assert [(t.name, t.shape.tolist()) for t in after.tensors] == [(t.name, t.shape.tolist()) for t in before.tensors]
    kept = [name for name in before.fields if name not in ("general.file_type", "GGUF.kv_count")]
    assert [before.fields[name].contents() for name in kept] == [after.fields[name].contents() for name in kept]
    logits = []
    for path in (source, tmp_path / "out.gguf"):
        session = kvmix.Model(path).session(n_ctx=128, kv="f16", act="f32")
        session.sync(range(10, 40))
        logits.append(session.logits)
    assert np.abs(logits[0] - logits[1]).max() < 1e-4 * np.abs(logits[0]).max()


def test_books_are_cut_where_chapters_begin_anew() -> None:
    from texts import books

    text = (
        b"### 1 - Sara\na\n### 2 - B\n### 11\n### Chapter 1 \nkim\n### Chapter 11\n### Chapter 1\nanne\n### Chapter 12"
    )
    got = books(text)
    assert got["kim"] == b"### Chapter 1 \nkim\n### Chapter 11\n" and b"".join(got.values()) == text
    with pytest.raises(ValueError, match="2 first chapters"):
        books(text[:70])


def test_no_reported_text_is_one_of_those_that_choices_are_made_on(shared: Path) -> None:
    from texts import NAMES, part

    parts = {name: part(name, shared / "text") for name in NAMES}
    assert parts["kim"].count(b"Kim") > 500 and b"Kim " not in parts["novels"]
    assert parts["novels"].count(b"Sara") > 500 and parts["novels"].count(b"Anne Elliot") > 20
    assert parts["wiki"][:20_000] not in parts["calibration"]


def test_a_ratio_is_drawn_over_the_chunks_that_both_have() -> None:
    from kld import ratio

    rng = np.random.default_rng(1)
    theirs = rng.lognormal(0, 1, 16)
    assert ratio(0.4 * theirs, theirs) == pytest.approx((0.4, 0.4, 0.4))  # the chunks' own spread cancels
    value, low, high = ratio(theirs * rng.lognormal(-1, 0.3, 16), theirs)
    assert low < value < high and 0.02 < high - low < 0.2
    swapped = ratio(0.4 * theirs, np.roll(theirs, 1))
    assert swapped[2] - swapped[1] > 0.2
