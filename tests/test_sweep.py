"""python -m kvmix.perplexity --sweep, --plot and --kl-divergence-base: several caches beside one base."""

import sys
from pathlib import Path

import numpy as np
import pytest

import kvmix
import tiny
from kvmix import _plot
from kvmix._logits_file import LogitsWriter, n_scored, read_logits_file
from kvmix._score import Prediction, kl_divergence
from kvmix._sweep import choose_batch, parse_settings
from test_perplexity import KEYS, WORDS, run, run_json

SWEEP = "k8v8,k4v3;0-1:k8v4,k4v3@0/16,k2v2@256"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.gguf, spm.gguf (a file that asks for a BOS), other.gguf (another vocabulary) and text.txt."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny.write_model(folder / "model.gguf", n_ctx=2048)
    tiny.write_model(folder / "spm.gguf", n_ctx=2048, spm=True)
    (folder / "text.txt").write_text(" ".join(np.random.default_rng(5).choice(WORDS, 1500)))
    return folder


# ---- the list -------------------------------------------------------------------------------------------------------


def test_a_sweep_is_recipes_with_windows_and_sinks() -> None:
    settings = parse_settings("f16, k4v3,0-1:k8v4, 3:k8v8@0/16 ,norms:3.8@256,k4v3;2-3:k2v2")
    got = [(s.text, s.kv, s.window, s.sink) for s in settings]
    assert got == [
        ("f16", "f16", None, None),
        ("k4v3,0-1:k8v4, 3:k8v8@0/16", "k4v3,0-1:k8v4, 3:k8v8", 0, 16),
        ("norms:3.8@256", "norms:3.8", 256, None),
        ("k4v3;2-3:k2v2", "k4v3;2-3:k2v2", None, None),
    ]


@pytest.mark.parametrize("text", ["", "k4v3,", "k4v3@", "k4v3@x", "@0/16", "k4v3@0/16/3"])
def test_what_is_no_sweep_is_refused(text: str) -> None:
    with pytest.raises(kvmix.ArgumentError, match="RECIPE@WINDOW/SINK"):
        parse_settings(text)


def test_the_logits_of_a_batch_fit() -> None:
    small, large = 49152, 262144
    assert choose_batch(2, 512, small) == choose_batch(7, 2048, small) == choose_batch(2, 2048, large) == 512
    assert choose_batch(7, 2048, large) == choose_batch(50, 2048, large) == 128


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_sweep_is_its_recipes_one_by_one(folder: Path) -> None:
    args = (folder / "model.gguf", folder / "text.txt", "-c", 512, "--chunks", 2)
    rows = run_json(*args, "--sweep", SWEEP)
    assert [list(row) for row in rows] == [KEYS] * 4
    assert [row["bits"] for row in rows] == sorted(row["bits"] for row in rows)
    by_name = {row["cache"]: row for row in rows}
    assert list(by_name) != SWEEP.split(",") and set(by_name) == set(SWEEP.split(","))
    for name, options in [
        ("k8v8", ("--kv", "k8v8")),
        ("k4v3;0-1:k8v4", ("--kv", "k4v3,0-1:k8v4")),
        ("k4v3@0/16", ("--kv", "k4v3", "--window", 0, "--sink", 16)),
        ("k2v2@256", ("--kv", "k2v2", "--window", 256)),
    ]:
        alone = run_json(*args, *options, "--kld")
        assert by_name[name] | {"cache": alone["cache"]} == alone
        assert len(alone["kld_chunks"]) == 2 and alone["kld_mean"] == pytest.approx(np.mean(alone["kld_chunks"]))


def test_its_table_and_its_defaults(folder: Path) -> None:
    text = folder / "long.txt"
    text.write_text(" ".join(np.random.default_rng(6).choice(WORDS, 12_000)))
    result = run(folder / "model.gguf", text, "--sweep", "k4v3,k2v2", "--floor")
    assert "4 x 2048 tokens, act=f32" in result.stderr
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names[:5] == ["cache", "f16", "k2v2", "k4v3", "f16,"]


