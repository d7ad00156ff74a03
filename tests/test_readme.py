"""What the README shows is run: its Python, against a tiny model under the README's file name."""

import re
from pathlib import Path

import pytest

import tiny

ROOT = Path(__file__).resolve().parent.parent


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    tiny.write_model(tmp_path / "m.gguf", arch="llama")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    session, fork = names["s"], names["f"]
    assert session.length == 20 < fork.length  # type: ignore[attr-defined]
    assert session.stats.recipe == "k4v3"  # type: ignore[attr-defined]


def test_files_that_the_readme_names_are_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:runtime|py|tests|models)/[\w/.]*)`", text):
        assert (ROOT / name).exists(), name
