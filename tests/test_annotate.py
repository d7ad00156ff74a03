"""python -m kvmix.convert annotate: what it decides, and files that differ from their input in the recipe alone."""

import subprocess
import sys
import zlib
from pathlib import Path

import gguf
import numpy as np
import pytest

import kvmix
import tiny
from kvmix.convert import allocate, measured, rewrite
from kvmix.convert.__main__ import main
from kvmix.convert.decide import doubts
from kvmix.convert.norms import LayerNorms, ModelNorms, SideNorms
from kvmix.convert.recipe import Recipe
from kvmix.convert.rewrite import Kind, Value
from kvmix.errors import ArgumentError, FormatError, KvmixError, ModelIOError

N_LAYER = 4
WORDS = ["the", "hello", "world", "and", "is", "you", "thing", "an", "ill", "in", "other", "noon", "wander"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model.gguf"
    return tiny.write_model(path, n_layer=N_LAYER, n_embd=128, n_ff=128, n_ctx=4096).path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(np.random.default_rng(5).choice(WORDS, 3000)))
    return path


def annotate(*args: object) -> int:
    return main(["annotate", *map(str, args)])


def keys(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if name.startswith("kvmix.")}


# ---- files ----------------------------------------------------------------------------------------------------------


def raw(path: Path) -> tuple[dict[str, bytes], dict[str, bytes], int]:
    """Bytes of every key (its type too) and of every tensor, and the alignment, as gguf-py finds them."""
    reader = gguf.GGUFReader(path)
    fields = {
        name: b"".join(part.tobytes() for part in field.parts)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = {t.name: repr((t.tensor_type, t.shape.tolist())).encode() + t.data.tobytes() for t in reader.tensors}
    assert all(t.data_offset % reader.alignment == 0 for t in reader.tensors)
    return fields, tensors, reader.alignment


def write_any_file(path: Path, alignment: int) -> Path:
    """No model, but a key of every kind, an old recipe between them, and tensors that need padding."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "uint64", "int64", "float64"):
        getattr(writer, f"add_{name}")(f"any.{name}", 7)
    writer.add_string("kvmix.recipe", "k2v2")
    writer.add_array("kvmix.k_type", ["q2", "q2"])
    writer.add_bool("any.bool", True)
    writer.add_array("any.texts", ["", "grüße", "x" * 300])
    writer.add_array("any.numbers", [1, 2, 3])
    writer.add_array("any.bools", [True, False, True])
    writer.add_array("any.nested", [[1, 2], [3, 4]])
    rng = np.random.default_rng(0)
    writer.add_tensor("odd", rng.normal(size=(3, 7)).astype(np.float32))
    writer.add_tensor("half", rng.normal(size=(5,)).astype(np.float16))
    writer.add_tensor("packed", rng.integers(0, 255, (2, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


NEW_KEYS = {
    "kvmix.version": Value(Kind.UINT32, 1),
    "kvmix.recipe": Value(Kind.STRING, "k4v3"),
    "kvmix.k_type": Value(Kind.STRING, ("q4", "q3")),
    "kvmix.budget_bits": Value(Kind.FLOAT32, 3.5),
    "kvmix.k_score": Value(Kind.FLOAT32, (0.5, 2.0)),
}


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_all_else_is_copied_byte_by_byte(tmp_path: Path, alignment: int) -> None:
    source, out = write_any_file(tmp_path / "in.gguf", alignment), tmp_path / "out.gguf"
    steps = []
    rewrite.write_annotated(source, rewrite.read_header(source), out, NEW_KEYS, lambda *step: steps.append(step))
    (old, old_tensors, _), (new, new_tensors, new_alignment) = raw(source), raw(out)
    assert [name for name in new if not name.startswith("kvmix.")] == [n for n in old if not n.startswith("kvmix.")]
    assert all(new[name] == old[name] for name in old if not name.startswith("kvmix."))
    assert new_tensors == old_tensors
    assert new_alignment == alignment
    assert keys(out) == {name: list(v.data) if isinstance(v.data, tuple) else v.data for name, v in NEW_KEYS.items()}
    assert steps[-1][0] == steps[-1][1] > 0


def test_an_annotated_model_obeys(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    assert annotate(source, out, "--budget", 3.6, "--window", 256, "--sink", 4) == 0
    with kvmix.Model(out) as model, model.session(512) as session:
        stats, types = session.stats, [(layer.k_type, layer.v_type) for layer in session.layers]
    assert (stats.recipe_source, stats.window, stats.sink) == ("file", 256, 4)
    assert sorted(set(types)) == [("q3", "q3"), ("q4", "q3")]  # 3.31 and 3.81 bits
    written = keys(out)
    assert list(zip(written["kvmix.k_type"], written["kvmix.v_type"], strict=True)) == types
    assert written["kvmix.recipe"] == stats.recipe
    assert written["kvmix.method"] == "ladder by spectral"
    assert written["kvmix.budget_bits"] == pytest.approx(3.6)
    k, v = (np.array(written[f"kvmix.{side}_norm.spectral"]) for side in "kv")
    assert written["kvmix.k_score"] == k.tolist() and len(written["kvmix.v_norm.frobenius"]) == N_LAYER
    assert written["kvmix.gap.spectral"] == pytest.approx(np.mean(np.log2(k / v)), rel=1e-5)
    steps = k**2  # what a step from q3 to q4 saves: K's error alone
    assert set(np.argsort(-steps)[: types.count(("q4", "q3"))]) == {i for i, t in enumerate(types) if t[0] == "q4"}

    (old, old_tensors, _), (new, new_tensors, _) = raw(source), raw(out)
    assert {name: data for name, data in new.items() if not name.startswith("kvmix.")} == old
    assert new_tensors == old_tensors
    said = capsys.readouterr().out
    assert f"recipe {stats.recipe} (ladder by spectral)" in said
    assert "of 3.6" in said and "cache at 8192 tokens" in said


def test_annotating_again_replaces_the_recipe(source: Path, tmp_path: Path) -> None:
    first, second, direct = (tmp_path / f"{name}.gguf" for name in ("first", "second", "direct"))
    annotate(source, first, "--budget", 3)
    annotate(first, second, "--budget", 4.3)
    annotate(source, direct, "--budget", 4.3)
    assert second.read_bytes() == direct.read_bytes()
    refuse(ArgumentError, "carries a recipe itself, which goes before a sidecar's", first, "--sidecar")


def test_a_sidecar_is_picked_up(source: Path, tmp_path: Path) -> None:
    model_path = tmp_path / "big.model.gguf"
    model_path.write_bytes(source.read_bytes())
    annotate(model_path, "--sidecar", "--budget", 3.6)
    sidecar = tmp_path / "big.model.kvmix.gguf"
    assert sorted(path.name for path in tmp_path.iterdir()) == [model_path.name, sidecar.name]
    reader = gguf.GGUFReader(sidecar)
    assert reader.tensors == [] and reader.fields["general.architecture"].contents() == "llama"
    data, offset = source.read_bytes(), gguf.GGUFReader(source).data_offset
    assert keys(sidecar)["kvmix.sidecar.file_bytes"] == len(data)
    assert keys(sidecar)["kvmix.sidecar.header_crc32"] == zlib.crc32(data[:offset])
    with kvmix.Model(model_path) as model, model.session(256) as session:
        assert (session.stats.recipe, session.stats.recipe_source) == (keys(sidecar)["kvmix.recipe"], "sidecar")


def refuse(error: type[KvmixError], sentence: str, *args: object) -> None:
    with pytest.raises(error, match=sentence):
        annotate(*args)


def test_an_output_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    link = tmp_path / "link.gguf"
    link.symlink_to(source)
    there = tmp_path / "there.gguf"
    there.write_text("something else")
    for out in (source, link, source.parent / "." / source.name):
        refuse(ArgumentError, "is the input itself", source, out, "--force")
    refuse(ArgumentError, "there already: --force", source, there)
    assert there.read_text() == "something else" and source.read_bytes() == before
    annotate(source, there, "--force")
    assert keys(there)["kvmix.version"] == 1
    refuse(ModelIOError, "cannot write .*No such file", source, tmp_path / "nowhere" / "out.gguf")


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["ctrl-c", "no-space"]
)
def test_nothing_is_left_of_an_unfinished_output(source: Path, tmp_path: Path, error: BaseException) -> None:
    def progress(_done: int, _total: int) -> None:
        assert len(list(tmp_path.iterdir())) == 2
        raise error

    out = tmp_path / "out.gguf"
    out.write_text("old")
    with pytest.raises(ModelIOError if isinstance(error, OSError) else KeyboardInterrupt):
        rewrite.write_annotated(source, rewrite.read_header(source), out, NEW_KEYS, progress)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"] and out.read_text() == "old"


def test_a_damaged_input_is_refused_by_the_engine(source: Path, tmp_path: Path) -> None:
    damaged, out = tmp_path / "damaged.gguf", tmp_path / "out.gguf"
    damaged.write_bytes(source.read_bytes()[:-1000])
    refuse(FormatError, "damaged.gguf", damaged, out)
    refuse(ModelIOError, "nothing.gguf", tmp_path / "nothing.gguf", out)
    assert not out.exists()


# ---- what is decided ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", allocate.SOLVERS)
def test_a_memory_is_kept_and_used(source: Path, tmp_path: Path, solver: str) -> None:
    out = tmp_path / "out.gguf"
    with kvmix.Model(source) as model:
        sizes = {kv: model.plan(4096, kv, window=128, sink=16, n_seq_max=1).kv_bytes for kv in ("k3v2", "k4v4", "f16")}
        memory = (sizes["k3v2"] + sizes["k4v4"]) // 2
        annotate(source, out, "--memory", memory, "--ctx", 4096, "--solver", solver)
        taken = model.plan(4096, keys(out)["kvmix.recipe"], window=128, sink=16, n_seq_max=1).kv_bytes
    assert sizes["k3v2"] < taken <= memory
    assert memory - taken < (sizes["k4v4"] - sizes["k3v2"]) / N_LAYER  # another layer's step would not fit
    options = ["--ctx", 4096, "--force", "--solver", solver]
    refuse(
        ArgumentError,
        r"the smallest recipe, k\dv2, does not fit into 1000 bytes at 4096 tokens",
        source,
        out,
        "--memory",
        "1kB",
        *options,
    )
    annotate(source, out, "--memory", sizes["f16"], *options)
    assert keys(out)["kvmix.recipe"] == "k8v8"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "give OUT, or --sidecar"),
        (["out.gguf", "--sidecar"], "give OUT, or --sidecar"),
        (["out.gguf", "--memory", "1GiB"], "--memory and --ctx belong together"),
        (["out.gguf", "--ctx", 4096], "--memory and --ctx belong together"),
        (["out.gguf", "--score", "measured"], "--score measured runs the model on a text: give --text"),
        (["out.gguf", "--budget", 2], "a budget of 2 bits is too small"),
        (["out.gguf", "--types", "q2"], "the ladder has no pair of q2 alone"),
        (["out.gguf", "--check", "nothing.txt"], "cannot read the text nothing.txt"),
    ],
)
def test_a_command_that_cannot_be_is_refused(
    source: Path, args: list, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refuse(KvmixError, sentence, source, *args)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "the following arguments are required: command"),
        (["anotate"], "invalid choice: 'anotate'"),
        (["annotate", "in", "out", "--types", "q2,q7"], "'q7' is no KV type; there are q2 q3 q4 q5 q6 q8 f16"),
        (["annotate", "in", "out", "--memory", "2 GiX"], "'2 GiX' is no size; it looks like 2GiB"),
        (["annotate", "in", "out", "--bugdet", "3"], "unknown flag --bugdet; did you mean --budget?"),
    ],
)
def test_a_wrong_command_line(args: list[str], sentence: str) -> None:
    result = subprocess.run([sys.executable, "-m", "kvmix.convert", *args], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert sentence in result.stderr and result.stderr.count("\n") == 1


def side(norm: float, gain: float | None = None) -> SideNorms:
    return SideNorms(frobenius=norm, spectral=2 * norm, effective=norm, bias=None, gain=gain)


def test_a_score_that_would_starve_keys_is_named() -> None:
    def said(k: list[float], v: list[float], gain: float | None) -> list[str]:
        layers = tuple(LayerNorms(side(a, gain), side(b)) for a, b in zip(k, v, strict=True))
        norms = ModelNorms("m", "qwen3", (1,) * 3, (64,) * 3, (64,) * 3, layers)
        return doubts("frobenius", *norms.scores("frobenius"), norms)

    assert said([3, 4, 5], [2, 2, 2], None) == []
    assert said([3, 4, 5], [2, 2, 2], 1.0) == []
    (warning,) = said([3, 4, 5], [3.3, 4.4, 4], 1.0)
    assert (
        "the frobenius norm of W_K leads W_V's by 0.02 bits, in 2 of 3 layers not at all" in warning
        and "QK-norm" in warning
    )
    (warning,) = said([16, 16, 16.001], [16, 16, 16], None)  # as Gemma's are
    assert "keys get at least the values' bits" in warning and "QK-norm" not in warning


# ---- measured -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deaf(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layer 1 attends in vain: its output matrix is zero."""
    path = tmp_path_factory.mktemp("deaf") / "deaf.gguf"
    path.write_bytes(source.read_bytes())
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path, "r+").tensors}
    tensors["blk.1.attn_output.weight"].data[:] = 0
    return path


