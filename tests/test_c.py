"""The C tests under ASan and UBSan, each executable a test, and the embedding program of the README."""

import re
import subprocess
from pathlib import Path

import pytest

import tiny

C_TESTS = sorted(path.stem for path in (Path(__file__).parent / "c").glob("test_*.c"))


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, encoding="latin-1", timeout=600, check=False)


@pytest.mark.parametrize("name", C_TESTS)
def test_c(c_build: Path, name: str) -> None:
    result = run(c_build / name)
    if result.returncode != 0:
        pytest.fail(f"{name} exits with {result.returncode}\n{result.stdout}{result.stderr}"[-20_000:], pytrace=False)


def test_embed(c_build: Path, tmp_path: Path) -> None:
    """Greedy, so a longer answer starts with the shorter one; the prompt is long enough to be read packed."""
    model = tiny.write_model(tmp_path / "m.gguf", n_ctx=2048)
    results = [run(c_build / "embed", model.path, "hello world, " * 200, str(n)) for n in (0, 4, 8)]
    assert [(result.returncode, result.stderr) for result in results] == [(0, "")] * 3
    none, short, long = (result.stdout.removesuffix("\n") for result in results)
    assert none == ""
    assert short and long.startswith(short) and len(long) > len(short)


def test_embed_says_what_is_wrong(c_build: Path, tmp_path: Path) -> None:
    result = run(c_build / "embed", tmp_path / "absent.gguf", "hello")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("IO: ") and "absent.gguf" in result.stderr


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_thousand_damaged_models(c_build: Path, tmp_path: Path, arch: str) -> None:
    """Each is refused with a sentence or runs; all ways of ending must occur, or the mutants test nothing."""
    model = tiny.write_model(tmp_path / "m.gguf", arch=arch, n_embd=64, n_head=2, n_head_kv=1, n_ff=64)
    result = run(c_build / "mutate_model", model.path, tmp_path / "mutant.gguf", "1000")
    assert (result.returncode, result.stderr) == (0, "")
    counts = [int(n) for n in re.findall(r"\d+", result.stdout)]
    assert sum(counts[:4]) == 1000 and min(counts[0], counts[3]) > 100
