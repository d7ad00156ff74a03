"""Recipes: who decides, how the text is read, and what a file may say (recipe.h)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import kvmix
import tiny

N_LAYER = 4
ARRAYS = {"kvmix.version": 1, "kvmix.k_type": ["q8", "q4", "q4", "q4"], "kvmix.v_type": ["q3"] * N_LAYER}
K8V3 = [("q8", "q3")] + [("q4", "q3")] * 3


@pytest.fixture(scope="module")
def with_keys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], kvmix.Model]:
    """A small model whose file has these keys."""

    def write(keys: dict[str, Any]) -> kvmix.Model:
        path = tmp_path_factory.mktemp("model") / "keys.gguf"
        small = {"n_embd": 64, "n_head": 1, "n_head_kv": 1, "n_ff": 64}
        return kvmix.Model(tiny.write_model(path, n_layer=N_LAYER, extra_keys=keys, **small).path)

    return write


@pytest.fixture(scope="module")
def plain(with_keys: Callable[[dict[str, Any]], kvmix.Model]) -> kvmix.Model:
    return with_keys({})


def types(session: kvmix.Session) -> list[tuple[str, str]]:
    return [(layer.k_type, layer.v_type) for layer in session.layers]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("k4v3", [("q4", "q3")] * 4),
        ("f16", [("f16", "f16")] * 4),
        ("q8", [("q8", "q8")] * 4),
        ("q4_0", [("q4", "q4")] * 4),
        ("kf16v2", [("f16", "q2")] * 4),
        ("k4v3,0-1:k8v4", [("q8", "q4")] * 2 + [("q4", "q3")] * 2),
        ("k4v3;3:f16", [("q4", "q3")] * 3 + [("f16", "f16")]),
        (" k4 v3 , 0 - 2 : k8v8 ; 1 : k2v2 ", [("q8", "q8"), ("q2", "q2"), ("q8", "q8"), ("q4", "q3")]),
    ],
)
def test_a_recipe_is_read_and_written(plain: kvmix.Model, text: str, expected: list[tuple[str, str]]) -> None:
    session = plain.session(kv=text)
    assert types(session) == expected
    assert session.stats.recipe_source == "--kv"
    assert types(plain.session(kv=session.stats.recipe)) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no KV type"),
        ("k4", "'v' is missing"),
        ("kv3", "a number of bits is missing"),
        ("k7v3", "no type of 7 bits; the types are f16 q8 q6 q5 q4 q3 q2"),
        ("k16v3", "no type of 16 bits"),
        ("kf8v3", "no type of float 8 bits"),
        ("q9", "'q9' is no KV type"),
        ("k4v3,", "a layer number is missing"),
        ("k4v3,0", "':' is missing"),
        ("k4v3,0-:k8v8", "the last layer of a range is missing"),
        ("k4v3,4:k8v8", "layers 4-4 do not fit a model of 4 layers"),
        ("k4v3,0-99999999999:k8v8", "do not fit a model of 4 layers"),
        ("k4v3,2-1:k8v8", "layers 2-1 do not fit"),
        ("k4v3 k8v8", "text is left over"),
        ("k4v3\n", "text is left over"),
        ("K4V3", "no KV type"),
    ],
)
def test_a_bad_recipe_is_told_what_is_wrong(plain: kvmix.Model, text: str, sentence: str) -> None:
    with pytest.raises(kvmix.ArgumentError, match=sentence):
        plain.session(kv=text)


@pytest.mark.parametrize(
    ("options", "expected", "source"),
    [
        ({}, K8V3, "file"),
        ({"kv_default": "k2v2"}, K8V3, "file"),
        ({"kv": "k3v3", "kv_default": "k2v2"}, [("q3", "q3")] * 4, "--kv"),
        ({"k_type": "q2"}, [("q2", "q3")] * 4, "-ctk/-ctv"),
        ({"v_type": "q8_0"}, [("q8", "q8")] + [("q4", "q8")] * 3, "-ctk/-ctv"),
        ({"kv": "k3v3", "v_type": "f16"}, [("q3", "f16")] * 4, "-ctk/-ctv"),
    ],
)
def test_who_decides(with_keys: Callable, options: dict[str, str], expected: list, source: str) -> None:
    session = with_keys(ARRAYS).session(**options)
    assert (types(session), session.stats.recipe_source) == (expected, source)


def test_a_file_without_a_recipe_gets_the_catalogs_else_the_default(plain: kvmix.Model) -> None:
    for options, expected, source in (({"kv_default": "k3v2"}, ("q3", "q2"), "catalog"), ({}, ("q4", "q3"), "default")):
        stats = plain.session(**options).stats
        assert (stats.recipe_source, stats.window, stats.sink) == (source, 128, 16)
        assert types(plain.session(**options)) == [expected] * 4


def test_window_and_sink_come_apart_from_the_types_and_the_balance_with_them(with_keys: Callable) -> None:
    model = with_keys(ARRAYS | {"kvmix.window": 256, "kvmix.sink": 4, "kvmix.balance": "page"})

    def resolved(**options: Any) -> tuple[int, int]:
        stats = model.session(**options).stats
        return stats.window, stats.sink

    assert resolved() == (256, 4)
    assert resolved(kv="k2v2") == (256, 4)
    assert resolved(window=0) == (0, 4)
    assert resolved(sink=0) == (256, 0)
    frozen, page = (model.session(kv="k4v3", balance_page=b).layers[0].page_bytes for b in (0, 1))
    assert page > frozen == model.session(kv="k4v3").layers[0].page_bytes
    frozen, page = (model.session(balance_page=b).layers[0].page_bytes for b in (0, 1))
    assert page > frozen and model.session().layers[0].page_bytes == page


# (keys beside ARRAYS, error, sentence, whether --kv is the way out)
BAD_KEYS: list[tuple[dict[str, Any], type[Exception], str, bool]] = [
    ({"kvmix.version": 2}, kvmix.Unsupported, r"kvmix\.version is 2, this build knows 1; run with --kv", True),
    ({"kvmix.k_type": ["q4"] * 3}, kvmix.FormatError, r"kvmix\.k_type has 3 entries for 4 layers; .* --kv", True),
    ({"kvmix.v_type": ["q4"] * 5}, kvmix.FormatError, r"kvmix\.v_type has 5 entries for 4 layers", True),
    ({"kvmix.v_type": ["q7"] * 4}, kvmix.FormatError, r"kvmix\.v_type: 'q7' is no KV type; there are f16", True),
    ({"kvmix.recipe": "k4v4"}, kvmix.FormatError, r"kvmix\.recipe says other types than kvmix\.k_type", True),
    ({"kvmix.recipe": "k4v3"}, kvmix.FormatError, r"kvmix\.recipe says other types than kvmix\.k_type", True),
    ({"kvmix.recipe": "nonsense"}, kvmix.FormatError, r"kvmix\.recipe says other types", True),
    ({"kvmix.k_type": 4}, kvmix.FormatError, r"kvmix\.k_type", True),
    ({"kvmix.version": "1"}, kvmix.FormatError, r"kvmix\.version", False),
    ({"kvmix.sink": 65}, kvmix.FormatError, r"kvmix\.sink", False),
    ({"kvmix.balance": "maybe"}, kvmix.FormatError, r"kvmix\.balance is neither 'frozen' nor 'page'; .* --kv", True),
]


@pytest.mark.parametrize(("keys", "error", "sentence", "has_a_way_out"), BAD_KEYS, ids=lambda v: str(v)[:40])
def test_a_files_recipe_that_does_not_fit_is_refused_by_name(
    with_keys: Callable, keys: dict[str, Any], error: type[Exception], sentence: str, has_a_way_out: bool
) -> None:
    model = with_keys(ARRAYS | keys)
    with pytest.raises(error, match=sentence):
        model.session()
    with pytest.raises(error, match=sentence):
        model.plan()
    if has_a_way_out:
        assert types(model.session(kv="k4v4")) == [("q4", "q4")] * 4


def test_a_recipe_lacks_a_side(with_keys: Callable) -> None:
    with pytest.raises(kvmix.FormatError, match=r"kvmix\.version is there but kvmix\.v_type is not"):
        with_keys({"kvmix.version": 1, "kvmix.k_type": ["q4"] * 4}).session()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k_type": "int4"}, "-ctk: 'int4' is no KV type; there are f16 q8 q6 q5 q4 q3 q2"),
        ({"v_type": ""}, "-ctv: '' is no KV type"),
        ({"sink": 65}, "sink 65 is out of range; it takes 0 to 64"),
        ({"window": -2}, "window -2 is out of range"),
        ({"strict": True, "n_batch": 100}, "n_batch 100 is not a multiple of 128"),
    ],
)
def test_a_bad_option_is_named(plain: kvmix.Model, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(kvmix.ArgumentError, match=sentence):
        plain.session(**options)
