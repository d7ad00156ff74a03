"""The forward pass of the llama and qwen2 families, from a GGUF file.

One row of a layer:

    h = norm(x);  q, k, v = W h (+ b);  q, k = rope(q, k);  x += Wo attend(q, cache(k, v))
    h = norm(x);  x += Wdown (silu(Wgate h) * Wup h)

The two families differ in two ways: qwen2 has biases on q, k and v, and which channels RoPE pairs. A file with anything
else in it (a tensor that is not read, a RoPE scaling) is refused rather than computed wrongly.

`dtype` is that of weights and activations: float64 for an oracle, float32 where a real model has to be fast. Attention
is float64 either way.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from .cache import CacheOptions, LayerCache
from .codec import Array

Recipe = SequenceOf[tuple[str, str]]  # the K and the V type of each layer


@dataclass(frozen=True)
class Hyper:
    arch: str  # "llama" or "qwen2"
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_rot: int  # the first n_rot channels of q and k turn with the position
    rope_base: float
    norm_eps: float


@dataclass(frozen=True)
class Model:
    """Weights by their GGUF names, matrices [n_out, n_in]."""

    hyper: Hyper
    weights: dict[str, Array]
    bos: int | None = None  # the token that begins every text, where the file says so

    def sequence(self, recipe: Recipe, options: CacheOptions) -> Sequence:
        if len(recipe) != self.hyper.n_layer:
            raise ValueError(f"the recipe has {len(recipe)} layers, the model {self.hyper.n_layer}")
        return Sequence(self, recipe, options)

    def logits(self, x: Array) -> Array:
        """Hidden states [n, n_embd], as Sequence.feed returns them -> [n, n_vocab]."""
        head = self.weights.get("output.weight", self.weights["token_embd.weight"])
        return rms_norm(x, self.weights["output_norm.weight"], self.hyper.norm_eps) @ head.T


class Sequence:
    """One token stream: the hidden state flows through the layers, each with its cache."""

    def __init__(self, model: Model, recipe: Recipe, options: CacheOptions) -> None:
        self.model = model
        h = model.hyper
        self.layers = []
        for i, (k_type, v_type) in enumerate(recipe):
            d_v = len(model.weights[f"blk.{i}.attn_v.weight"]) // h.n_head_kv
            self.layers.append(LayerCache(k_type, v_type, h.n_head_kv, h.head_dim, d_v, options))

    def feed(self, tokens: SequenceOf[int] | Array) -> Array:
        """Appends a batch; -> hidden states behind the last layer [n, n_embd]."""
        position = self.layers[0].n_tokens + np.arange(len(tokens))
        x = self.model.weights["token_embd.weight"][np.asarray(tokens)]
        for i in range(len(self.layers)):
            x = x + self.attention(i, x, position)
            x = x + self.feed_forward(i, x)
        return x

    def attention(self, layer: int, x: Array, position: Array) -> Array:
        """[n, n_embd] -> [n, n_embd]"""
        h, w, cache = self.model.hyper, self.model.weights, self.layers[layer]
        y = rms_norm(x, w[f"blk.{layer}.attn_norm.weight"], h.norm_eps)

        def heads(name: str, n_head: int) -> Array:
            """[n, n_head, d]"""
            out = y @ w[f"blk.{layer}.attn_{name}.weight"].T
            if h.arch == "qwen2":
                out = out + w[f"blk.{layer}.attn_{name}.bias"]
            return out.reshape(len(y), n_head, -1)

        q = rope(heads("q", h.n_head), position, h)
        k = rope(heads("k", h.n_head_kv), position, h)
        cache.append(q, k, heads("v", h.n_head_kv))
        out = cache.attend(q, h.head_dim**-0.5).astype(x.dtype)
        return out.reshape(len(x), -1) @ w[f"blk.{layer}.attn_output.weight"].T

    def feed_forward(self, layer: int, x: Array) -> Array:
        """[n, n_embd] -> [n, n_embd]"""
        w = self.model.weights
        y = rms_norm(x, w[f"blk.{layer}.ffn_norm.weight"], self.model.hyper.norm_eps)
        gate, up = y @ w[f"blk.{layer}.ffn_gate.weight"].T, y @ w[f"blk.{layer}.ffn_up.weight"].T
        return (gate / (1 + np.exp(-gate)) * up) @ w[f"blk.{layer}.ffn_down.weight"].T


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps)) * weight


def rope(x: Array, position: Array, hyper: Hyper) -> Array:
    """x [n, n_head, d], position [n]: pair i of the first n_rot channels turns by position * base^(-2i / n_rot).

    llama files pair channels (2i, 2i + 1), qwen2 files (i, i + n_rot / 2).
    """
    n_rot = hyper.n_rot
    angle = position[:, None, None] * hyper.rope_base ** (-np.arange(0, n_rot, 2) / n_rot)  # [n, 1, n_rot / 2]
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    half = n_rot // 2
    pairs = {"llama": (slice(0, n_rot, 2), slice(1, n_rot, 2)), "qwen2": (slice(0, half), slice(half, n_rot))}
    a, b = pairs[hyper.arch]
    out = x.copy()
    out[..., a] = x[..., a] * cos - x[..., b] * sin
    out[..., b] = x[..., a] * sin + x[..., b] * cos
    return out


# ---- from a file ----------------------------------------------------------------------------------------------------


def weight_names(hyper: Hyper) -> set[str]:
    """The tensors of the family; output.weight may be missing."""
    names = {"token_embd.weight", "output_norm.weight", "output.weight"}
    for i in range(hyper.n_layer):
        parts = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
        names |= {f"blk.{i}.{part}.weight" for part in parts}
        if hyper.arch == "qwen2":
            names |= {f"blk.{i}.attn_{part}.bias" for part in "qkv"}
    return names


def load(path: str | Path, dtype: type[np.floating[Any]] = np.float64) -> Model:
    """Opens a GGUF file and decodes every weight."""
    reader = gguf.GGUFReader(path)

    def field(key: str, default: Any = None) -> Any:
        found = reader.get_field(key)
        return default if found is None else found.contents()

    arch = field("general.architecture")
    if arch not in ("llama", "qwen2"):
        raise ValueError(f"this reference computes llama and qwen2, not {arch}")
    if field(f"{arch}.rope.scaling.type", "none") != "none":
        raise ValueError("this reference computes no RoPE scaling")
    n_embd, n_head = field(f"{arch}.embedding_length"), field(f"{arch}.attention.head_count")
    head_dim = field(f"{arch}.attention.key_length", n_embd // n_head)
    hyper = Hyper(
        arch=arch,
        n_layer=field(f"{arch}.block_count"),
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=field(f"{arch}.attention.head_count_kv", n_head),
        head_dim=head_dim,
        n_rot=field(f"{arch}.rope.dimension_count", head_dim),
        rope_base=field(f"{arch}.rope.freq_base", 10000.0),
        norm_eps=field(f"{arch}.attention.layer_norm_rms_epsilon"),
    )
    weights = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(dtype) for t in reader.tensors}
    if odd := (set(weights) ^ weight_names(hyper)) - {"output.weight"}:
        raise ValueError(f"not the tensors of {arch}: {sorted(odd)}")
    bos = field("tokenizer.ggml.bos_token_id") if field("tokenizer.ggml.add_bos_token", False) else None
    return Model(hyper, weights, bos)
