"""A model split into files is opened by the name of the first, and is the same model; wrong parts are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

import kvmix
import tiny

SHAPE = {"n_layer": 1, "n_embd": 64, "n_ff": 128, "head_dim": 32, "n_head": 2, "n_head_kv": 1}
N_TENSORS = 12


@pytest.fixture
def split(tmp_path: Path) -> Callable[..., list[Path]]:
    """Writes a model in files of five tensors; -> their paths, in order."""

    def write(name: str = "m", **arguments: int) -> list[Path]:
        tiny.write_model(tmp_path / f"{name}.gguf", **SHAPE | {"tensors_per_file": 5} | arguments)
        return sorted(tmp_path.glob(f"{name}-*.gguf"))

    return write


def logits(path: Path) -> np.ndarray:
    with kvmix.Model(path).session(n_ctx=64, n_threads=1) as session:
        session.decode([kvmix.Row(token, want_logits=token == 9) for token in range(10)])
        return session.logits_view(0).copy()


def part_of(tensors: list[str], **split_keys: int) -> Callable[[Path], None]:
    """Writes a file of small tensors that says this of itself."""

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in split_keys.items():
            writer.add_uint16(f"split.{key}", value)
        for name in tensors:
            writer.add_tensor(name, np.zeros(8, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write


def test_the_parts_are_the_model(split: Callable[..., list[Path]], tmp_path: Path) -> None:
    parts = split()
    assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    whole = tiny.write_model(tmp_path / "whole.gguf", **SHAPE)
    model = kvmix.Model(parts[0])
    assert len(whole.tensors) == N_TENSORS
    for name, values in whole.tensors.items():
        np.testing.assert_array_equal(model.tensor(name), values)
    assert model.info.n_params == kvmix.Model(whole.path).info.n_params
    assert model.info.file_bytes == sum(part.stat().st_size for part in parts)
    np.testing.assert_array_equal(logits(parts[0]), logits(whole.path))
    assert kvmix.Model(parts[0], mmap=False).tensor("output_norm.weight") is not None


def test_only_the_first_part_opens(split: Callable[..., list[Path]], tmp_path: Path) -> None:
    parts = split()
    want = r"00002-of-00003\.gguf: this is part 2 of a model in 3 files; open the first, whose name ends in -00001-of-"
    with pytest.raises(kvmix.FormatError, match=want):
        kvmix.Model(parts[1])
    renamed = shutil.copy(parts[0], tmp_path / "m.gguf")
    with pytest.raises(kvmix.FormatError, match="this is part 1 of a model in 3 files; open the first, whose name"):
        kvmix.Model(renamed)


def test_a_missing_part_is_named(split: Callable[..., list[Path]]) -> None:
    parts = split()
    parts[2].unlink()
    with pytest.raises(kvmix.ModelIOError, match=r"m-00003-of-00003\.gguf: cannot be opened: No such file"):
        kvmix.Model(parts[0])


@pytest.mark.parametrize(
    ("replace", "want"),
    [
        (part_of(["a"], no=1, count=3), "this is part 2 of 3, wanted is part 3 of 3"),
        (part_of(["a"], no=2, count=4), "this is part 3 of 4, wanted is part 3 of 3"),
        (part_of(["a"]), "this is part 1 of 1, wanted is part 3 of 3"),
        (part_of(["a"], no=2, count=3), f"the 3 parts have 11 tensors, the first one says {N_TENSORS}"),
        (part_of(["a", "b"], no=2, count=3), "is missing"),
        (part_of(["a", "token_embd.weight"], no=2, count=3), r"'token_embd\.weight' is in an earlier part"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), r"00003-of-00003\.gguf: .* damaged or cut off"),
        (lambda path: path.write_bytes(b""), r"00003-of-00003\.gguf: .* empty"),
    ],
)
def test_a_wrong_part_is_refused(split: Callable[..., list[Path]], replace: Callable[[Path], None], want: str) -> None:
    parts = split()
    replace(parts[2])
    with pytest.raises((kvmix.FormatError, kvmix.Unsupported), match=want):
        kvmix.Model(parts[0])