@pytest.fixture(scope="module")
def referee(deaf: Path, text: Path) -> measured.Referee:
    model = kvmix.Model(deaf)
    return measured.Referee(model, measured.cut_chunks(model, text.read_bytes(), 512), sink=4)


def test_sensitivities_are_of_one_side_of_one_layer(referee: measured.Referee) -> None:
    types = ("q2", "q3", "q8")
    found = measured.measure(referee, types)
    assert max(found.k[1], found.v[1]) < 1e-7  # what rounding does
    assert min(found.k[i] for i in (0, 2, 3)) > 1e-4 and min(found.v[i] for i in (0, 2, 3)) > 1e-4
    q3, f16 = ("q3",) * N_LAYER, ("f16",) * N_LAYER
    together = referee.divergences([Recipe(q3, f16), Recipe(f16, q3)], "test")
    for (k, law), kld in zip(((found.k, found.k_law), (found.v, found.v_law)), together, strict=True):
        assert sum(k) * law["q3"] == pytest.approx(kld)
        assert 0.3 < law["q3"] < 3  # they nearly add up
        assert law["q2"] > 1.5 * law["q3"] > 150 * law["q8"]
    alone = referee.divergences([Recipe(("f16", "f16", "q3", "f16"), f16)], "test")
    assert alone == [pytest.approx(found.k[2])]


