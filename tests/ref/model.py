"""The forward pass of the model families, from a GGUF file.

One row of a layer; what is in brackets, only some families have:

    h = norm(x);  q, k, v = W h [+ b];  q, k = rope([norm](q, k));  x += [norm](Wo attend(q, cache(k, v)))
    h = norm(x);  x += [norm](Wdown (act(Wgate h) * Wup h))

    llama    RoPE turns neighbours; each pair's frequency may be divided by a factor (rope_freqs.weight, Llama 3.x)
    qwen2    biases on q, k and v
    qwen3    norms of every head of q and k, before RoPE
    gemma3   those, a norm of whatever is added to x, act = GELU, x = sqrt(n_embd) * embedding, and layers that slide:
             they see the last `span` positions, and their RoPE has a base of its own

A file with anything else in it (a tensor that is not read, a RoPE scaling by key) is refused rather than computed
wrongly.

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

NEIGHBOURS = {"llama"}  # RoPE pairs channels (2i, 2i + 1); the others (i, i + n_rot / 2)
BIASES = {"qwen2"}
HEAD_NORMS = {"qwen3", "gemma3"}
GEMMA = {"gemma3"}
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
SLIDING_ROPE_BASE = 10000.0
ROPE_FREQS = "rope_freqs.weight"
OPTIONAL = {"output.weight", ROPE_FREQS}


@dataclass(frozen=True)
class Hyper:
    arch: str  # one of FAMILIES
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_rot: int  # the first n_rot channels of q and k turn with the position
    rope_base: float
    norm_eps: float
    span: int = 0  # what a row of the layers that slide sees
    sliding: frozenset[int] = frozenset()

    def span_of(self, layer: int) -> int:
        return self.span if layer in self.sliding else 0

    def rope_base_of(self, layer: int) -> float:
        return SLIDING_ROPE_BASE if layer in self.sliding else self.rope_base


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
            self.layers.append(LayerCache(k_type, v_type, h.n_head_kv, h.head_dim, d_v, options, h.span_of(i)))

    def feed(self, tokens: SequenceOf[int] | Array) -> Array:
        """Appends a batch; -> hidden states behind the last layer [n, n_embd]."""
        position = self.layers[0].n_tokens + np.arange(len(tokens))
        h, w = self.model.hyper, self.model.weights
        x = w["token_embd.weight"][np.asarray(tokens)]
        if h.arch in GEMMA:
            x = x * h.n_embd**0.5

        def added(out: Array, norm: str) -> Array:
            return rms_norm(out, w[norm], h.norm_eps) if h.arch in GEMMA else out

        for i in range(len(self.layers)):
            x = x + added(self.attention(i, x, position), f"blk.{i}.post_attention_norm.weight")
            x = x + added(self.feed_forward(i, x), f"blk.{i}.post_ffw_norm.weight")
        return x

    def attention(self, layer: int, x: Array, position: Array) -> Array:
        """[n, n_embd] -> [n, n_embd]"""
        h, w, cache = self.model.hyper, self.model.weights, self.layers[layer]
        y = rms_norm(x, w[f"blk.{layer}.attn_norm.weight"], h.norm_eps)

        def heads(name: str, n_head: int) -> Array:
            """[n, n_head, d]"""
            out = y @ w[f"blk.{layer}.attn_{name}.weight"].T
            if h.arch in BIASES:
                out = out + w[f"blk.{layer}.attn_{name}.bias"]
            return out.reshape(len(y), n_head, -1)

        def turned(name: str, n_head: int) -> Array:
            """[n, n_head, d_k]"""
            out = heads(name, n_head)
            if h.arch in HEAD_NORMS:
                out = rms_norm(out, w[f"blk.{layer}.attn_{name}_norm.weight"], h.norm_eps)
            return rope(out, position, h, layer, w.get(ROPE_FREQS, 1.0))

        q, k = turned("q", h.n_head), turned("k", h.n_head_kv)
        cache.append(q, k, heads("v", h.n_head_kv))
        out = cache.attend(q, h.head_dim**-0.5).astype(x.dtype)
        return out.reshape(len(x), -1) @ w[f"blk.{layer}.attn_output.weight"].T

    def feed_forward(self, layer: int, x: Array) -> Array:
        """[n, n_embd] -> [n, n_embd]"""
        w = self.model.weights
        y = rms_norm(x, w[f"blk.{layer}.ffn_norm.weight"], self.model.hyper.norm_eps)
        gate, up = y @ w[f"blk.{layer}.ffn_gate.weight"].T, y @ w[f"blk.{layer}.ffn_up.weight"].T
        activation = gelu if self.model.hyper.arch in GEMMA else silu
        return (activation(gate) * up) @ w[f"blk.{layer}.ffn_down.weight"].T


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps)) * weight


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    """As approximated by tanh, which is how the models were trained."""
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def rope(x: Array, position: Array, hyper: Hyper, layer: int = 0, factors: Array | float = 1.0) -> Array:
    """x [n, n_head, d], position [n], factors [n_rot / 2]: pair i of the first n_rot channels turns by
    position * base^(-2i / n_rot) / factors[i]."""
    n_rot = hyper.n_rot
    frequency = hyper.rope_base_of(layer) ** (-np.arange(0, n_rot, 2) / n_rot) / factors
    angle = position[:, None, None] * frequency  # [n, 1, n_rot / 2]
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    half = n_rot // 2
    if hyper.arch in NEIGHBOURS:
        a, b = slice(0, n_rot, 2), slice(1, n_rot, 2)
    else:
        a, b = slice(0, half), slice(half, n_rot)
    out = x.copy()
    out[..., a] = x[..., a] * cos - x[..., b] * sin
    out[..., b] = x[..., a] * sin + x[..., b] * cos
    return out


# ---- from a file ----------------------------------------------------------------------------------------------------


def weight_names(hyper: Hyper) -> set[str]:
    """The tensors of the family, those of OPTIONAL among them."""
    names = {"token_embd.weight", "output_norm.weight", "output.weight"}
    if hyper.arch == "llama":
        names.add(ROPE_FREQS)
    for i in range(hyper.n_layer):
        parts = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
        if hyper.arch in HEAD_NORMS:
            parts += ["attn_q_norm", "attn_k_norm"]
        if hyper.arch in GEMMA:
            parts += ["post_attention_norm", "post_ffw_norm"]
        names |= {f"blk.{i}.{part}.weight" for part in parts}
        if hyper.arch in BIASES:
            names |= {f"blk.{i}.attn_{part}.bias" for part in "qkv"}
    return names


def sliding_layers(n_layer: int, pattern: int | SequenceOf[bool]) -> frozenset[int]:
    """The layers that slide: all but every pattern-th, or as a flag for each says."""
    if isinstance(pattern, int):
        pattern = [(i + 1) % pattern != 0 for i in range(n_layer)]
    return frozenset(i for i, slides in enumerate(pattern) if slides)


def load(path: str | Path, dtype: type[np.floating[Any]] = np.float64) -> Model:
    """Opens a GGUF file and decodes every weight."""
    reader = gguf.GGUFReader(path)

    def field(key: str, default: Any = None) -> Any:
        found = reader.get_field(key)
        return default if found is None else found.contents()

    arch = field("general.architecture")
    if arch not in FAMILIES:
        raise ValueError(f"this reference computes {', '.join(FAMILIES)}, not {arch}")
    if field(f"{arch}.rope.scaling.type", "none") != "none":
        raise ValueError("this reference computes no RoPE scaling")
    n_embd, n_head = field(f"{arch}.embedding_length"), field(f"{arch}.attention.head_count")
    head_dim = field(f"{arch}.attention.key_length", n_embd // n_head)
    n_layer, span = field(f"{arch}.block_count"), 0
    if arch in GEMMA:
        span = field(f"{arch}.attention.sliding_window", 0)
    hyper = Hyper(
        arch=arch,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=field(f"{arch}.attention.head_count_kv", n_head),
        head_dim=head_dim,
        n_rot=field(f"{arch}.rope.dimension_count", head_dim),
        rope_base=field(f"{arch}.rope.freq_base", 10000.0),
        norm_eps=field(f"{arch}.attention.layer_norm_rms_epsilon"),
        span=span,
        sliding=sliding_layers(n_layer, field(f"{arch}.attention.sliding_window_pattern", 6)) if span else frozenset(),
    )
    weights = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(dtype) for t in reader.tensors}
    if odd := (set(weights) ^ weight_names(hyper)) - OPTIONAL:
        raise ValueError(f"not the tensors of {arch}: {sorted(odd)}")
    bos = field("tokenizer.ggml.bos_token_id") if field("tokenizer.ggml.add_bos_token", False) else None
    return Model(hyper, weights, bos)
