"""Perplexity and KL divergence: the statistics against plain formulas, the protocol against tests/ref and by hand."""

import hashlib
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import kvmix
import tiny
from kvmix import Row
from kvmix._score import Divergence, Perplexity, Prediction
from ref import perplexity as reference
from ref.cache import CacheOptions
from ref.model import load

WORDS = ["the", "hello", "world", "and", "is", "you", "thing", "an", "ill", "in", "other", "noon", "wander"]
KEYS = [
    *("model", "text_sha256", "n_ctx", "chunks", "skip_chunks", "cache", "recipe", "window", "sink", "strict", "act"),
    *("bits", "bits_32k", "kv_bytes_32k", "ppl", "ppl_se", "base", "ppl_base"),
    *("kld_mean", "kld_se", "kld_median", "kld_p99", "kld_p999", "same_top", "kld_chunks", "floor"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.gguf, spm.gguf (a file that asks for a BOS), text.txt, and binary.txt, which is no text."""
    folder = tmp_path_factory.mktemp("perplexity")
    tiny.write_model(folder / "model.gguf", n_ctx=2048)
    tiny.write_model(folder / "spm.gguf", n_ctx=2048, spm=True)
    rng = np.random.default_rng(5)
    (folder / "text.txt").write_text(" ".join(rng.choice(WORDS, 1500)))
    (folder / "binary.txt").write_bytes(b"the hello \xff" + 2000 * b"world ")
    return folder


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "kvmix.perplexity", *map(str, args)]


def run(*args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command(*args), capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stdout + result.stderr
    return result


def run_json(*args: object) -> dict[str, object]:
    return json.loads(run(*args, "--json").stdout)


# ---- the statistics -------------------------------------------------------------------------------------------------


def random_logits(rng: np.random.Generator, n: int, scale: float) -> np.ndarray:
    return rng.normal(0, scale, (n, 1000)).astype(np.float32)


@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
def test_perplexity_is_the_plain_formula(scale: float) -> None:
    rng = np.random.default_rng(1)
    logits, targets = random_logits(rng, 200, scale), rng.integers(0, 1000, 200).astype(np.int32)
    score = Perplexity()
    for row, target in zip(logits, targets, strict=True):
        score.add(Prediction.of_logits(row), int(target))
    nll = -reference.log_softmax(logits)[np.arange(200), targets]
    expected = reference.perplexity_of([nll])
    assert score.result() == pytest.approx((expected.ppl, expected.error), rel=1e-10)


@pytest.mark.parametrize("noise", [1e-3, 0.3, 5.0])
def test_divergence_is_the_plain_formula(noise: float) -> None:
    rng = np.random.default_rng(2)
    base = random_logits(rng, 200, 4.0)
    other = (base + rng.normal(0, noise, base.shape)).astype(np.float32)
    score = Divergence(per_chunk=50)
    for a, b in zip(base, other, strict=True):
        score.add(Prediction.of_logits(a), Prediction.of_logits(b))
    p, q = reference.log_softmax(base), reference.log_softmax(other)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    want = reference.divergence_of(kl, base.argmax(axis=1) == other.argmax(axis=1))
    got = score.result()
    assert got.mean == pytest.approx(want.mean, rel=1e-7)
    chunks = [kl[i : i + 50].mean() for i in (0, 50, 100, 150)]
    assert got.chunks == pytest.approx(chunks, rel=1e-7)
    assert got.se == pytest.approx(statistics.stdev(chunks) / 2, rel=1e-6)
    assert (got.median, got.p99, got.p999) == pytest.approx((want.median, want.p99, want.p999), rel=1e-6)
    assert got.same_top == want.same_top
    assert (noise < 1) or got.same_top < 0.9


def test_a_small_divergence_is_exact() -> None:
    """At 1e-8 the first terms of the series are the truth: half the variance of the difference of the logits."""
    rng = np.random.default_rng(4)
    base = random_logits(rng, 1, 4.0)[0]
    other = (base + rng.normal(0, 1e-4, 1000)).astype(np.float32)
    p = np.exp(base.astype(np.float64) - base.max())
    p /= p.sum()
    gap = other.astype(np.float64) - base
    gap -= p @ gap
    score = Divergence(per_chunk=1)
    score.add(Prediction.of_logits(base), Prediction.of_logits(other))
    got = score.result()
    assert got.mean == pytest.approx(p @ (gap**2 / 2 + gap**3 / 6), rel=1e-5)
    assert 1e-9 < got.mean < 1e-7 and got.se is None


def test_a_distribution_does_not_diverge_from_itself() -> None:
    score = Divergence(per_chunk=20)
    for logits in random_logits(np.random.default_rng(3), 20, 4.0):
        score.add(Prediction.of_logits(logits), Prediction.of_logits(logits))
    result = score.result()
    assert abs(result.mean) < 1e-14 and result.same_top == 1.0


# ---- the protocol ---------------------------------------------------------------------------------------------------


def by_hand(model: kvmix.Model, text: str, n_ctx: int, n_chunks: int) -> list[float]:
    """Running perplexities, a token at a time."""
    session = model.session(n_ctx=n_ctx, kv="f16", act="f32")
    ids = model.tokenize(text)
    nll, running = [], []
    for i in range(n_chunks):
        chunk = ids[i * n_ctx : (i + 1) * n_ctx]
        if model.info.add_bos:
            chunk[0] = model.info.bos
        session.rewind(0)
        for position, token in enumerate(chunk[:-1]):
            session.decode([Row(token, want_logits=True)])
            if position >= n_ctx // 2:
                nll.append(-reference.log_softmax(session.logits)[chunk[position + 1]])
        running.append(math.exp(np.mean(nll)))
    return running


@pytest.mark.parametrize("file", ["model.gguf", "spm.gguf"])
def test_it_is_llama_cpps_protocol(folder: Path, file: str) -> None:
    out = run(folder / file, folder / "text.txt", "-c", 200, "--chunks", 3, "--act", "f32", "--kv", "f16").stdout
    model = kvmix.Model(folder / file)
    assert model.info.add_bos == (file == "spm.gguf")
    expected = by_hand(model, (folder / "text.txt").read_text(), 200, 3)
    first, final, *_ = out.splitlines()
    values = [float(part.split("]")[1]) for part in first.rstrip(",").split(",")]
    assert values == pytest.approx(expected, rel=1e-4)
    assert [part.split("]")[0] for part in first.rstrip(",").split(",")] == ["[1", "[2", "[3"]
    assert final.startswith(f"Final estimate: PPL = {values[-1]:.4f} +/- ")


# 0.02% is float32 against float64. Through packed pages a rounding that differs may flip a code, which moves single
# predictions of these random models; the divergence, an average over all of them, is then the sharper measure.
@pytest.mark.parametrize(("kv", "types", "ppl_rel"), [("f16", ("f16", "f16"), 2e-4), ("k4v3", ("q4", "q3"), 5e-3)])
@pytest.mark.parametrize("file", ["model.gguf", "spm.gguf"])
def test_it_agrees_with_the_reference(folder: Path, file: str, kv: str, types: tuple[str, str], ppl_rel: float) -> None:
    got = run_json(folder / file, folder / "text.txt", "--chunks", 1, "--kv", kv, "--kld")
    model = kvmix.Model(folder / file)
    ids = model.tokenize((folder / "text.txt").read_text())[:512]
    setting = reference.Setting([types] * model.info.n_layer, CacheOptions(window=128, sink=16))
    oracle = load(folder / file)
    ppl = reference.perplexity(oracle, ids, 512, setting)
    kld = reference.divergence(oracle, ids, 512, setting)
    assert got["ppl"] == pytest.approx(ppl.ppl, rel=ppl_rel)
    assert got["kld_mean"] == pytest.approx(kld.mean, rel=0.01, abs=1e-9)
    assert got["same_top"] == pytest.approx(kld.same_top, abs=0.01)


def test_an_f16_cache_does_not_diverge_and_a_small_one_does(folder: Path) -> None:
    args = (folder / "model.gguf", folder / "text.txt", "--chunks", 1, "--kld")
    f16, k4v3, k2v2 = (run_json(*args, "--kv", kv) for kv in ("f16", "k4v3", "k2v2"))
    assert abs(f16["kld_mean"]) < 1e-12 and f16["same_top"] == 1.0
    assert f16["ppl"] == f16["ppl_base"]
    assert 1e-6 < k4v3["kld_mean"] < k2v2["kld_mean"]
    assert f16["bits"] == pytest.approx(16, abs=0.01) and k2v2["bits"] < k4v3["bits"] < 16


def test_strict_reads_packed_pages_only(folder: Path) -> None:
    args = (folder / "model.gguf", folder / "text.txt", "--chunks", 1, "--kld", "--kv", "k4v4")
    loose, strict = run_json(*args), run_json(*args, "--strict", "--window", 0)
    assert strict["strict"] and not loose["strict"]
    assert strict["kld_mean"] > loose["kld_mean"]
    # q4 at d 64: 4 bits and an f16 scale for 64 values; the keys also an f16 mean for 128
    assert strict["bits"] == pytest.approx(4 + 16 / 64 + 16 / 128 / 2)


def test_the_floor_is_the_rounding_of_activations(folder: Path) -> None:
    model = tiny.write_model(folder / "q8.gguf", weight_type="Q8_0", n_ctx=2048).path
    got = run_json(model, folder / "text.txt", "--chunks", 1, "--kv", "k8v8", "--kld", "--floor")
    assert got["act"] == "f32"
    assert 1e-7 < got["floor"]["kld_mean"] < 0.05


# ---- the command ----------------------------------------------------------------------------------------------------


def test_json_has_fixed_keys(folder: Path) -> None:
    text = folder / "text.txt"
    plain = run_json(folder / "model.gguf", text, "--chunks", 1)
    kld = run_json(folder / "model.gguf", text, "--chunks", 1, "--kld")
    assert list(plain) == list(kld) == KEYS
    assert plain["kld_mean"] is None and kld["kld_mean"] is not None
    assert plain["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert (plain["n_ctx"], plain["chunks"], plain["act"], kld["act"]) == (512, 1, "q8", "f32")
    assert (plain["recipe"], plain["window"], plain["sink"]) == ("k4v3", 128, 16)


def test_flags_equal_positionals(folder: Path) -> None:
    model, text, rest = folder / "model.gguf", folder / "text.txt", ("-c", 128, "--chunks", 1)
    outputs = [
        run(*args, *rest).stdout
        for args in ((model, text), ("-m", model, "-f", text), ("-m", model, text), (model, "-f", text))
    ]
    assert len(set(outputs)) == 1


def test_the_table_names_what_was_compared(folder: Path) -> None:
    out = run(folder / "model.gguf", folder / "text.txt", "--chunks", 1, "--kld", "--kv", "k4v3").stdout
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("f16 ", "k4v3 "))}
    assert rows["f16"][1:3] == ["16.00", "16.00"] and float(rows["k4v3"][2]) < 5
    assert "KLD against f16, act=f32" in out and "window 128, sink 16" in out


def test_bits_do_not_depend_on_the_batch(folder: Path) -> None:
    args = (folder / "model.gguf", folder / "text.txt", "--chunks", 1, "--kld", "--kv", "k4v3")
    a, b = (run_json(*args, "-ub", n) for n in (128, 512))
    assert a["bits"] == b["bits"] and a["kld_mean"] == b["kld_mean"]
    model = kvmix.Model(folder / "model.gguf")
    assert a["bits"] == pytest.approx(np.mean([model.plan(n_ctx=n, kv="k4v3").bits_full for n in range(256, 511)]))


def test_chunks_can_be_skipped(folder: Path) -> None:
    args = (folder / "model.gguf", folder / "text.txt", "-c", 128, "--kv", "k2v2", "--kld")
    whole = run_json(*args, "--chunks", 4)
    last = run_json(*args, "--chunks", 2, "--skip-chunks", 2)
    assert last["kld_chunks"] == whole["kld_chunks"][2:] and last["skip_chunks"] == 2


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        ((), 2, "text"),
        (("model.gguf",), 2, "text"),
        (("model.gguf", "text.txt", "--flor"), 2, "--floor"),
        (("model.gguf", "text.txt", "--floor"), 2, "--kld"),
        (("model.gguf", "text.txt", "--kld", "--floor", "--act", "q8"), 2, "--act q8"),
        (("model.gguf", "text.txt", "--skip-chunks", "100"), 1, "--skip-chunks 100"),
        (("model.gguf", "nothing.txt"), 1, "nothing.txt"),
        (("nothing.gguf", "text.txt"), 1, "nothing.gguf"),
        (("model.gguf", "."), 1, "cannot read the text"),
        (("model.gguf", "binary.txt"), 1, "binary.txt is not valid UTF-8 at its byte 10"),
        (("model.gguf", "text.txt", "-c", "100000"), 1, "one chunk has 100000"),
        (("model.gguf", "text.txt", "-c", "2"), 1, "-c 4"),
        (("model.gguf", "text.txt", "--kv", "k9v9"), 1, "9"),
        (("model.gguf", "text.txt", "--strict", "-ub", "100"), 1, "128"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], code: int, sentence: str
) -> None:
    monkeypatch.chdir(folder)
    result = run(*args, code=code)
    assert result.stdout == "" and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert sentence in last


def test_ctrl_c_ends_with_130(folder: Path) -> None:
    long = folder / "long.txt"
    long.write_text((folder / "text.txt").read_text() * 40)
    process = subprocess.Popen(
        command(folder / "model.gguf", long), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.read(3) == "[1]"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors


# ---- real models ----------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(
    ("file", "name"),
    [("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2"), ("Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf", "qwen-0.5b")],
)
def test_it_agrees_with_llama_cpp(judges: Path, shared: Path, file: str, name: str) -> None:
    if not (judges / file).is_file():
        pytest.skip(f"{file} is not in {judges}")
    expected = json.loads((shared / "models" / "llamacpp.json").read_text())["ppl"][name]["512x8"]
    got = run_json(judges / file, shared / "text" / "wiki.test.raw", "--chunks", 8, "--kv", "f16")
    # llama.cpp's own noise, from build to build and from batch to batch, is this large
    assert got["ppl"] == pytest.approx(expected, rel=7e-3)
