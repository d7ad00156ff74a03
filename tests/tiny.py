"""Tiny random models: complete GGUF files with weights, tokenizer and chat template, written in a moment.

    tiny.write_model(folder / "m.gguf", arch="qwen2", weight_type="Q4_0", k_bias=20.0)

The same arguments give the same bytes. The weights are scaled so that activations stay of the order of one and the
attention is peaked (logits before the softmax have a standard deviation of about QK_GAIN^2), as in a trained model:
a test that runs one sees the parts that a flat softmax would hide.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, TokenType

Value = bool | int | float | str | Sequence[bool] | Sequence[int] | Sequence[float] | Sequence[str]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QK_GAIN = 1.8  # standard deviation of a channel of q and of k
HEAD_NORMS = {"qwen3", "gemma3"}
POST_NORMS = {"gemma3"}
POST_GAIN = 0.4  # of what a layer with these norms adds: at 1, seven layers make an NMSE of 7e-8 of f16's rounding

# Byte-level merges in the order of their ranks; `Ġ` is the space. SentencePiece's pieces are the same with `▁`.
MERGES = [
    "h e", "l l", "i n", "e r", "o n", "Ġ t", "Ġ a", "he ll", "Ġt he", "r e", "a n", "o u", "Ġ w", "hell o",
    "o r", "Ġw or", "l d", "Ġwor ld", "in g", "Ġa n", "Ġan d", "i s", "Ġ is", "a t", "e n", "t h", "th e", "Ġ y",
    "Ġy ou", "n o", "s t", "y ou",
]  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """What a file holds: hyper-parameters, and the tensors by name as float32, matrices [n_out, n_in], as decoded."""

    path: Path
    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    n_ctx: int
    rope_base: float
    norm_eps: float
    span: int
    tensors: dict[str, np.ndarray] = field(repr=False)


def write_model(
    path: Path,
    *,
    arch: str = "llama",
    n_layer: int = 2,
    n_embd: int = 256,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int = 64,
    n_ff: int = 512,
    n_vocab: int | None = None,  # the least multiple of 64 that holds the vocabulary
    n_ctx: int = 1024,
    tied: bool = False,  # token_embd.weight is the output matrix too
    weight_type: str = "F32",  # of the matrices; the K formats need rows of a multiple of 256
    k_bias: float = 0.0,  # size of the few huge key biases that a qwen2 has
    rope_base: float = 1e4,
    norm_eps: float = 1e-5,
    span: int = 0,  # what a row sees in the layers that slide: gemma3's, all but every 6th
    rope_freqs: bool = False,  # a factor for each rotary pair, as a llama may have
    spm: bool = False,  # a SentencePiece vocabulary instead of a byte-level one
    chat_template: str | None = CHATML,
    tensors_per_file: int = 0,  # splits the model into files of so many, which gguf names after path
    extra_keys: Mapping[str, Value] | None = None,  # may replace what would be written without them
    seed: int = 0,
) -> Tiny:
    rng = np.random.default_rng(seed)
    kind = GGMLQuantizationType[weight_type]
    vocab = spm_vocab() if spm else byte_vocab()
    n_vocab = n_vocab or -(-len(vocab.tokens) // 64) * 64
    model = Tiny(
        path=path, arch=arch, n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_head_kv=n_head_kv, head_dim=head_dim,
        n_ff=n_ff, n_vocab=n_vocab, n_ctx=n_ctx, rope_base=rope_base, norm_eps=norm_eps, span=span, tensors={},
    )  # fmt: skip

    writer = gguf.GGUFWriter(path, arch, split_max_tensors=tensors_per_file)
    put_hyper_parameters(writer, model)
    put_vocab(writer, vocab, n_vocab, "qwen2" if arch.startswith("qwen") else "smollm")
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for key, value in (extra_keys or {}).items():
        put_key(writer, key, value)

    for name, values in weights(model, rng, tied, k_bias, rope_freqs):
        if values.ndim == 1:
            writer.add_tensor(name, values)
            model.tensors[name] = values
        else:
            data = encode(values, kind, rng)
            writer.add_tensor(name, data, raw_dtype=kind)
            model.tensors[name] = gguf.quants.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


# ---- weights --------------------------------------------------------------------------------------------------------


def weights(
    model: Tiny, rng: np.random.Generator, tied: bool, k_bias: float, rope_freqs: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 values) of each tensor; a matrix maps inputs of size one to outputs of size `gain`."""

    def matrix(n_out: int, n_in: int, gain: float) -> np.ndarray:
        return rng.normal(0, gain / n_in**0.5, (n_out, n_in)).astype(np.float32)

    def norm(n: int = model.n_embd, gain: float = 1) -> np.ndarray:
        return (gain * rng.normal(1, 0.1, n)).astype(np.float32)

    n_q, n_kv = model.n_head * model.head_dim, model.n_head_kv * model.head_dim
    yield "token_embd.weight", matrix(model.n_vocab, model.n_embd, 3)
    if rope_freqs:
        yield "rope_freqs.weight", np.linspace(1, 8, model.head_dim // 2, dtype=np.float32)
    for i in range(model.n_layer):
        blk = f"blk.{i}."
        yield blk + "attn_norm.weight", norm()
        yield blk + "attn_q.weight", matrix(n_q, model.n_embd, QK_GAIN)
        yield blk + "attn_k.weight", matrix(n_kv, model.n_embd, QK_GAIN)
        yield blk + "attn_v.weight", matrix(n_kv, model.n_embd, 1)
        if model.arch == "qwen2":
            yield blk + "attn_q.bias", rng.normal(0, 0.2, n_q).astype(np.float32)
            yield blk + "attn_k.bias", key_bias(model, rng, k_bias)
            yield blk + "attn_v.bias", rng.normal(0, 0.2, n_kv).astype(np.float32)
        if model.arch in HEAD_NORMS:
            yield blk + "attn_q_norm.weight", norm(model.head_dim, QK_GAIN)
            yield blk + "attn_k_norm.weight", norm(model.head_dim, QK_GAIN)
        yield blk + "attn_output.weight", matrix(model.n_embd, n_q, 0.5)
        if model.arch in POST_NORMS:
            yield blk + "post_attention_norm.weight", norm(gain=POST_GAIN)
            yield blk + "post_ffw_norm.weight", norm(gain=POST_GAIN)
        yield blk + "ffn_norm.weight", norm()
        yield blk + "ffn_gate.weight", matrix(model.n_ff, model.n_embd, 1)
        yield blk + "ffn_up.weight", matrix(model.n_ff, model.n_embd, 1)
        yield blk + "ffn_down.weight", matrix(model.n_embd, model.n_ff, 1)
    yield "output_norm.weight", norm()
    if not tied:
        yield "output.weight", matrix(model.n_vocab, model.n_embd, 3)


def key_bias(model: Tiny, rng: np.random.Generator, size: float) -> np.ndarray:
    """Small everywhere, huge in the eighth of the channels that RoPE turns slowest, in either half of the head."""
    bias = rng.normal(0, 0.2, (model.n_head_kv, 2, model.head_dim // 2))
    n_slow = max(1, model.head_dim // 16)
    bias[:, :, -n_slow:] += size * rng.choice([-1.0, 1.0], (model.n_head_kv, 2, n_slow))
    return bias.ravel().astype(np.float32)


def encode(values: np.ndarray, kind: GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """The values in the format, where gguf-py can write it; else random blocks of the same size of numbers."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        return random_blocks(values.shape, float(values.std()), kind, rng)


# The formats that gguf-py only reads: (byte offset, factor) of a block's f16 scales. The second one multiplies what is
# subtracted; its factor is the mean code, which centres the values.
SCALES = {
    "Q2_K": ((80, 1.0), (82, 1.5)),
    "Q3_K": ((108, 1.0),),
    "Q4_K": ((0, 1.0), (2, 7.5)),
    "Q5_K": ((0, 1.0), (2, 15.5)),
    "Q6_K": ((208, 1.0),),
}
SCALES |= {f"IQ{name}": ((0, 1.0),) for name in ("1_S", "2_XXS", "2_XS", "2_S", "3_XXS", "3_S", "4_NL", "4_XS")}


def random_blocks(
    shape: tuple[int, ...], std: float, kind: GGMLQuantizationType, rng: np.random.Generator
) -> np.ndarray:
    """Blocks of random codes whose scales give the values this standard deviation."""
    n_values, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape[1] % n_values != 0:
        raise ValueError(f"rows of {shape[1]} values are no multiple of {kind.name}'s block of {n_values}")
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // n_values, n_bytes), dtype=np.uint8)
    if kind.name == "Q2_K":
        blocks[:, :16] = blocks[:, :16] % 16 * 17  # each minimum is its scale
    elif len(SCALES[kind.name]) == 2:
        centre_groups(blocks, rng)
    scales = rng.uniform(0.7, 1.3, len(blocks)) * 0.01

    def put_scales() -> None:
        for offset, factor in SCALES[kind.name]:
            blocks[:, offset : offset + 2] = (scales * factor).astype("<f2")[:, None].view(np.uint8)

    put_scales()
    scales *= std / float(gguf.quants.dequantize(blocks, kind).std())
    put_scales()
    return blocks.reshape(shape[0], -1)


def centre_groups(blocks: np.ndarray, rng: np.random.Generator) -> None:
    """Makes the 6-bit minima of Q4_K and Q5_K differ from the scales in two bits only, so that a group of 32 values has
    a mean near zero: with means, the products of two matrices add up and activations grow."""
    noise = rng.integers(0, 4, (len(blocks), 8), dtype=np.uint8)
    blocks[:, 8:12] = blocks[:, 4:8] ^ noise[:, :4]
    blocks[:, 12:16] = (blocks[:, 12:16] & 15) * 17 ^ noise[:, 4:] << 4


# ---- metadata -------------------------------------------------------------------------------------------------------


def put_hyper_parameters(writer: gguf.GGUFWriter, model: Tiny) -> None:
    writer.add_name("tiny")
    writer.add_block_count(model.n_layer)
    writer.add_context_length(model.n_ctx)
    writer.add_embedding_length(model.n_embd)
    writer.add_feed_forward_length(model.n_ff)
    writer.add_head_count(model.n_head)
    writer.add_head_count_kv(model.n_head_kv)
    writer.add_rope_freq_base(model.rope_base)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    if model.span:
        writer.add_sliding_window(model.span)
    if model.n_head * model.head_dim != model.n_embd:
        writer.add_key_length(model.head_dim)
        writer.add_value_length(model.head_dim)
    if model.arch == "llama":
        writer.add_rope_dimension_count(model.head_dim)


def put_key(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    if any(key in keys for keys in writer.kv_data):
        del writer.kv_data[0][key]
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


# ---- vocabularies ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocab:
    model: str  # tokenizer.ggml.model
    tokens: list[str]
    types: list[TokenType]
    bos: str
    eos: str
    merges: list[str] | None = None
    scores: list[float] | None = None


def put_vocab(writer: gguf.GGUFWriter, vocab: Vocab, n_vocab: int, pre: str) -> None:
    n_unused = n_vocab - len(vocab.tokens)
    if n_unused < 0:
        raise ValueError(f"n_vocab is {n_vocab}, the vocabulary alone has {len(vocab.tokens)} tokens")
    writer.add_tokenizer_model(vocab.model)
    writer.add_token_list(vocab.tokens + [f"[PAD{i}]" for i in range(n_unused)])
    writer.add_token_types(vocab.types + [TokenType.UNUSED] * n_unused)
    if vocab.merges is not None:
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(vocab.merges)
    if vocab.scores is not None:
        writer.add_token_scores(vocab.scores + [-1e4] * n_unused)
    writer.add_bos_token_id(vocab.tokens.index(vocab.bos))
    writer.add_eos_token_id(vocab.tokens.index(vocab.eos))
    writer.add_add_bos_token(vocab.model == "llama")


def byte_vocab() -> Vocab:
    """GPT-2's: a character for each byte, the merged pieces, three control tokens."""
    pieces = [byte_characters()[byte] for byte in range(256)] + [merge.replace(" ", "") for merge in MERGES]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return Vocab(
        model="gpt2",
        tokens=pieces + control,
        types=[TokenType.NORMAL] * len(pieces) + [TokenType.CONTROL] * len(control),
        bos="<|endoftext|>",
        eos="<|im_end|>",
        merges=MERGES,
    )


def spm_vocab() -> Vocab:
    """Llama's: three control tokens, a token for each byte, pieces by falling score, ASCII, ChatML's marks."""
    control = ["<unk>", "<s>", "</s>"]
    raw_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [merge.replace(" ", "").replace("Ġ", "▁") for merge in MERGES]
    letters = ["▁", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    marks = ["<|im_start|>", "<|im_end|>"]
    return Vocab(
        model="llama",
        tokens=control + raw_bytes + pieces + letters + marks,
        types=[
            TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL,
            *[TokenType.BYTE] * 256, *[TokenType.NORMAL] * (len(pieces) + len(letters)), *[TokenType.CONTROL] * 2,
        ],
        bos="<s>",
        eos="</s>",
        scores=[0.0] * 259 + [-float(i) for i in range(len(pieces) + len(letters))] + [0.0] * 2,
    )  # fmt: skip


@functools.cache
def byte_characters() -> list[str]:
    """GPT-2's character of each byte: itself where it is visible, else the next unused code from 256 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256)]
