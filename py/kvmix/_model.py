"""Model: an opened GGUF file - what it is, its tokens, and the sessions that run it.

Closing a model closes its sessions first. Without close() the garbage collector does both in the same order (a
session holds its model); at interpreter exit nothing is done, the operating system takes the mapping back.
"""

import enum
import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from . import _native, _recipes
from ._session import Core, Memory, Session, SessionOptions, with_fields
from .errors import ArgumentError, StateError


@dataclass(frozen=True, slots=True)
class ModelInfo:
    arch: str  # "llama", "qwen2"
    name: str
    weights: str  # how the weights are stored, by bytes: "Q4_1 87%, Q8_0 13%"
    file_bytes: int
    weight_bytes: int
    n_params: int
    n_layer: int
    n_embd: int
    n_ff: int
    n_vocab: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ctx_train: int
    bos: int  # token ids, -1 where the file names none
    eos: int
    eot: int
    eom: int
    add_bos: int  # 1 when add_special would put one
    add_eos: int


class TokenAttr(enum.IntFlag):
    CONTROL = 1
    BYTE = 2
    UNKNOWN = 4
    USER = 8
    UNUSED = 16
    END = 32  # ends a turn: eos, eot, eom and the known end tokens by text


class Model:
    """An opened GGUF file. `mmap=False` reads it into private memory instead of mapping it."""

    def __init__(self, path: str | os.PathLike[str], *, mmap: bool = True) -> None:
        self.path = os.fspath(path)
        handle = _native.model_open(os.fsencode(self.path), mmap)
        self._handle = handle
        self._cores: weakref.WeakSet[Core] = weakref.WeakSet()
        self._named: dict[str, tuple[str, str]] = {}  # recipes asked for by name: text and source
        self._finalizer = weakref.finalize(self, _native.model_close, handle)
        self._finalizer.atexit = False
        self.info = ModelInfo(**_native.model_get_info(handle))

    @property
    def handle(self) -> _native.ModelHandle:
        if not self._finalizer.alive:
            raise StateError(f"the model {self.path} is closed: open it again")
        return self._handle

    def close(self) -> None:
        """Closes the model and its sessions; a second call does nothing."""
        for core in list(self._cores):
            core.close()
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # ---- metadata and tokens

    def metadata(self, key: str) -> str | None:
        """A string of the file's metadata, None when the key is absent."""
        data = _native.model_get_string(self.handle, key)
        return None if data is None else data.decode("utf-8", "replace")

    def numbers(self, key: str) -> NDArray[np.float32]:
        """An array of floats of the file's metadata, empty when the key is absent."""
        return _native.model_get_floats(self.handle, key)

    def tensor(self, name: str) -> NDArray[np.float32] | None:
        """A tensor by its name in the file ("blk.0.attn_k.weight"), decoded to float32: a matrix [n_out, n_in] or a
        vector [n]; None when there is none."""
        shape = self.shape(name)
        if not shape:
            return None
        n_rows = shape[0] if len(shape) == 2 else 1
        return _native.model_read_tensor(self.handle, name, 0, n_rows, shape[-1]).reshape(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor: (n_out, n_in), of a vector (n,); empty when there is none."""
        n_rows, n_in = _native.model_get_tensor(self.handle, name)
        return (n_rows, n_in) if n_rows > 1 else (n_in,) * n_rows

    @property
    def fingerprint(self) -> str:
        """Tells this file from others: its size, and a checksum of its metadata and tensor list."""
        return f"{self.info.file_bytes:x}-{_native.model_header_crc32(self.handle):08x}"

    @property
    def chat_template(self) -> str | None:
        return self.metadata("tokenizer.chat_template")

    def tokenize(
        self,
        text: str | bytes,
        *,
        add_special: bool = True,
        parse_special: bool = False,
        trusted: bytes | None = None,
    ) -> list[int]:
        """Text as token ids. `add_special` puts BOS and EOS where the file says so; `parse_special` recognizes control
        tokens written as text, with `trusted` (a byte for each byte of the text) only where every byte is nonzero.

        Bytes need not be UTF-8; one that the vocabulary cannot express is dropped, as in llama.cpp."""
        data = _native.text_bytes("text", text)
        if trusted is not None and len(trusted) != len(data):
            raise ArgumentError(f"trusted has {len(trusted)} bytes, the text {len(data)}: give one for each")
        return _native.tokenize(self.handle, data, trusted, add_special=add_special, parse_special=parse_special)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; a control token gives its text."""
        return _native.token_bytes(self.handle, token)

    def detokenize(self, tokens: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    def token_attr(self, token: int) -> TokenAttr:
        return TokenAttr(_native.token_attr(self.handle, token))

    def is_end(self, token: int) -> bool:
        """Whether the token ends a turn."""
        return TokenAttr.END in self.token_attr(token)

    # ---- sessions

    def plan(self, n_ctx: int = 0, kv: str | None = None, **options: Any) -> Memory:
        """What session() with the same options would allocate, without allocating it."""
        wanted = self._options(n_ctx, kv, options)
        return Memory(**_native.session_plan(self.handle, wanted.native(_native.PageHook(wanted.page_hook))))

    def session(self, n_ctx: int = 0, kv: str | None = None, **options: Any) -> Session:
        """A session; the other options are the fields of SessionOptions."""
        core = Core(self, self._options(n_ctx, kv, options))
        self._cores.add(core)
        return Session(core, _native.int32s([]))

    def _options(self, n_ctx: int, kv: str | None, others: dict[str, Any]) -> SessionOptions:
        options = with_fields(SessionOptions(n_ctx=n_ctx, kv=kv), others)
        if not isinstance(options.kv, str) or not _recipes.is_name(options.kv):
            return options
        if options.kv not in self._named:
            self._named[options.kv] = _recipes.named(self, options.kv)
        text, source = self._named[options.kv]
        return replace(options, kv=text, kv_source=source)
