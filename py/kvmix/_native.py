"""libkvmix as plain Python functions: the only file that touches ffi.

A function here is one call of kvmix.h under its name without the prefix. It takes and returns ints, bytes, str,
dicts and NumPy arrays; handles are opaque. A failed call raises the class of its status with the library's sentence.
Lifetimes are the callers' business (_model.py, _session.py): nothing here closes a handle by itself.
"""

import operator
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NewType, cast

import numpy as np
from numpy.typing import NDArray

import kvmix._cdef as _cdef

from .errors import BY_STATUS, ArgumentError, Cancelled, ContextFull

ModelHandle = NewType("ModelHandle", object)
SessionHandle = NewType("SessionHandle", object)
SamplerHandle = NewType("SamplerHandle", object)

ABI_VERSION = 1

# The binding and the library are made by the same build and installed side by side.
_LIBRARY = Path(_cdef.__file__).with_name("libkvmix.dylib" if sys.platform == "darwin" else "libkvmix.so")

_ffi = _cdef.ffi
_lib = _ffi.dlopen(str(_LIBRARY))
if _lib.kvmix_abi_version() != ABI_VERSION:
    raise ImportError(
        f"{_LIBRARY} has ABI {_lib.kvmix_abi_version()}, this package wants {ABI_VERSION}: reinstall kvmix"
    )


# ---- conversions ----------------------------------------------------------------------------------------------------


def status_name(status: int) -> str:
    return _text(_lib.kvmix_status_name(status))


def check(status: int) -> None:
    """Raises the class of a failed call's status, with the sentence that the library left for this thread."""
    if status != 0:
        raise BY_STATUS[status_name(status)](_text(_lib.kvmix_last_error()))


def _call(function: Callable[..., int], *args: Any) -> None:
    check(function(*args))


def _text(chars: Any) -> str:
    return cast(bytes, _ffi.string(chars)).decode("utf-8", "replace")