def test_a_measured_recipe_spends_where_it_counts(deaf: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    annotate(deaf, out, "--score", "measured", "--text", text, "--tokens", 512, "--budget", 3.6)
    written = keys(out)
    assert (written["kvmix.k_type"][1], written["kvmix.v_type"][1]) == ("q2", "q2")
    assert written["kvmix.method"] == "exact by measured"
    assert 100 * written["kvmix.k_score"][1] < min(written["kvmix.k_score"][i] for i in (0, 2, 3))


def test_a_measured_recipe_is_no_worse_than_a_uniform_one(
    deaf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the measurement said: here it lies, and the solver spends all on the layer that does not matter."""
    lies = measured.Sensitivity((1, 1000, 1, 1), (1, 1000, 1, 1), *2 * [{"q2": 1, "q3": 0.9, "q4": 0.8, "q8": 0}])
    monkeypatch.setattr(measured, "measure", lambda referee, types: lies)
    out = tmp_path / "out.gguf"
    annotate(
        deaf, out, "--score", "measured", "--text", text, "--tokens", 512, "--budget", 3.6, "--types", "q2,q3,q4,q8"
    )
    said = capsys.readouterr().out
    assert "was judged worse than" in said and keys(out)["kvmix.method"] == "the best judged by measurement"
    with kvmix.Model(deaf) as model:
        judge = measured.Referee(model, measured.cut_texts(model, text.read_bytes(), 512).judge, sink=16)
        recipes = [Recipe(tuple(keys(out)["kvmix.k_type"]), tuple(keys(out)["kvmix.v_type"]))]
        recipes += [Recipe.uniform(pair, N_LAYER) for pair in (("q3", "q3"), ("q3", "q2"), ("q2", "q2"))]
        klds = judge.divergences(recipes, "test")
    assert klds[0] == min(klds)


def test_cache_scores_and_the_check(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    annotate(source, out, "--score", "cache", "--text", text, "--check", text, "--tokens", 512, "--budget", 3.7)
    assert keys(out)["kvmix.method"] == "ladder by cache"
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[lines.index(next(line for line in lines if "mean KLD" in line)) + 1 :]]
    klds = {recipe: float(kld) for kld, _bits, recipe in table}
    assert list(klds) == [keys(out)["kvmix.recipe"], "k4v3", "k3v3"]  # 3.69, 3.81 and 3.31 bits
    assert klds["k4v3"] < klds[keys(out)["kvmix.recipe"]] < klds["k3v3"]
