"""The tokenizer against llama.cpp's vectors, against the tokenizers package, and every byte string against itself."""

import importlib.util
import mmap
import random
import struct
import subprocess
import time
import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
VECTORS = ["gpt-2", "llama-bpe", "qwen2", "llama-spm", "phi-3"]
PARSE_SPECIAL = 2

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The expressions that each name stands for, applied one after the other to what the one before left in pieces.
EXPRESSIONS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "llama-bpe": [CL100K.replace("DIGITS", "{1,3}")],
    "qwen2": [CL100K.replace("DIGITS", "")],
}


def vocabulary_path(shared: Path, name: str) -> Path:
    return shared / "vocab" / f"ggml-vocab-{name}.gguf"


def tokenize(tool: Path, model: Path, texts: list[bytes], flags: int = 0) -> list[tuple[list[int], bytes]]:
    """For each text its ids and the bytes that they stand for."""
    records = b"".join(struct.pack("<I", len(text)) + text for text in texts)
    result = subprocess.run([tool, model, str(flags)], input=records, capture_output=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr).decode(errors="replace")[-2000:]
    lines = [line.split("\t") for line in result.stdout.decode().splitlines()]
    assert len(lines) == len(texts)
    return [([int(token) for token in ids.split()], bytes.fromhex(raw)) for ids, raw in lines]


@pytest.fixture(scope="session")
def cli(c_build: Path) -> Path:
    return c_build / "tokenize_cli"


def test_unicode_table_is_what_the_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("make_unicode_tables", ROOT / "tests" / "make_unicode_tables.py")
    assert spec is not None and spec.loader is not None
    script: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    committed = (ROOT / "runtime" / "unicode_tables.c").read_text(encoding="ascii")
    if f"from Unicode {unicodedata.unidata_version};" not in committed:
        pytest.skip(f"this Python has Unicode {unicodedata.unidata_version}, the table another")
    assert script.render() == committed


@pytest.mark.parametrize("name", VECTORS)
def test_llamacpp_vectors(cli: Path, shared: Path, name: str) -> None:
    path = vocabulary_path(shared, name)
    *texts, after_last = Path(f"{path}.inp").read_bytes().split(b"\n__ggml_vocab_test__\n")
    assert after_last == b""
    want = [[int(token) for token in line.split()] for line in Path(f"{path}.out").read_text().splitlines()]
    assert len(texts) == len(want) > 40
    assert [ids for ids, _ in tokenize(cli, path, texts)] == want


# ---- the tokenizers package -----------------------------------------------------------------------------------------

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read_metadata(path: Path) -> dict[str, object]:
    """The keys of a GGUF file that is known to be good. (gguf-py takes seconds for a large vocabulary.)"""
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    at = 24

    def text() -> str:
        nonlocal at
        (size,) = struct.unpack_from("<Q", data, at)
        at += 8 + size
        return data[at - size : at].decode()

    def scalars(kind: int, count: int) -> tuple[object, ...]:
        nonlocal at
        layout = f"<{count}{SCALARS[kind]}"
        at += struct.calcsize(layout)
        return struct.unpack_from(layout, data, at - struct.calcsize(layout))

    def value(kind: int) -> object:
        if kind == 8:
            return text()
        if kind != 9:
            return scalars(kind, 1)[0]
        element, count = scalars(4, 1)[0], scalars(10, 1)[0]
        assert isinstance(element, int) and isinstance(count, int)
        return [text() for _ in range(count)] if element == 8 else scalars(element, count)

    (n_keys,) = struct.unpack_from("<Q", data, 16)
    found: dict[str, object] = {}
    for _ in range(n_keys):
        key = text()
        kind = scalars(4, 1)[0]
        assert isinstance(kind, int)
        found[key] = value(kind)
    return found


def with_pre(path: Path, name: str, target: Path) -> Path:
    """A copy of a file without tensors that names another pre-tokenizer."""
    key = b"tokenizer.ggml.pre" + struct.pack("<I", 8)
    data = path.read_bytes()
    at = data.index(key) + len(key)
    (size,) = struct.unpack_from("<Q", data, at)
    target.write_bytes(data[:at] + struct.pack("<Q", len(name)) + name.encode() + data[at + 8 + size :])
    return target


def oracle(path: Path, name: str):  # type: ignore[no-untyped-def]
    """A tokenizer of the tokenizers package with the file's vocabulary and merges and the expressions of `name`."""
    tokenizers = pytest.importorskip("tokenizers")
    metadata = read_metadata(path)
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    assert isinstance(tokens, list) and isinstance(merges, list)
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs, ignore_merges=name == "llama-bpe"))
    splits = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(e), "isolated") for e in EXPRESSIONS[name]]
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*splits, byte_level])
    return made