def text_bytes(name: str, value: str | bytes) -> bytes:
    """Text as UTF-8; bytes as they are."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ArgumentError(f"{name} must be str, not {value!r}")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"{name} has half a surrogate pair, which is not Unicode, at its character {error.start}: give bytes"
        ) from None


def _chars(name: str, value: str | bytes) -> bytes:
    data = text_bytes(name, value)
    if b"\0" in data:
        raise ArgumentError(f"{name} {value!r} has a NUL byte in it")
    return data


def _fields(struct: Any) -> dict[str, Any]:
    """A structure as a dict; strings are copied."""
    return {
        name: _text(getattr(struct, name)) if field.type.kind == "pointer" else getattr(struct, name)
        for name, field in _ffi.typeof(struct).fields
    }


def _assign(struct: Any, values: Mapping[str, Any]) -> list[Any]:
    """Sets fields by name; returns what must live as long as the structure points to it."""
    alive = []
    types = {name: field.type for name, field in _ffi.typeof(struct).item.fields}
    for name, value in values.items():
        if types[name].kind == "function" or isinstance(value, _ffi.CData):
            setattr(struct, name, _ffi.NULL if value is None else value)
            continue
        if types[name].kind == "pointer":
            chars = _ffi.NULL if value is None else _ffi.new("char[]", _chars(name, value))
            alive.append(chars)
            setattr(struct, name, chars)
            continue
        try:
            setattr(struct, name, value)
        except (TypeError, OverflowError):
            raise ArgumentError(f"{name} takes {_wanted(types[name])}, not {value!r}") from None
    return alive


def _wanted(ctype: Any) -> str:
    """What a numeric type takes, in words."""
    if ctype.cname in ("float", "double"):
        return "a number"
    return f"a whole number of {8 * _ffi.sizeof(ctype)} bits" + (", from 0 up" if ctype.cname.startswith("u") else "")


def int32(name: str, value: int) -> int:
    """An argument that a C parameter can hold."""
    try:
        return array("i", [operator.index(value)])[0]
    except (TypeError, OverflowError):
        raise ArgumentError(f"{name} takes {_wanted(_ffi.typeof('int32_t'))}, not {value!r}") from None


def int32s(values: Iterable[int]) -> "array[int]":
    """Token ids as the library takes them."""
    if isinstance(values, str | bytes):
        raise ArgumentError(f"tokens are ids, not text: tokenize {values!r} first")
    try:
        return array("i", values)
    except (TypeError, OverflowError) as error:
        raise ArgumentError(f"tokens are whole numbers, 0 .. n_vocab - 1: {error}") from error


def _filled(ctype: str, capacity: int, function: Callable[..., int], *args: Any) -> Any:
    """What function(*args, array, capacity, n_out) fills in; asked again with the size it names when that was short."""
    n = _ffi.new("int32_t *")
    while True:
        out = _ffi.new(ctype, capacity)
        try:
            _call(function, *args, out, capacity, n)
        except ContextFull:
            if n[0] <= capacity:
                raise
            capacity = n[0]
        else:
            return _ffi.unpack(out, n[0])


# ---- library and model ----------------------------------------------------------------------------------------------


def version() -> str:
    return _text(_lib.kvmix_version())


def cpu_kernels() -> str:
    return _text(_lib.kvmix_cpu_kernels())


def model_open(path: bytes, use_mmap: bool) -> ModelHandle:
    out = _ffi.new("kvmix_model **")
    _call(_lib.kvmix_model_open, out, _chars("path", path), use_mmap)
    return ModelHandle(out[0])


def model_close(model: ModelHandle) -> None:
    _lib.kvmix_model_close(model)


def model_get_info(model: ModelHandle) -> dict[str, Any]:
    out = _ffi.new("kvmix_model_info *")
    _call(_lib.kvmix_model_get_info, model, out)
    return _fields(out[0])


def model_get_string(model: ModelHandle, key: str) -> bytes | None:
    text, n_bytes = _ffi.new("const char **"), _ffi.new("size_t *")
    _call(_lib.kvmix_model_get_string, model, _chars("key", key), text, n_bytes)
    return None if text[0] == _ffi.NULL else bytes(_ffi.buffer(text[0], n_bytes[0]))


def model_get_floats(model: ModelHandle, key: str) -> NDArray[np.float32]:
    values = _filled("float[]", 256, _lib.kvmix_model_get_floats, model, _chars("key", key))
    return np.array(values, np.float32)


def model_header_crc32(model: ModelHandle) -> int:
    return int(_lib.kvmix_model_header_crc32(model))


def model_get_tensor(model: ModelHandle, name: str) -> tuple[int, int]:
    """(n_rows, n_in); a vector is one row, and (0, 0) no tensor of that name."""
    out = _ffi.new("kvmix_tensor *")
    _call(_lib.kvmix_model_get_tensor, model, _chars("name", name), out)
    return int(out.n_rows), int(out.n_in)


def model_read_tensor(model: ModelHandle, name: str, first: int, n_rows: int, n_in: int) -> NDArray[np.float32]:
    """Some rows, decoded: [n_rows, n_in]."""
    out = np.empty((n_rows, n_in), np.float32)
    _call(_lib.kvmix_model_read_tensor, model, _chars("name", name), first, n_rows, _ffi.from_buffer("float[]", out))
    return out


def tokenize(
    model: ModelHandle, text: bytes, trusted: bytes | None, *, add_special: bool, parse_special: bool
) -> list[int]:
    flags = add_special * _lib.KVMIX_ADD_SPECIAL | parse_special * _lib.KVMIX_PARSE_SPECIAL
    mask = _ffi.NULL if trusted is None else _ffi.from_buffer("uint8_t[]", trusted)
    capacity = len(text) + 8  # a token is a byte at least; and BOS, EOS, a space prefix
    return cast(list[int], _filled("int32_t[]", capacity, _lib.kvmix_tokenize, model, text, len(text), mask, flags))


def token_bytes(model: ModelHandle, token: int) -> bytes:
    return cast(bytes, _filled("char[]", 64, _lib.kvmix_token_bytes, model, int32("token", token)))


def token_attr(model: ModelHandle, token: int) -> int:
    return int(_lib.kvmix_token_attr(model, int32("token", token)))


# ---- session --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Page:
    """One KV head of a page that is about to be packed (kvmix_page): positions [first, n_valid) are there. What is
    written into a side of type f16 is what attention reads in its place. The arrays live as long as the call."""

    layer: int
    head: int
    page: int
    first: int
    n_valid: int
    k: NDArray[np.float32]  # [d_k, 128], after RoPE
    v: NDArray[np.float32]  # [128, d_v]
    q_rms: NDArray[np.float32]  # [d_k, 128], read-only

    def roundtrip(self, k_type: str, v_type: str) -> "Page":
        """A copy whose k and v are what these types make of them, with this page's own mean and balance."""
        copy = replace(self, k=self.k.copy(), v=self.v.copy())
        numbers = (self.layer, self.head, self.page, self.first, self.n_valid, len(self.k), self.v.shape[1])
        arrays = [_ffi.from_buffer("float[]", array) for array in (copy.k, copy.v, self.q_rms)]
        struct = _ffi.new("kvmix_page *", (*numbers, *arrays))
        _call(_lib.kvmix_page_roundtrip, struct, _chars("k_type", k_type), _chars("v_type", v_type))
        return copy