def test_a_sweep_can_be_strict_or_of_the_default_path(folder: Path) -> None:
    model = tiny.write_model(folder / "q8.gguf", weight_type="Q8_0", n_ctx=2048).path
    args = (model, folder / "text.txt", "-c", 512, "--chunks", 1, "--sweep", "k4v4@0/16")
    (strict,) = run_json(*args, "--strict")
    (rounded,) = run_json(*args, "--act", "q8")
    (plain,) = run_json(*args)
    assert strict["strict"] and strict["kld_mean"] > plain["kld_mean"] and strict["bits"] == strict["bits_32k"] < 5
    assert rounded["act"] == "q8" and rounded["ppl_base"] != plain["ppl_base"]


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (("--sweep", "k4v3", "--kv", "k4v3"), 2, "leave --kv"),
        (("--plot", "x.png"), 2, "--sweep"),
        (("--sweep", "k4v3@a"), 1, "'k4v3@a' is no RECIPE"),
        (("--sweep", "k9v3"), 1, "k9v3"),
        (("--sweep", ""), 1, "is no RECIPE"),
        (("--kl-divergence",), 2, "--kl-divergence-base FILE"),
        (("--kl-divergence", "--kl-divergence-base", "x", "--kld"), 2, "choose one"),
        (("--kl-divergence-base", "x", "--kld"), 2, "second run"),
        (("--kl-divergence-base", "nowhere/x"), 1, "cannot write nowhere/x"),
        (("--kl-divergence-base", "nothing", "--kl-divergence"), 1, "cannot read nothing"),
        (("--kl-divergence-base", "text.txt", "--kl-divergence"), 1, "does not begin with _logits_"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], code: int, sentence: str
) -> None:
    monkeypatch.chdir(folder)
    result = run("model.gguf", "text.txt", "-c", 128, "--chunks", 1, *args, code=code)
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert sentence in result.stderr.splitlines()[-1]
    assert not list(folder.glob("*.part"))


# ---- the picture ----------------------------------------------------------------------------------------------------


def test_the_hull_is_what_no_other_recipe_beats() -> None:
    points = [(4.0, 2.0), (3.0, 5.0), (3.5, 6.0), (5.0, 2.5), (6.0, 1.0), (4.0, 3.0)]
    hull = _plot.lower_hull([{"bits": bits, "kld_mean": kld} for bits, kld in points])
    assert [(row["bits"], row["kld_mean"]) for row in hull] == [(3.0, 5.0), (4.0, 2.0), (6.0, 1.0)]


