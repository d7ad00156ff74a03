"""Recipes that lie beside a model's file, and recipes by name: --kv norms and --kv paper; what is said at load."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import kvmix
import tiny
from kvmix import _native, _recipes
from kvmix._context import mib
from kvmix.convert import norms

N_LAYER = 4
KEYS = {"kvmix.version": 1, "kvmix.k_type": ["q8", "q4", "q4", "q4"], "kvmix.v_type": ["q3"] * N_LAYER}
K8V3 = [("q8", "q3")] + [("q4", "q3")] * 3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "recipes"


@pytest.fixture
def model_file(tmp_path: Path) -> Callable[..., Path]:
    def write(**options: Any) -> Path:
        small = {"n_layer": N_LAYER, "n_embd": 64, "n_head": 1, "n_head_kv": 1, "n_ff": 64}
        return tiny.write_model(tmp_path / "m.gguf", **(small | options)).path

    return write


def types(session: kvmix.Session) -> list[tuple[str, str]]:
    return [(layer.k_type, layer.v_type) for layer in session.layers]


def header_crc32(path: Path) -> int:
    return zlib.crc32(path.read_bytes()[: gguf.GGUFReader(path).data_offset])


def write_sidecar(path: Path, keys: dict[str, Any] | None = None, **changes: Any) -> Path:
    """As annotate --sidecar does, for the model of this path."""
    sidecar = path.with_suffix(".kvmix.gguf")
    writer = gguf.GGUFWriter(sidecar, "llama")
    for key, value in (KEYS if keys is None else keys).items():
        tiny.put_key(writer, key, value)
    whose = {"file_bytes": path.stat().st_size, "header_crc32": header_crc32(path)} | changes
    writer.add_uint64("kvmix.sidecar.file_bytes", whose["file_bytes"])
    writer.add_uint32("kvmix.sidecar.header_crc32", whose["header_crc32"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return sidecar


# ---- tensors and numbers of a file ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight_type", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
)
def test_a_tensor_is_read_by_name(tmp_path: Path, weight_type: str) -> None:
    written = tiny.write_model(tmp_path / "m.gguf", n_layer=1, weight_type=weight_type)
    model = kvmix.Model(written.path)
    for name, values in written.tensors.items():
        found = model.tensor(name)
        assert found is not None
        np.testing.assert_array_equal(found, values)
        assert model.shape(name) == values.shape
    assert model.tensor("blk.9.attn_k.weight") is None
    assert model.shape("blk.9.attn_k.weight") == ()


def test_some_rows_of_a_tensor(model_file: Callable[..., Path]) -> None:
    model = kvmix.Model(model_file(weight_type="Q4_0"))
    name = "blk.0.ffn_up.weight"
    whole = model.tensor(name)
    assert whole is not None
    np.testing.assert_array_equal(_native.model_read_tensor(model.handle, name, 3, 5, 64), whole[3:8])
    assert _native.model_read_tensor(model.handle, name, 64, 0, 64).shape == (0, 64)
    for first, n_rows in ((-1, 1), (0, 65), (64, 1), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(
            kvmix.ArgumentError, match=r"rows from -?\d+: the tensor blk\.0\.ffn_up\.weight has the rows 0 to 63"
        ):
            _native.model_read_tensor(model.handle, name, first, n_rows, 0)
    with pytest.raises(kvmix.ArgumentError, match="has no tensor 'nope'"):
        _native.model_read_tensor(model.handle, "nope", 0, 1, 64)


def test_numbers_and_fingerprint(model_file: Callable[..., Path]) -> None:
    path = model_file(extra_keys={"x.long": [0.5 * i for i in range(1000)], "x.text": ["a"]})
    model = kvmix.Model(path)
    np.testing.assert_array_equal(model.numbers("x.long"), np.arange(1000, dtype=np.float32) / 2)
    assert len(model.numbers("x.absent")) == 0
    with pytest.raises(kvmix.FormatError, match=r"x\.text"):
        model.numbers("x.text")
    assert model.fingerprint == f"{path.stat().st_size:x}-{header_crc32(path):08x}"


# ---- the sidecar ----------------------------------------------------------------------------------------------------


def test_a_sidecar_is_picked_up_and_may_be_overridden(model_file: Callable[..., Path]) -> None:
    path = model_file()
    write_sidecar(path, KEYS | {"kvmix.window": 256, "kvmix.method": "by hand", "kvmix.k_norm.spectral": [1.0, 2.0]})
    model = kvmix.Model(path)
    session = model.session(kv_default="k2v2")
    assert types(session) == K8V3
    assert (session.stats.recipe_source, session.stats.window, session.stats.sink) == ("sidecar", 256, 16)
    assert model.metadata("kvmix.method") == "by hand"
    assert model.numbers("kvmix.k_norm.spectral").tolist() == [1, 2]
    assert model.metadata("general.name") == "tiny", "other keys are the model's"
    assert model.session(kv="k4v4").stats.recipe_source == "--kv"
    assert types(model.session(v_type="q8")) == [("q8", "q8")] + [("q4", "q8")] * 3
    assert kvmix.Model(path, mmap=False).session().stats.recipe_source == "sidecar"


def test_a_file_with_a_recipe_of_its_own_has_no_use_for_one(model_file: Callable[..., Path]) -> None:
    path = model_file(extra_keys=KEYS)
    sidecar = write_sidecar(path, KEYS | {"kvmix.k_type": ["q2"] * N_LAYER}, file_bytes=1)
    session = kvmix.Model(path).session()
    assert (types(session), session.stats.recipe_source) == (K8V3, "file")
    sidecar.write_bytes(b"not even a GGUF file")
    assert types(kvmix.Model(path).session()) == K8V3


@pytest.mark.parametrize("change", [{"file_bytes": 5}, {"header_crc32": 5}])
def test_a_sidecar_of_another_file_is_refused_by_name(model_file: Callable[..., Path], change: dict[str, int]) -> None:
    path = model_file()
    sidecar = write_sidecar(path, KEYS | {"kvmix.window": 256, "kvmix.method": "by hand"}, **change)
    model = kvmix.Model(path)
    sentence = rf"{sidecar} was made for another file than {path}: write it again \(.*\), delete it, or run with --kv"
    with pytest.raises(kvmix.FormatError, match=sentence):
        model.session()
    with pytest.raises(kvmix.FormatError, match=sentence):
        model.plan(k_type="q4")
    session = model.session(kv="k4v4")
    assert (session.stats.recipe, session.stats.window) == ("k4v4", 128)
    assert model.metadata("kvmix.method") is None, "nothing is believed of it"
    sidecar.unlink()
    assert kvmix.Model(path).session().stats.recipe_source == "default"


def test_a_sidecar_that_does_not_say_whose_it_is_is_refused(model_file: Callable[..., Path]) -> None:
    path = model_file()
    writer = gguf.GGUFWriter(path.with_suffix(".kvmix.gguf"), "llama")
    for key, value in KEYS.items():
        tiny.put_key(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(kvmix.FormatError, match="was made for another file"):
        kvmix.Model(path).session()


def test_what_is_wrong_in_a_sidecar_is_said_with_its_name(model_file: Callable[..., Path]) -> None:
    path = model_file()
    write_sidecar(path, KEYS | {"kvmix.k_type": ["q4"] * 3})
    with pytest.raises(kvmix.FormatError, match=r"m\.kvmix\.gguf: kvmix\.k_type has 3 entries for 4 layers"):
        kvmix.Model(path).session()
    write_sidecar(path, KEYS | {"kvmix.version": 2})
    with pytest.raises(kvmix.Unsupported, match=r"m\.kvmix\.gguf: kvmix\.version is 2"):
        kvmix.Model(path).session()
    path.with_suffix(".kvmix.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(kvmix.FormatError, match=r"m\.kvmix\.gguf"):
        kvmix.Model(path)


# ---- by name --------------------------------------------------------------------------------------------------------


def test_norms_are_computed_once_and_kept(
    model_file: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_file()
    model = kvmix.Model(path)
    session = model.session(kv="norms")
    assert session.stats.recipe_source == "norms"
    [kept] = cache.iterdir()
    assert kept.name == f"{model.fingerprint}.json"
    found, expected = _recipes.known_norms(model), norms.model_norms(path)
    assert found is not None
    for score in ("frobenius", "spectral"):
        pair = (list(getattr(found, f"k_{score}")), list(getattr(found, f"v_{score}")))
        assert pair == expected.scores(score)
    assert found.ratio == pytest.approx(norms.ratio(*expected.scores("spectral")))

    def refuse(_model: kvmix.Model) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(_recipes, "compute_norms", refuse)
    assert kvmix.Model(path).session(kv="norms:3.5").stats.recipe != session.stats.recipe


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"k_frobenius": 1}', b"\xff", b'{"x": []}', None])
def test_kept_norms_that_do_not_fit_are_made_again(
    model_file: Callable[..., Path], cache: Path, damage: bytes | None
) -> None:
    path = model_file()
    recipe = kvmix.Model(path).session(kv="norms").stats.recipe
    [kept] = cache.iterdir()
    good = kept.read_bytes()
    shorter = {name: values[1:] for name, values in json.loads(good).items()}
    kept.write_bytes(json.dumps(shorter).encode() if damage is None else damage)
    assert kvmix.Model(path).session(kv="norms").stats.recipe == recipe
    assert kept.read_bytes() == good
    assert list(cache.iterdir()) == [kept], "no temporary file is left"


def test_a_cache_folder_that_cannot_be_written_costs_time_only(
    model_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVMIX_CACHE", str(tmp_path / "file"))
    assert kvmix.Model(model_file()).session(kv="norms").stats.recipe_source == "norms"


def test_the_budget_is_kept_and_keys_come_first(model_file: Callable[..., Path]) -> None:
    model = kvmix.Model(model_file())
    bits = []
    for budget in (2.9, 3.3, 3.6, 4.0, 5.0, 8.5):
        layers = model.session(1024, kv=f"norms:{budget}").layers
        bits.append(8 * sum(layer.page_bytes for layer in layers) / (128 * 128 * N_LAYER))
        assert bits[-1] <= budget
        assert all(layer.k_type[1:] >= layer.v_type[1:] for layer in layers)
    assert bits == sorted(bits) and bits[0] < bits[-1]


def test_layers_with_larger_norms_step_up_first(model_file: Callable[..., Path]) -> None:
    """Norms that a file carries are used as they are."""
    scores = {f"kvmix.{side}_norm.{kind}": [1.0, 1.0, 9.0, 1.0] for side in "kv" for kind in ("frobenius", "spectral")}
    path = model_file(extra_keys=scores)
    alike = [layer.page_bytes for layer in kvmix.Model(path).session(1024, kv="norms:3.5").layers]
    assert alike[2] > min(alike), "the third layer has most"


@pytest.mark.parametrize(
    ("kv", "sentence"),
    [
        ("norms:", "'' is no number of bits; it looks like norms or norms:3.5"),
        ("norms:x", "'x' is no number of bits"),
        ("norms:-1", "'-1' is no number of bits"),
        ("norms:nan", "'nan' is no number of bits"),
        ("norms:1", r"--kv norms:1: the smallest recipe takes \d\.\d+ bits a value"),
        ("normsy", "no KV type"),
        ("papers", "no KV type"),
    ],
)
def test_a_bad_name_is_told_what_is_wrong(model_file: Callable[..., Path], kv: str, sentence: str) -> None:
    with pytest.raises(kvmix.ArgumentError, match=sentence):
        kvmix.Model(model_file()).session(kv=kv)


def test_the_papers_recipe(model_file: Callable[..., Path]) -> None:
    model = kvmix.Model(model_file(extra_keys=KEYS))
    session = model.session(kv="paper")
    assert (types(session), session.stats.recipe_source) == ([("q4", "q2")] * 4, "paper")
    assert model.session(kv="paper", k_type="q8").stats.recipe_source == "-ctk/-ctv"
    assert model.session(kv="k3v3", kv_source="a caller's own").stats.recipe_source == "a caller's own"


# ---- what is said at load -------------------------------------------------------------------------------------------


def load_lines(path: Path, *flags: str) -> str:
    command = [sys.executable, "-m", "kvmix.chat", str(path), "-p", "hi", "-n", "1", *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_the_load_line(model_file: Callable[..., Path]) -> None:
    path = model_file()
    with kvmix.Model(path) as model:
        ours, f16 = (mib(model.plan(kv=kv, n_seq_max=1).kv_bytes) for kv in ("k4v3", "f16"))
    said = load_lines(path)
    assert f"\nrecipe k4v3 (default), window 128, sink 16; KV {ours} at 1024 instead of {f16}, " in said
    assert "keys" not in said
    keys = f"\nkeys {norms.ratio(*norms.model_norms(path).scores('spectral')):.1f}x values (spectral, 4 of 4 layers); "
    said = load_lines(path, "--kv", "norms")
    assert f"{keys}recipe k" in said and "(norms), window" in said
    assert f"{keys}recipe k8v8 (--kv)" in load_lines(path, "--kv", "q8"), "the norms are kept"
    scores = {
        "kvmix.k_norm.frobenius": 1.0,
        "kvmix.k_norm.spectral": 3.0,
        "kvmix.v_norm.frobenius": 1.0,
        "kvmix.v_norm.spectral": 1.0,
    }
    more = {"kvmix.method": "ladder by spectral"} | {key: [value] * N_LAYER for key, value in scores.items()}
    write_sidecar(path, KEYS | more)
    said = load_lines(path)
    assert (
        "keys 3.0x values (spectral, 4 of 4 layers); recipe k4v3,0:k8v3 (ladder by spectral, from the sidecar), "
        in said
    )
    path.with_suffix(".kvmix.gguf").unlink()
    model_file(extra_keys=KEYS)
    assert "recipe k4v3,0:k8v3 (from the file), window" in load_lines(path)


def test_biased_and_normalized_keys_are_named(tmp_path: Path) -> None:
    shape = {"n_layer": 5, "n_embd": 64, "n_head": 1, "n_head_kv": 1, "n_ff": 64}
    tame = tiny.write_model(tmp_path / "tame.gguf", arch="qwen2", k_bias=20, **shape)
    assert "key biases" not in load_lines(tame.path), "large, but everywhere"
    normed = tiny.write_model(tmp_path / "normed.gguf", arch="qwen3", **shape)
    assert "QK-norm: gains behind W_K set the size of these keys" in load_lines(normed.path)
    assert "this recipe does not use it" in load_lines(normed.path)
    assert "only which layers come first" in load_lines(normed.path, "--kv", "norms")
    assert "QK-norm" not in load_lines(normed.path, "-ctk", "f16")


def test_one_huge_key_bias_is_named(tmp_path: Path) -> None:
    small = tiny.write_model(tmp_path / "m.gguf", arch="qwen2", n_layer=5, n_embd=64, n_head=1, n_head_kv=1, n_ff=64)
    data = bytearray(small.path.read_bytes())
    reader = gguf.GGUFReader(small.path)
    [bias] = [t for t in reader.tensors if t.name == "blk.3.attn_k.bias"]
    large = (100 * small.tensors[bias.name]).astype("<f4")
    data[bias.data_offset : bias.data_offset + large.nbytes] = large.tobytes()
    small.path.write_bytes(data)
    norm = f"{np.linalg.norm(large):.0f}"
    assert f"key biases (norm {norm} in layer 3, median 2) dominate these keys: page mean" in load_lines(small.path)
    assert "key biases" not in load_lines(small.path, "--kv", "f16")