def random_texts(seed: int, count: int) -> Iterator[str]:
    """Texts of what the split rules tell apart; characters only from Unicode 3.2, which every table knows."""
    rng = random.Random(seed)
    old = unicodedata.ucd_3_2_0
    known = [chr(c) for c in range(0x20, 0x110000) if old.category(chr(c)) not in ("Cn", "Cs", "Co", "Cc")]
    by_kind = {kind: [c for c in known if unicodedata.category(c)[0] == kind] for kind in "LMNPSZ"}
    words = ["the", "of", "Hello", "WORLD", "don", "naïve", "straße", "данные", "数据", "ส", "αβγ", "I", "x"]
    contractions = [a + t for a in ("'", "\u2019") for t in ("s", "T", "re", "VE", "m", "Ll", "d", "\u017f", "r", "l")]
    spaces = [" ", "  ", "   ", "\n", "\r\n", "\t", "\n\n", " \n", "\u00a0", "\u3000", "\u2028", "\x0b", "\x85"]
    digits = ["0", "12", "345", "6789", "1234567", "\u0661", "\uff11", "\u00bd", "\u2167"]
    marks = ["...", "$", "<=>", "~|^", "!?", "`", "\u0301", "\u200d", "_", "-", "'", '"', "#", "\x7f"]
    pools = [words, contractions, spaces, spaces, digits, marks, [chr(c) for c in range(0x20, 0x7F)]]
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 24)):
            pool = rng.choice([*pools, by_kind[rng.choice("LMNPSZ")]])
            parts.append(rng.choice(pool))
        yield "".join(parts)


@pytest.mark.parametrize(
    ("vocabulary", "name"),
    [("gpt-2", "gpt-2"), ("gpt-2", "smollm"), ("gpt-2", "default"), ("llama-bpe", "llama-bpe"), ("qwen2", "qwen2")],
)
def test_same_as_tokenizers(cli: Path, shared: Path, tmp_path: Path, vocabulary: str, name: str) -> None:
    path = vocabulary_path(shared, vocabulary)
    reference = oracle(path, name)
    if name != vocabulary:
        path = with_pre(path, name, tmp_path / "vocabulary.gguf")
    assert_same(cli, path, reference, list(random_texts(1, 5000)))


def test_smollm_same_as_tokenizers(cli: Path, judges: Path) -> None:
    path = judges / "SmolLM2-135M-Instruct.Q4_1.gguf"
    reference = oracle(path, "smollm")
    assert_same(cli, path, reference, list(random_texts(2, 5000)))


def assert_same(cli: Path, path: Path, reference, texts: list[str]) -> None:  # type: ignore[no-untyped-def]
    got = tokenize(cli, path, [text.encode() for text in texts])
    for text, (ids, raw), want in zip(texts, got, reference.encode_batch(texts), strict=True):
        assert ids == want.ids, repr(text)
        assert raw == text.encode()


@pytest.mark.parametrize("name", ["llama-spm", "phi-3"])
def test_same_as_merging_by_hand(cli: Path, shared: Path, name: str) -> None:
    """SentencePiece's rule as it is told: merge the neighbours whose token scores best, the left ones of equals."""
    metadata = read_metadata(vocabulary_path(shared, name))
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    types = metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list) and isinstance(scores, tuple) and isinstance(types, tuple)
    ids = {token: index for index, token in enumerate(tokens)}
    plain = {token: scores[index] for token, index in ids.items() if types[index] in (1, 4, 5)}

    def merged(text: str) -> list[int]:
        symbols = list("\u2581" + text.replace(" ", "\u2581"))
        while True:
            pairs = [a + b for a, b in pairwise(symbols)]
            best = max((pair for pair in pairs if pair in plain), key=plain.__getitem__, default=None)
            if best is None:
                break
            at = min(i for i, pair in enumerate(pairs) if pair in plain and plain[pair] == plain[best])
            symbols[at : at + 2] = [pairs[at]]
        spelled = [[s] if s in plain else [f"<0x{byte:02X}>" for byte in s.encode()] for s in symbols]
        return [ids[token] for group in spelled for token in group]

    texts = list(random_texts(5, 400))
    results = tokenize(cli, vocabulary_path(shared, name), [text.encode() for text in texts])
    for text, (got, _) in zip(texts, results, strict=True):
        assert got == merged(text), repr(text)


# ---- any bytes, and time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2"])
def test_every_byte_string_comes_back(cli: Path, shared: Path, name: str) -> None:
    rng = random.Random(3)
    texts = [rng.randbytes(rng.randrange(40)) for _ in range(20000)]
    pieces = [b"\xe2\x82", b"\xac", b" ", b"a", b"\xff", b"\n", b"1", b"\xed\xa0\x80", b"\xc0\x80"]
    texts += [b"".join(rng.choices(pieces, k=12)) for _ in range(5000)]
    for flags in (0, PARSE_SPECIAL):
        for text, (_, raw) in zip(texts, tokenize(cli, vocabulary_path(shared, name), texts, flags), strict=True):
            assert raw == text


@pytest.mark.parametrize("name", ["llama-spm", "phi-3"])
def test_every_byte_string_comes_back_after_a_space(cli: Path, shared: Path, name: str) -> None:
    rng = random.Random(4)
    texts = [b"x" + rng.randbytes(rng.randrange(40)) for _ in range(20000)]
    for text, (_, raw) in zip(texts, tokenize(cli, vocabulary_path(shared, name), texts), strict=True):
        assert raw == b" " + text


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "llama-spm"])
@pytest.mark.parametrize("unit", ["a", " ", "\n", "ab", "<", "\u4e00"])
def test_a_mebibyte_is_quick(cli: Path, shared: Path, name: str, unit: str) -> None:
    """One run without a word's end in sight. Under the sanitizers it takes about a second; quadratic time, minutes."""
    text = unit.encode() * (2**20 // len(unit.encode()))
    start = time.perf_counter()
    [(_, raw)] = tokenize(cli, vocabulary_path(shared, name), [text])
    assert time.perf_counter() - start < 10
    assert raw == (b" " if name == "llama-spm" else b"") + text
