"""The binding: cut from kvmix.h, one exception class for each status, dataclasses that mirror the C structures."""

import importlib.metadata
import re
import sys
from dataclasses import fields
from itertools import count
from pathlib import Path

import pytest

import kvmix
from kvmix import _native, errors

ROOT = Path(__file__).resolve().parent.parent
HEADER = (ROOT / "runtime" / "kvmix.h").read_text(encoding="utf-8")


def struct_fields(name: str) -> list[str]:
    """Field names of a structure, in order, as the header writes them."""
    body = re.search(rf"typedef struct \{{([^}}]*)\}} {name};", HEADER)
    assert body is not None, name
    code = re.sub(r"/\*.*?\*/", "", body[1], flags=re.DOTALL)
    return [re.search(r"(\w+)\s*$", part)[1] for line in code.split(";") if line.strip() for part in line.split(",")]


def test_every_status_has_a_class() -> None:
    names = []
    for status in count(-1, -1):
        name = _native.status_name(status)
        if name == "?":
            break
        names.append(name)
        with pytest.raises(errors.BY_STATUS[name]):
            _native.check(status)
    assert sorted(names) == sorted(errors.BY_STATUS)
    assert len(set(errors.BY_STATUS.values())) == len(names)


def test_ok_raises_nothing() -> None:
    assert _native.status_name(0) == "OK"
    _native.check(0)


def test_errors_are_the_builtins_that_callers_expect() -> None:
    builtin = {
        kvmix.ArgumentError: ValueError,
        kvmix.OutOfMemory: MemoryError,
        kvmix.ModelIOError: OSError,
        kvmix.FormatError: ValueError,
        kvmix.Unsupported: NotImplementedError,
        kvmix.DeviceError: RuntimeError,
        kvmix.StateError: RuntimeError,
    }
    for ours, theirs in builtin.items():
        assert issubclass(ours, theirs)
    assert all(issubclass(ours, kvmix.KvmixError) for ours in errors.BY_STATUS.values())


@pytest.mark.parametrize(
    ("struct", "mirror"),
    [
        ("kvmix_model_info", kvmix.ModelInfo),
        ("kvmix_memory", kvmix.Memory),
        ("kvmix_stats", kvmix.Stats),
        ("kvmix_layer_kv", kvmix.LayerKV),
    ],
)
def test_a_dataclass_mirrors_its_structure(struct: str, mirror: type) -> None:
    assert [f.name for f in fields(mirror)] == struct_fields(struct)


def test_sampling_has_the_fields_and_defaults_of_the_library() -> None:
    assert [f.name for f in fields(kvmix.Sampling)] == struct_fields("kvmix_sampling")[1:]
    assert {f.name: f.default for f in fields(kvmix.Sampling)} == pytest.approx(_native.sampling_defaults())


def test_session_options_have_the_fields_of_the_structure() -> None:
    assert sorted(kvmix.SessionOptions().native(_native.PageHook(None))) == sorted(
        set(struct_fields("kvmix_session_options")) - {"size", "page_hook_user"}
    )


def test_token_attr_has_the_bits_of_the_header() -> None:
    bits = dict(re.findall(r"KVMIX_TOKEN_(\w+) = (\d+)", HEADER))
    assert {attr.name: attr.value for attr in kvmix.TokenAttr} == {name: int(bit) for name, bit in bits.items()}


def test_the_package_has_the_version_of_its_library() -> None:
    assert importlib.metadata.version("kvmix") == _native.version()


def test_the_kernels_have_a_name() -> None:
    assert _native.cpu_kernels() in ("avx512", "avx2", "scalar")


def test_the_binding_is_cut_between_the_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "py"))
    sys.modules.pop("build_cdef", None)
    import build_cdef

    block = build_cdef.cut(HEADER)
    assert "KVMIX_API" not in block and "#" not in re.sub(r"/\*.*?\*/", "", block, flags=re.DOTALL)
    assert block.count("kvmix_decode(") == 1
    with pytest.raises(ValueError, match="exactly one"):
        build_cdef.cut(HEADER.replace("/* cdef end */", ""))