class PageHook:
    """A Python function that sees every page before it is packed; `error` is what it raised and stopped the batch."""

    def __init__(self, function: Callable[[Page], None] | None) -> None:
        self.error: BaseException | None = None
        self.function = function
        self.callback = None if function is None else _ffi.callback("kvmix_page_hook", self._call, error=1)

    def _call(self, _user: Any, struct: Any) -> int:
        def array(pointer: Any, *shape: int) -> NDArray[np.float32]:
            return np.frombuffer(_ffi.buffer(pointer, 4 * shape[0] * shape[1]), np.float32).reshape(shape)

        try:
            k, v = array(struct.k, struct.d_k, 128), array(struct.v, 128, struct.d_v)
            q_rms = array(struct.q_rms, struct.d_k, 128)
            q_rms.flags.writeable = False
            page = Page(struct.layer, struct.head, struct.page, struct.first, struct.n_valid, k, v, q_rms)
            cast(Callable[[Page], None], self.function)(page)
        except BaseException as error:  # raised again where the batch was asked for
            self.error = error
            return 1
        return 0

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Around a call that runs the model."""
        self.error = None
        try:
            yield
        except Cancelled:
            if self.error is not None:
                raise self.error from None
            raise


def _session_options(values: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    options = _ffi.new("kvmix_session_options *")
    _lib.kvmix_session_defaults(options)
    return options, _assign(options, values)


def session_plan(model: ModelHandle, values: Mapping[str, Any]) -> dict[str, Any]:
    options, _alive = _session_options(values)
    out = _ffi.new("kvmix_memory *")
    _call(_lib.kvmix_session_plan, model, options, out)
    return _fields(out[0])


def session_open(model: ModelHandle, values: Mapping[str, Any]) -> SessionHandle:
    options, _alive = _session_options(values)
    out = _ffi.new("kvmix_session **")
    _call(_lib.kvmix_session_open, out, model, options)
    return SessionHandle(out[0])


def session_close(session: SessionHandle) -> None:
    _lib.kvmix_session_close(session)


def decode(session: SessionHandle, rows: list[tuple[int, int, int, bool]]) -> None:
    """rows: (token, seq, pos, want_logits)"""
    _call(_lib.kvmix_decode, session, _ffi.new("kvmix_row[]", rows), len(rows))


def logits(session: SessionHandle, index: int, n_vocab: int) -> NDArray[np.float32]:
    """The library's own memory, [n_vocab], read-only: valid until the next decode, sync or close."""
    out = _ffi.new("const float **")
    _call(_lib.kvmix_logits, out, session, int32("index", index))
    view = np.frombuffer(_ffi.buffer(out[0], n_vocab * 4), dtype=np.float32)
    view.flags.writeable = False
    return view


