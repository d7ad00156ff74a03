"""Attention weights as float32, a layer at a time, from a GGUF file or a Hugging Face folder.

Invariants
1. At most one layer's attention weights are in memory decoded; files are mapped.
2. A family that is not known is refused by name: another one may store gains, heads or fused matrices another way, and
   norms of the wrong rows look like any others.
3. No offset or shape of a file is used before it is compared with the bytes there are.

Rows are as the file has them: GGUF's llama files permute W_Q's and W_K's rows within a head, the same way for both,
which no norm sees.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvmix.errors import FormatError, ModelIOError, Unsupported

F32 = NDArray[np.float32]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "phi3", "smollm3")
ONE_PLUS_GAIN = ("gemma", "gemma2", "gemma3", "gemma3_text")  # their Hugging Face files store a gain less 1
HEADER_BYTES = 100 << 20  # safetensors' own limit


@dataclass(frozen=True)
class Attention:
    """One layer. Matrices are [n_out, n_in], heads one after another."""

    n_head: int
    n_head_kv: int
    d_k: int
    d_v: int
    attn_norm: F32  # [n_embd], the gains that are applied
    q: F32  # [n_head * d_k, n_embd]
    k: F32  # [n_head_kv * d_k, n_embd]
    v: F32  # [n_head_kv * d_v, n_embd]
    o: F32  # [n_embd, n_head * d_v]
    q_bias: F32 | None
    k_bias: F32 | None
    v_bias: F32 | None
    q_norm: F32 | None  # [d_k], gains of the per-head norms (QK-norm)
    k_norm: F32 | None


class Source(Protocol):
    """An opened model."""

    name: str
    family: str
    n_layer: int

    def layer(self, index: int) -> Attention: ...


def open_source(path: Path) -> Source:
    return HfSource(path) if path.is_dir() else GgufSource(path)


def attention(where: str, n_head: int, n_head_kv: int, weights: Mapping[str, F32 | None]) -> Attention:
    """The fields of Attention, checked against each other; the head sizes follow from the shapes."""
    q, k, v, o, norm = (weights[name] for name in ("q", "k", "v", "o", "attn_norm"))
    if q is None or k is None or v is None or o is None or norm is None:
        missing = [name for name in ("q", "k", "v", "o", "attn_norm") if weights[name] is None]
        raise FormatError(f"{where}: the attention weights {', '.join(missing)} are missing")
    d_k, d_v = len(k) // n_head_kv, len(v) // n_head_kv
    n_embd = len(norm)
    expected = {
        "q": (n_head * d_k, n_embd), "k": (n_head_kv * d_k, n_embd), "v": (n_head_kv * d_v, n_embd),
        "o": (n_embd, n_head * d_v), "attn_norm": (n_embd,), "q_bias": (n_head * d_k,), "k_bias": (n_head_kv * d_k,),
        "v_bias": (n_head_kv * d_v,), "q_norm": (d_k,), "k_norm": (d_k,),
    }  # fmt: skip
    for name, shape in expected.items():
        found = weights.get(name)
        if found is not None and found.shape != shape:
            raise FormatError(f"{where}: {name} is {list(found.shape)}; the head counts want {list(shape)}")
    return Attention(
        n_head, n_head_kv, d_k, d_v, norm, q, k, v, o,
        *(weights.get(name) for name in ("q_bias", "k_bias", "v_bias", "q_norm", "k_norm")),
    )  # fmt: skip


def split_qkv(where: str, fused: F32, n_head: int, n_head_kv: int) -> tuple[F32, F32, F32]:
    """Rows of q, k and v one after another, all heads of one size."""
    d, rest = divmod(len(fused), n_head + 2 * n_head_kv)
    if rest:
        raise FormatError(
            f"{where}: {len(fused)} rows of q, k and v are no multiple of {n_head} + 2 x {n_head_kv} heads"
        )
    q, k, v = np.split(fused, [n_head * d, (n_head + n_head_kv) * d])
    return q, k, v


# ---- GGUF -----------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "attn_norm": "attn_norm.weight", "q": "attn_q.weight", "k": "attn_k.weight", "v": "attn_v.weight",
    "o": "attn_output.weight", "q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight", "k_norm": "attn_k_norm.weight",
}  # fmt: skip


class GgufSource:
    """Read by libkvmix: it checks the file, refuses families that it cannot run, and decodes as gguf-py does, which
    would take seconds for the vocabulary."""

    def __init__(self, path: Path) -> None:
        from .validate import CheckedModel

        self._path = path
        self._model = CheckedModel(path).model
        self.name = self._model.info.name or path.name
        self.family = self._model.info.arch
        self.n_layer = self._model.info.n_layer

    def layer(self, index: int) -> Attention:
        info = self._model.info
        weights = {field: self._model.tensor(f"blk.{index}.{name}") for field, name in GGUF_NAMES.items()}
        return attention(f"{self._path}, layer {index}", info.n_head, info.n_head_kv, weights)


# ---- Hugging Face folder --------------------------------------------------------------------------------------------

HF_NAMES = {
    "attn_norm": "input_layernorm.weight", "q": "self_attn.q_proj.weight", "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight", "o": "self_attn.o_proj.weight", "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias", "v_bias": "self_attn.v_proj.bias", "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
}  # fmt: skip
O_PROJ = "layers.0.self_attn.o_proj.weight"


class HfSource:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        config = read_json(folder / "config.json")
        self.family = str(config.get("model_type", ""))
        if self.family not in FAMILIES:
            raise Unsupported(
                f"{folder}: the family {self.family!r} is not among those read here: {', '.join(FAMILIES)}"
            )
        self._config = config.get("text_config", config)  # of a model that also sees
        self.name = folder.resolve().name
        self.n_layer = self._count("num_hidden_layers")
        self._files = self._index()
        self._open: dict[str, Safetensors] = {}
        prefix = next((name.removesuffix(O_PROJ) for name in self._files if name.endswith(O_PROJ)), None)
        if prefix is None:
            raise FormatError(f"{folder}: no tensor is named ...{O_PROJ}; is this the whole model?")
        self._prefix = prefix

    def _count(self, name: str, default: int | None = None) -> int:
        value = self._config.get(name, default)
        if not isinstance(value, int) or value < 1:
            raise FormatError(f"{self._folder / 'config.json'}: {name} is {value!r}; it must be 1 or more")
        return value

    def _index(self) -> dict[str, str]:
        """The file that each tensor is in."""
        index = self._folder / "model.safetensors.index.json"
        if index.exists():
            return dict(read_json(index).get("weight_map", {}))
        single = self._folder / "model.safetensors"
        if not single.exists():
            raise ModelIOError(
                f"{self._folder} has neither model.safetensors nor its index: only safetensors folders are read"
            )
        return dict.fromkeys(Safetensors(single).names, single.name)

    def _tensor(self, name: str) -> F32 | None:
        file = self._files.get(name)
        if file is None:
            return None
        if file not in self._open:
            self._open = {file: Safetensors(self._folder / Path(file).name)}  # a layer is in one shard, or in two
        return self._open[file].tensor(name)

    def layer(self, index: int) -> Attention:
        where = f"{self._folder}, layer {index}"
        n_head = self._count("num_attention_heads")
        n_head_kv = self._count("num_key_value_heads", n_head)
        begin = f"{self._prefix}layers.{index}."
        weights = {field: self._tensor(begin + name) for field, name in HF_NAMES.items()}
        fused = self._tensor(begin + "self_attn.qkv_proj.weight")
        if fused is not None:
            weights |= zip("qkv", split_qkv(where, fused, n_head, n_head_kv), strict=True)
        if self.family in ONE_PLUS_GAIN:
            for field in ("attn_norm", "q_norm", "k_norm"):
                gains = weights[field]
                weights[field] = None if gains is None else gains + np.float32(1)
        return attention(where, n_head, n_head_kv, weights)


class Safetensors:
    """A mapped file: header length u64 | header, JSON: name -> dtype, shape, data_offsets | data."""

    DTYPES: Mapping[str, str] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._bytes = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as e:  # ValueError: an empty file
            raise ModelIOError(f"{path} cannot be read: {e}") from None
        n = int.from_bytes(self._bytes[:8].tobytes(), "little")
        if len(self._bytes) < 8 or n > min(HEADER_BYTES, len(self._bytes) - 8):
            raise FormatError(f"{path} is no complete safetensors file: its header would have {n} bytes")
        self._header = parse_json(path, self._bytes[8 : 8 + n].tobytes())
        self._data = self._bytes[8 + n :]

    @property
    def names(self) -> list[str]:
        return [name for name in self._header if name != "__metadata__"]

    def tensor(self, name: str) -> F32:
        try:
            entry = self._header[name]
            dtype, shape = str(entry["dtype"]), [int(n) for n in entry["shape"]]
            begin, end = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise FormatError(
                f"{self._path}: the header's entry of {name} is missing or damaged; get it again"
            ) from None
        if dtype not in self.DTYPES:
            raise Unsupported(f"{self._path}: {name} is stored as {dtype}; {', '.join(self.DTYPES)} are read")
        stored = np.dtype(self.DTYPES[dtype])
        if (
            not 0 <= begin <= end <= len(self._data)
            or min(shape, default=0) < 0
            or end - begin != prod(shape) * stored.itemsize
        ):
            raise FormatError(
                f"{self._path}: {name} {shape} does not fit its bytes {begin} to {end}; get the file again"
            )
        values = np.frombuffer(self._data[begin:end].tobytes(), stored).reshape(shape)
        if dtype == "BF16":  # the upper half of a float32
            return (values.astype("<u4") << np.uint32(16)).view(np.float32)
        return values.astype(np.float32)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path, path.read_bytes())
    except OSError as e:
        raise ModelIOError(f"{path} cannot be read: {e.strerror or e}") from None


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as e:  # no UTF-8 is one too
        raise FormatError(f"{path} has no valid JSON where it should: {e}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} has JSON that is no object where it should have one")
    return value
