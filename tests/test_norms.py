"""Norms of W_K and W_V: the arithmetic, where the weights come from, what is printed, what a cache holds."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from kvmix import FormatError, Model, ModelIOError, Unsupported
from kvmix._native import Page
from kvmix.convert import cache_norms, norms
from kvmix.convert.__main__ import main
from kvmix.convert.norms import LayerNorms, ModelNorms, SideNorms
from kvmix.convert.source import Attention, open_source
from ref import codec
from ref.codec import KVTYPES, Side

RNG = np.random.default_rng(7)  # for what holds whatever is drawn

# ---- the arithmetic -------------------------------------------------------------------------------------------------

# (name, K/V, gap, layers where K <= V) in Frobenius and in spectral norm: paper.md section 2, from the published files
PUBLISHED = [
    ("Llama3.2-1B", (2.84, 1.43, 0), (7.46, 2.80, 0)),
    ("Llama3.2-1B-it", (2.82, 1.42, 0), (7.65, 2.83, 0)),
    ("Llama3.2-3B", (2.17, 1.06, 0), (5.58, 2.40, 0)),
    ("Llama3.2-3B-it", (2.16, 1.06, 0), (5.69, 2.42, 0)),
    ("Llama3.1-8B", (2.58, 1.31, 0), (5.65, 2.44, 0)),
    ("Llama3.1-8B-it", (2.58, 1.31, 0), (5.66, 2.44, 0)),
    ("Llama3.3-70B-it", (2.39, 1.19, 2), (6.12, 2.45, 4)),
    ("Qwen3-0.6B", (0.94, -0.10, 24), (1.53, 0.55, 0)),
    ("Qwen3-4B", (0.88, -0.19, 35), (1.60, 0.65, 1)),
    ("Qwen3-8B", (0.88, -0.18, 35), (1.57, 0.63, 1)),
    ("Qwen3-14B", (0.88, -0.19, 39), (1.60, 0.65, 0)),
    ("Qwen3-32B", (0.90, -0.16, 63), (1.58, 0.64, 0)),
]


@pytest.mark.parametrize(("name", "frobenius", "spectral"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_the_published_norms_give_the_published_table(
    shared: Path, name: str, frobenius: tuple[float, float, int], spectral: tuple[float, float, int]
) -> None:
    f, s = (
        json.loads((shared / "norms" / f"{kind}_norm" / f"{name}.json").read_text())
        for kind in ("frobenius", "spectral")
    )
    k, v = ([SideNorms(*pair, 0.0, None, None) for pair in zip(f[w], s[w], strict=True)] for w in ("w_k", "w_v"))
    layers = tuple(map(LayerNorms, k, v))
    model = ModelNorms(name, "", *[(1,) * len(layers)] * 3, layers)
    for score, (ratio, gap, n_behind) in (("frobenius", frobenius), ("spectral", spectral)):
        k_scores, v_scores = model.scores(score)
        assert round(norms.ratio(k_scores, v_scores), 2) == ratio
        assert round(model.gap(score), 2) == gap
        assert sum(a <= b for a, b in zip(k_scores, v_scores, strict=True)) == n_behind


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 5), (64, 200), (200, 64), (300, 301), (512, 1024)])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_matrix_norms(shape: tuple[int, int], spread: float) -> None:
    w = (RNG.normal(size=shape) * np.exp(spread * RNG.normal(size=(shape[0], 1)))).astype(np.float32)
    singular = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    assert norms.spectral(w) == pytest.approx(singular[0], rel=2e-5)
    assert norms.frobenius(w) == pytest.approx(np.sqrt(np.square(singular).sum()), rel=1e-12)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [(np.zeros((5, 7)), 0.0), (np.eye(9), 1.0), (np.ones((6, 6)), 6.0), (np.outer(np.arange(300), np.ones(400)), None)],
    ids=["zero", "identity", "ones", "rank one"],
)
def test_spectral_norms_of_matrices_that_end_lanczos_early(matrix: np.ndarray, expected: float | None) -> None:
    exact = np.linalg.norm(matrix, 2) if expected is None else expected
    assert norms.spectral(matrix.astype(np.float32)) == pytest.approx(exact, rel=2e-5)


def attention(rng: np.random.Generator, **changes: Any) -> Attention:
    n_head, n_head_kv, d, n_embd = 6, 2, 16, 48

    def matrix(n_out: int, n_in: int) -> np.ndarray:
        return (rng.normal(size=(n_out, n_in)) * np.exp(0.7 * rng.normal(size=(n_out, 1)))).astype(np.float32)

    fields: dict[str, Any] = {
        "n_head": n_head, "n_head_kv": n_head_kv, "d_k": d, "d_v": d,
        "attn_norm": np.exp(rng.normal(size=n_embd)).astype(np.float32),
        "q": matrix(n_head * d, n_embd), "k": matrix(n_head_kv * d, n_embd), "v": matrix(n_head_kv * d, n_embd),
        "o": matrix(n_embd, n_head * d), "q_bias": None, "k_bias": None, "v_bias": None, "q_norm": None, "k_norm": None,
    }  # fmt: skip
    return Attention(**(fields | changes))


@pytest.mark.parametrize("case", ["plain", "biases", "QK-norm"])
def test_the_effective_score_is_the_size_of_what_a_codecs_error_does(case: str) -> None:
    """Against a simulation: a relative error of 1% in balanced, rotated keys and in values, through the weights."""
    rng = np.random.default_rng(1)
    vectors: dict[str, dict[str, Any]] = {
        "plain": {},
        "biases": {
            f"{side}_bias": rng.normal(size=n).astype(np.float32) * 40 for side, n in (("q", 96), ("k", 32), ("v", 32))
        },
        "QK-norm": {f"{side}_norm": np.exp(rng.normal(size=16)).astype(np.float32) for side in "qk"},
    }
    a = attention(rng, **vectors[case])
    k_effective, v_effective = norms.effective(a)

    n, e, d = 20_000, 0.01, a.d_k
    x = rng.normal(size=(n, len(a.attn_norm))) * a.attn_norm

    def heads(w: np.ndarray, bias: np.ndarray | None, gains: np.ndarray | None) -> np.ndarray:
        y = (x @ w.T + (0 if bias is None else bias)).reshape(n, -1, d)
        if gains is None:
            return y
        rms = np.sqrt(
            np.square(y).mean(axis=(0, 2), keepdims=True)
        )  # on average: a token's own norm is not in the formula
        return y / rms * gains

    q, k, v = heads(a.q, a.q_bias, a.q_norm), heads(a.k, a.k_bias, a.k_norm), heads(a.v, a.v_bias, None)
    k_total = v_total = 0.0
    for h in range(a.n_head_kv):
        group = q.reshape(n, a.n_head_kv, -1, d)[:, h]  # [n, heads of the group, d]
        sq, sk = np.sqrt(np.square(group).mean(axis=(0, 1))), np.sqrt(np.square(k[:, h]).mean(axis=0))
        balance = np.sqrt(sk / sq)
        error = rng.normal(size=(n, d)) * np.sqrt(e * np.square(k[:, h] / balance).mean()) * balance
        logit_error = np.square(np.einsum("ngd,nd->ng", group, error) / np.sqrt(d)).mean()
        o = a.o.reshape(len(a.o), a.n_head_kv, -1, d)[:, h]  # [n_embd, heads of the group, d]
        noise = rng.normal(size=(n, d)) * np.sqrt(e * np.square(v[:, h]).mean())
        added = sum(np.square(noise @ o[:, g].T).mean() for g in range(o.shape[1]))
        v_total += added
        k_total += logit_error * added / e
    assert v_effective == pytest.approx(np.sqrt(v_total / e), rel=0.03)
    assert k_effective == pytest.approx(np.sqrt(k_total / e), rel=0.03)


def test_behind_a_head_norm_the_size_of_w_k_does_not_count() -> None:
    gains = np.exp(RNG.normal(size=16)).astype(np.float32)
    a = attention(RNG, q_norm=gains, k_norm=gains)
    larger = Attention(**{**vars(a), "k": 8 * a.k})
    assert norms.effective(larger) == pytest.approx(norms.effective(a))
    assert norms.layer_norms(larger).k.frobenius == pytest.approx(8 * norms.layer_norms(a).k.frobenius)
    assert norms.layer_norms(a).k.gain == pytest.approx(np.sqrt(np.mean(gains**2)))


# ---- where the weights come from ------------------------------------------------------------------------------------

ROLES = {
    "attn_norm.weight": "input_layernorm.weight", "attn_output.weight": "self_attn.o_proj.weight",
    **{f"attn_{x}.{kind}": f"self_attn.{x}_proj.{kind}" for x in "qkv" for kind in ("weight", "bias")},
    **{f"attn_{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"},
}  # fmt: skip
STORED = {
    "F32": lambda x: x.astype("<f4"),
    "F16": lambda x: x.astype("<f2"),
    "BF16": lambda x: (x.view("<u4") >> 16).astype("<u2"),
}


def safetensors(tensors: dict[str, np.ndarray], dtype: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        piece = STORED[dtype](np.ascontiguousarray(values)).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(piece)],
        }
        data += piece
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def hf_folder(folder: Path, model: tiny.Tiny, family: str, dtype: str = "F32", shards: int = 1) -> Path:
    """The model's attention weights as a Hugging Face folder of the family."""
    tensors: dict[str, np.ndarray] = {}
    for i in range(model.n_layer):
        for role, name in ROLES.items():
            values = model.tensors.get(f"blk.{i}.{role}")
            if values is not None:
                stored = values - 1 if family.startswith("gemma") and values.ndim == 1 else values
                tensors[f"model.layers.{i}.{name}"] = stored
        if family == "phi3":
            parts = [tensors.pop(f"model.layers.{i}.self_attn.{x}_proj.weight") for x in "qkv"]
            tensors[f"model.layers.{i}.self_attn.qkv_proj.weight"] = np.concatenate(parts)
    config = {
        "model_type": family, "num_hidden_layers": model.n_layer, "num_attention_heads": model.n_head,
        "num_key_value_heads": model.n_head_kv,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    files = (
        {f"model-{i + 1}.safetensors": names[i::shards] for i in range(shards)}
        if shards > 1
        else {"model.safetensors": names}
    )
    for file, some in files.items():
        (folder / file).write_bytes(safetensors({name: tensors[name] for name in some}, dtype))
    if shards > 1:
        weight_map = {name: file for file, some in files.items() for name in some}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def assert_same(found: ModelNorms, expected: ModelNorms, rel: float) -> None:
    assert (found.n_head_kv, found.d_k, found.d_v) == (expected.n_head_kv, expected.d_k, expected.d_v)
    for a, b in zip(found.layers, expected.layers, strict=True):
        for x, y in ((a.k, b.k), (a.v, b.v)):
            there = {name: value for name, value in vars(y).items() if value is not None}
            assert {name: value for name, value in vars(x).items() if value is not None} == pytest.approx(
                there, rel=rel
            )


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("weight_type", ["F32", "Q4_K"])
def test_a_gguf_is_read_as_it_is_decoded(tmp_path: Path, arch: str, weight_type: str) -> None:
    model = tiny.write_model(tmp_path / "m.gguf", arch=arch, weight_type=weight_type, k_bias=20)
    source = open_source(model.path)
    assert (source.family, source.n_layer, source.name) == (arch, 2, "tiny")
    for i in range(2):
        layer = source.layer(i)
        for field, name in (("attn_norm", "attn_norm"), ("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"),
                            ("o", "attn_output"), ("q_norm", "attn_q_norm"), ("k_norm", "attn_k_norm")):  # fmt: skip
            np.testing.assert_array_equal(getattr(layer, field), model.tensors.get(f"blk.{i}.{name}.weight"))
        for side in "qkv":
            np.testing.assert_array_equal(
                getattr(layer, f"{side}_bias"), model.tensors.get(f"blk.{i}.attn_{side}.bias")
            )
    first = norms.model_norms(model.path).layers[0]
    assert first.k.frobenius == pytest.approx(np.linalg.norm(model.tensors["blk.0.attn_k.weight"]), rel=1e-6)
    assert (first.k.bias is not None, first.k.gain is not None) == (arch == "qwen2", arch in tiny.HEAD_NORMS)


@pytest.mark.parametrize(
    ("arch", "family"),
    [
        ("llama", "llama"),
        ("llama", "mistral"),
        ("llama", "phi3"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("gemma3", "gemma3_text"),
    ],
)
@pytest.mark.parametrize(("dtype", "rel", "shards"), [("F32", 2e-5, 1), ("F16", 1e-3, 3), ("BF16", 1e-2, 2)])
def test_a_hugging_face_folder_has_the_norms_of_its_gguf(
    tmp_path: Path, arch: str, family: str, dtype: str, rel: float, shards: int
) -> None:
    model = tiny.write_model(tmp_path / "m.gguf", arch=arch, n_layer=3, k_bias=20, weight_type=dtype)
    folder = hf_folder(tmp_path / "hf", model, family, dtype, shards)
    assert_same(norms.model_norms(folder), norms.model_norms(model.path), rel)


def test_a_model_that_also_sees_keeps_its_text_part_apart(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "m.gguf", arch="gemma3")
    folder = hf_folder(tmp_path / "hf", model, "gemma3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    assert_same(norms.model_norms(folder), norms.model_norms(model.path), 2e-5)


def break_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def break_weights(folder: Path, edit: Any) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(edit(path.read_bytes()))


DAMAGE: list[tuple[str, Any, type[Exception], str]] = [
    ("family", lambda f: break_config(f, model_type="mamba"), Unsupported, "the family 'mamba' is not among those"),
    ("layers", lambda f: break_config(f, num_hidden_layers=0), FormatError, "num_hidden_layers is 0; it must be 1"),
    ("more layers", lambda f: break_config(f, num_hidden_layers=3), FormatError, "layer 2: the attention weights q, k"),
    ("heads", lambda f: break_config(f, num_attention_heads=8), FormatError, r"q is \[256, 256\]; the head counts"),
    ("json", lambda f: (f / "config.json").write_text("{"), FormatError, "no valid JSON"),
    ("list", lambda f: (f / "config.json").write_text("[]"), FormatError, "JSON that is no object"),
    ("no config", lambda f: (f / "config.json").unlink(), ModelIOError, "cannot be read"),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), ModelIOError, "neither model.safetensors nor"),
    ("cut off", lambda f: break_weights(f, lambda b: b[:-4]), FormatError, "does not fit its bytes"),
    ("short", lambda f: break_weights(f, lambda b: b[:5]), FormatError, "no complete safetensors file"),
    ("empty", lambda f: break_weights(f, lambda b: b""), ModelIOError, "cannot be read"),
    ("length", lambda f: break_weights(f, lambda b: b"\xff" * 8 + b[8:]), FormatError, "no complete safetensors file"),
    ("dtype", lambda f: break_weights(f, lambda b: b.replace(b'"F32"', b'"I32"')), Unsupported, "stored as I32; F32"),
    ("shape", lambda f: break_weights(f, lambda b: b.replace(b'[256, 256]', b'[256, 255]')), FormatError, "not fit"),
    ("negative", lambda f: break_weights(f, lambda b: b.replace(b'[256, 256]', b'[-25, -25]')), FormatError, "not fit"),
    ("names", lambda f: break_weights(f, lambda b: b.replace(b"o_proj", b"x_proj")), FormatError, "no tensor is named"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "damage", "error", "sentence"), DAMAGE, ids=[row[0] for row in DAMAGE])
def test_a_damaged_folder_is_refused_in_one_sentence(
    tmp_path: Path, what: str, damage: Any, error: type[Exception], sentence: str
) -> None:
    folder = hf_folder(tmp_path / "hf", tiny.write_model(tmp_path / "m.gguf"), "llama")
    damage(folder)
    with pytest.raises(error, match=sentence):
        norms.model_norms(folder)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelIOError, match="cannot be opened"):
        norms.model_norms(tmp_path / "absent.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises((FormatError, Unsupported), match=r"x\.gguf"):
        norms.model_norms(tmp_path / "x.gguf")


# ---- what is printed ------------------------------------------------------------------------------------------------


def test_the_table_and_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.write_model(tmp_path / "m.gguf", arch="qwen2", k_bias=20)
    assert main(["norms", str(model.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = norms.model_norms(model.path)
    for score in norms.SCORES:
        assert (found[score]["w_k"], found[score]["w_v"]) == expected.scores(score)
        assert found["gap"][score] == expected.gap(score)
    assert found["bias"]["w_k"] == [layer.k.bias for layer in expected.layers]
    assert found["k_norm_gain"] == [None, None]

    assert main(["norms", str(model.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny: qwen2, 2 layers, 2 KV heads of 64"
    assert len({line.rindex("|") for line in lines[1:4]}) == 1, "columns stand under each other"
    assert "keys 1.8" in lines[4] and "above them in 2 of 2 layers" in lines[4]


def test_layers_whose_keys_are_not_larger_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.write_model(tmp_path / "m.gguf", arch="qwen3")
    for i, factor in enumerate((0.1, 1.0)):
        model.tensors[f"blk.{i}.attn_k.weight"][:] *= factor
    folder = hf_folder(tmp_path / "hf", model, "qwen3")
    assert main(["norms", str(folder)]) == 0
    out = capsys.readouterr().out
    first, second = out.splitlines()[2:4]
    assert first.endswith("K <= V: F S") and "K <= V" not in second
    assert "QK-norm: the gains set the size of the keys" in out


def test_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.write_model(tmp_path / "m.gguf")
    pytest.importorskip("matplotlib")
    assert main(["norms", str(model.path), "--plot", str(tmp_path / "n.png")]) == 0
    assert (tmp_path / "n.png").read_bytes().startswith(b"\x89PNG")


# ---- what a cache holds ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, list[Any], tuple[cache_norms.CacheLayer, ...]]:
    """A model, the pages of a run of it, and what cache_norms says of the same run."""
    model = Model(tiny.write_model(tmp_path_factory.mktemp("cache") / "m.gguf", n_ctx=512).path)
    text = b"the world is and you are the one in it. " * 30
    layers = cache_norms.cache_norms(model, text, 256)
    pages: list[Any] = []

    def keep(page: Any) -> None:
        pages.append((page.layer, page.head, page.k.copy(), page.v.copy(), page.q_rms.copy()))

    whole = {"kv": "f16", "window": 0, "sink": 0, "strict": True, "n_batch": 128}
    with model.session(256, n_seq_max=1, page_hook=keep, **whole) as session:
        session.sync(model.tokenize(text)[:256])
    return model, pages, layers


def test_the_cache_norms_are_those_of_its_pages(cached: tuple[Model, list[Any], Any]) -> None:
    _, pages, layers = cached
    assert len(pages) == 2 * 2 * 2, "layers, heads, pages"
    for i, layer in enumerate(layers):
        for h in range(2):
            k = np.concatenate([p[2] for p in pages if p[:2] == (i, h)], axis=1)
            v = np.concatenate([p[3] for p in pages if p[:2] == (i, h)]).T
            for side, x in ((layer.k[h], k), (layer.v[h], v)):
                singular = np.linalg.svd(x.astype(np.float64), compute_uv=False)
                np.testing.assert_allclose(side.spectrum, singular, rtol=1e-5, atol=1e-6 * singular[0])
                assert side.frobenius == pytest.approx(np.linalg.norm(x), rel=1e-6)
    k_scores, v_scores = cache_norms.scores(layers)
    assert k_scores[0] == pytest.approx(
        np.sqrt(sum(np.square(p[2], dtype=np.float64).sum() for p in pages if p[0] == 0))
    )
    assert len(v_scores) == 2


def test_its_errors_are_those_of_the_codecs(cached: tuple[Model, list[Any], Any]) -> None:
    _, pages, layers = cached
    for i, h in ((0, 0), (1, 1)):
        mine = [p for p in pages if p[:2] == (i, h)]
        for name in ("q2", "q4", "q8"):
            kvtype = KVTYPES[name]
            k = v = 0.0
            for _, _, page_k, page_v, q_rms in mine:
                decoded = codec.encode_side(kvtype, Side.K, page_k, 0, 128, q_rms.astype(np.float16)).raw()
                k += np.square(decoded - page_k).sum() / (2 * page_k.size)
                v += np.square(codec.encode_side(kvtype, Side.V, page_v.T, 0, 128).raw() - page_v.T).sum() / (
                    2 * page_v.size
                )
            assert layers[i].k[h].mse_ours[kvtype.bits] == pytest.approx(k, rel=1e-4)
            assert layers[i].v[h].mse_ours[kvtype.bits] == pytest.approx(v, rel=1e-4)
        for bits, error in layers[i].k[h].mse_min_max.items():
            steps = [np.ptp(p[2], axis=0) / (2**bits - 1) for p in mine]  # uniform levels: an error of step^2 / 12
            assert error == pytest.approx(np.mean([np.square(step).mean() / 12 for step in steps]), rel=0.1)


@pytest.mark.parametrize(
    ("shape", "where", "names", "sentence"),
    [
        ((64, 64), (0, 128), ("q9", "q4"), "'q9' is no KV type"),
        ((64, 64), (0, 128), ("q4", ""), "'' is no KV type"),
        ((12, 64), (0, 128), ("q4", "q4"), "a page of 12 channels; multiples of 8 up to 256"),
        ((64, 264), (0, 128), ("q4", "q4"), "a page of 264 channels"),
        ((64, 64), (-1, 128), ("q4", "q4"), "positions -1 to 128 are not in a page of 128"),
        ((64, 64), (0, 129), ("q4", "q4"), "positions 0 to 129"),
        ((64, 64), (5, 5), ("q4", "q4"), "positions 5 to 5"),
    ],
)
def test_a_page_that_is_none_is_refused(
    shape: tuple[int, int], where: tuple[int, int], names: tuple[str, str], sentence: str
) -> None:
    d_k, d_v = shape
    k, v = np.ones((d_k, 128), np.float32), np.ones((128, d_v), np.float32)
    with pytest.raises(ValueError, match=sentence):
        Page(0, 0, 0, *where, k, v, k).roundtrip(*names)


@pytest.mark.parametrize("d", [8, 80, 96, 128, 256])
def test_a_page_behind_a_type(d: int) -> None:
    """Head sizes that the models above do not have; positions outside are 0, a side of type f16 stays."""
    k, v, q = (RNG.normal(size=shape).astype(np.float32) for shape in ((d, 128), (128, d), (d, 128)))
    q = np.abs(q).astype(np.float16).astype(np.float32)
    page = Page(0, 0, 0, 16, 100, k, v, q).roundtrip("q3", "q4")
    expected_k = codec.encode_side(KVTYPES["q3"], Side.K, k, 16, 100, q.astype(np.float16)).raw()
    expected_v = codec.encode_side(KVTYPES["q4"], Side.V, v.T, 16, 100).raw()
    np.testing.assert_allclose(page.k[:, 16:100], expected_k[:, 16:100], atol=1e-5)
    np.testing.assert_allclose(page.v[16:100], expected_v.T[16:100], atol=1e-5)
    assert not page.k[:, :16].any() and not page.k[:, 100:].any() and not page.v[:16].any() and not page.v[100:].any()
    np.testing.assert_array_equal(Page(0, 0, 0, 16, 100, k, v, q).roundtrip("f16", "q4").k, k)


def test_min_max_keeps_the_ends_and_misses_by_half_a_step() -> None:
    x = RNG.normal(size=(128, 50)).astype(np.float32)
    y = cache_norms.min_max(x, 3, 64)
    for part in (slice(64), slice(64, 128)):
        step = np.ptp(x[part], axis=0) / 7
        assert np.all(np.abs(x[part] - y[part]) <= 0.5001 * step)
        np.testing.assert_allclose(y[part].min(axis=0), x[part].min(axis=0), rtol=1e-5)
        np.testing.assert_allclose(y[part].max(axis=0), x[part].max(axis=0), rtol=1e-5)
    assert len(np.unique(y[:64, 0])) <= 8
    np.testing.assert_array_equal(cache_norms.min_max(np.ones((64, 3), np.float32), 2, 64), np.ones((64, 3)))


def test_the_cache_of_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.write_model(tmp_path / "m.gguf", n_ctx=512)
    text = tmp_path / "t.txt"
    text.write_text("the world is in you " * 60)
    assert main(["norms", str(model.path), "--cache", str(text), "--tokens", "128", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["cache"]
    assert [len(layer["k"]) for layer in layers] == [2, 2]
    assert set(layers[0]["k"][0]["mse_ours"]) == {"2", "3", "4", "5", "6", "8"}
    assert main(["norms", str(model.path), "--cache", str(text), "--tokens", "128"]) == 0
    assert "cache: keys" in capsys.readouterr().out
    text.write_text("short")
    with pytest.raises(ValueError, match="the text is shorter than a page"):
        main(["norms", str(model.path), "--cache", str(text)])