def sync(session: SessionHandle, seq: int, tokens: "array[int]") -> int:
    """One step of at most n_batch tokens; returns the tokens held."""
    held = _ffi.new("int32_t *")
    _call(_lib.kvmix_sync, session, seq, _ffi.from_buffer("int32_t[]", tokens), len(tokens), held)
    return int(held[0])


def truncate(session: SessionHandle, seq: int, n_tokens: int) -> int:
    held = _ffi.new("int32_t *")
    _call(_lib.kvmix_truncate, session, seq, n_tokens, held)
    return int(held[0])


def fork(session: SessionHandle, src: int, dst: int) -> None:
    _call(_lib.kvmix_fork, session, src, dst)


def checkpoint(session: SessionHandle, seq: int) -> None:
    _call(_lib.kvmix_checkpoint, session, seq)


def length(session: SessionHandle, seq: int) -> int:
    return int(_lib.kvmix_length(session, seq))


def tokens(session: SessionHandle, seq: int) -> "array[int]":
    """The ids held, a copy."""
    n_bytes = 4 * length(session, seq)
    return array("i", bytes(_ffi.buffer(_lib.kvmix_tokens(session, seq), n_bytes)))


def save(session: SessionHandle, seq: int, path: bytes, note: bytes) -> None:
    _call(_lib.kvmix_save, session, seq, _chars("path", path), note, len(note))


def load(session: SessionHandle, seq: int, path: bytes) -> bytes:
    """Returns the note."""
    note, n_bytes = _ffi.new("const void **"), _ffi.new("size_t *")
    _call(_lib.kvmix_load, note, session, seq, _chars("path", path), n_bytes)
    return bytes(_ffi.buffer(note[0], n_bytes[0]))


def cancel(session: SessionHandle) -> None:
    _lib.kvmix_cancel(session)


def session_get_stats(session: SessionHandle) -> dict[str, Any]:
    out = _ffi.new("kvmix_stats *")
    _call(_lib.kvmix_session_get_stats, session, out)
    return _fields(out[0])


def session_get_layer(session: SessionHandle, layer: int) -> dict[str, Any]:
    out = _ffi.new("kvmix_layer_kv *")
    _call(_lib.kvmix_session_get_layer, session, layer, out)
    return _fields(out[0])


# ---- sampling -------------------------------------------------------------------------------------------------------


def sampling_defaults() -> dict[str, Any]:
    out = _ffi.new("kvmix_sampling *")
    _lib.kvmix_sampling_defaults(out)
    return {name: value for name, value in _fields(out[0]).items() if name != "size"}


def sampler_open(model: ModelHandle, values: Mapping[str, Any]) -> SamplerHandle:
    params, out = _ffi.new("kvmix_sampling *"), _ffi.new("kvmix_sampler **")
    _lib.kvmix_sampling_defaults(params)
    _assign(params, values)
    _call(_lib.kvmix_sampler_open, out, model, params)
    return SamplerHandle(_ffi.gc(out[0], _lib.kvmix_sampler_close))  # also for a generator that is never started


def sampler_close(sampler: SamplerHandle) -> None:
    _ffi.release(sampler)


def sampler_accept(sampler: SamplerHandle, token: int) -> None:
    _call(_lib.kvmix_sampler_accept, sampler, token)


def sample(sampler: SamplerHandle, session: SessionHandle, index: int) -> int:
    """A token from the index-th logits of the last decode or sync."""
    out, token = _ffi.new("const float **"), _ffi.new("int32_t *")
    _call(_lib.kvmix_logits, out, session, index)
    _call(_lib.kvmix_sample, sampler, out[0], token)
    return int(token[0])