def test_a_picture_is_drawn(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    args = (folder / "model.gguf", folder / "text.txt", "-c", 256, "--chunks", 2, "--sweep", "k4v3@0,k2v2@0")
    run(*args, "--plot", folder / "pareto.svg")
    picture = (folder / "pareto.svg").read_text()
    assert picture.startswith("<?xml") and "<!-- k2v2@0 -->" in picture
    assert "end it in .png" in run(*args, "--plot", folder / "pareto.doc", code=1).stderr
    assert "no folder" in run(*args, "--plot", folder / "nowhere" / "pareto.png", code=1).stderr


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(kvmix.Unsupported, match=r"pip install 'kvmix\[plot\]'"):
        _plot.check("x.png")


# ---- llama.cpp's file of predictions --------------------------------------------------------------------------------


def write_file(path: Path, chunks: np.ndarray, logits: np.ndarray) -> None:
    writer = LogitsWriter(str(path), chunks, logits.shape[1])
    for row in logits:
        writer.add(Prediction.of_logits(row))
    writer.close()
    assert path.stat().st_size == writer.n_bytes


@pytest.mark.parametrize("n_vocab", [1000, 1001])
def test_the_file_has_llama_cpps_bytes(tmp_path: Path, n_vocab: int) -> None:
    rng = np.random.default_rng(1)
    chunks = rng.integers(0, n_vocab, (2, 8)).astype(np.int32)
    logits = rng.normal(0, 6, (2 * n_scored(8), n_vocab)).astype(np.float32)
    write_file(tmp_path / "base", chunks, logits)
    data = (tmp_path / "base").read_bytes()
    assert data[:8] == b"_logits_" and np.frombuffer(data, "<i4", 3, 8).tolist() == [8, n_vocab, 2]
    assert np.array_equal(np.frombuffer(data, "<i4", 16, 20), chunks.ravel())
    n_codes = 2 * ((n_vocab + 1) // 2) + 4
    rows = np.frombuffer(data, "<u2", offset=20 + 64).reshape(6, n_codes)
    for row, x in zip(rows, logits.astype(np.float64), strict=True):
        scale, low = row[:4].view("<f4").astype(np.float64)
        exact = x - x.max() - np.log(np.exp(x - x.max()).sum())
        kept = x > x.max() - 16
        assert scale == pytest.approx(min(16, np.ptp(x)) / 65535, rel=1e-6)
        assert np.abs(low + scale * row[4 : 4 + n_vocab] - exact)[kept].max() < 0.51 * scale
        assert not row[4 : 4 + n_vocab][~kept].any()


def test_a_stored_prediction_diverges_as_the_logits_do(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(0, 3, (3, 5000)).astype(np.float32)
    base[2, 7] = 40  # the others are below the file's 16 nats
    other = (base + rng.normal(0, 0.1, base.shape)).astype(np.float32)
    write_file(tmp_path / "base", np.zeros((1, 8), np.int32), base)
    stored = read_logits_file(str(tmp_path / "base"), 5000)
    stored.start(0)
    stored.decode(np.zeros(8, np.int32), np.arange(8) >= 5)
    for i in range(3):
        exact = kl_divergence(Prediction.of_logits(base[i]), Prediction.of_logits(other[i]))
        got = kl_divergence(stored.prediction(i), Prediction.of_logits(other[i]))
        assert got == pytest.approx(exact, abs=3e-5)  # half a code is 1.2e-4
        assert abs(kl_divergence(stored.prediction(i), Prediction.of_logits(base[i]))) < 1e-5


def test_equal_logits_are_a_row_too(tmp_path: Path) -> None:
    write_file(tmp_path / "base", np.zeros((1, 4), np.int32), np.full((1, 10), 3, np.float32))
    stored = read_logits_file(str(tmp_path / "base"), 10)
    assert stored.prediction(0).logits == pytest.approx(-np.log(10))


@pytest.mark.parametrize("file", ["model.gguf", "spm.gguf"])
def test_a_file_takes_the_place_of_the_f16_run(folder: Path, file: str) -> None:
    base = folder / f"{file}.logits"
    args = (folder / file, folder / "text.txt", "-c", 256)
    written = run(*args, "--chunks", 3, "--kl-divergence-base", base)
    assert "writing the predictions of kf16vf16" in written.stderr
    direct = run_json(*args, "--chunks", 3, "--kv", "k2v2", "--window", 0, "--kld")
    again = (folder / file, "--kl-divergence-base", base, "--kl-divergence")
    got = run_json(*again, "--kv", "k2v2", "--window", 0)
    assert list(got) == KEYS and got["text_sha256"] is None and got["base"] == str(base)
    assert got["ppl"] == direct["ppl"]
    assert 0.9 < got["ppl_base"] / direct["ppl_base"] < 1.001  # what is below 16 nats is raised to them
    assert got["kld_chunks"] == pytest.approx(direct["kld_chunks"], rel=2e-3) and got["kld_mean"] > 1e-3
    assert abs(run_json(*again, "--kv", "f16")["kld_mean"]) < 1e-6
    (late,) = run_json(*again, "--sweep", "k2v2@0", "--skip-chunks", 1)
    assert late["kld_chunks"] == got["kld_chunks"][1:]
    assert "is not read" in run(*again, "-f", folder / "text.txt", "--kv", "f16").stderr
    assert "leave -c 64 out" in run(*again, "-c", 64, code=1).stderr


def test_a_damaged_file_is_refused(folder: Path) -> None:
    path = folder / "damaged"
    write_file(path, np.zeros((1, 8), np.int32), np.zeros((3, 100), np.float32))
    whole = path.read_bytes()
    for data, sentence in [
        (whole[:-1], "bytes"),
        (whole + b"0", "bytes"),
        (whole[:12], "does not begin"),
        (whole[:8] + np.array([2, 100, 1], "<i4").tobytes() + whole[20:], "claims 1 chunks of 2 tokens"),
        (whole[:12] + np.array([100, -1], "<i4").tobytes() + whole[20:], "claims -1 chunks"),
        (whole[:8] + np.array([2**31 - 1] * 3, "<i4").tobytes() + whole[20:], "of another model"),
        (whole[:8] + np.array([2**31 - 1, 100, 2**31 - 1], "<i4").tobytes() + whole[20:], "take"),
        (whole[:20] + np.array([100], "<i4").tobytes() + whole[24:], "token outside"),
    ]:
        path.write_bytes(data)
        with pytest.raises(kvmix.FormatError, match=sentence):
            read_logits_file(str(path), 100)
    path.write_bytes(whole)
    result = run(folder / "model.gguf", "--kl-divergence-base", path, "--kl-divergence", code=1)
    assert "is of another model" in result.stderr


def test_a_write_that_stops_leaves_nothing(folder: Path) -> None:
    args = (folder / "model.gguf", folder / "text.txt", "-c", 128, "--kl-divergence-base", folder / "kept")
    (folder / "kept").write_bytes(b"earlier")
    run(*args, "--kv", "k9v9", code=1)
    assert (folder / "kept").read_bytes() == b"earlier" and not list(folder.glob("*.part"))
