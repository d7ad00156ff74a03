"""Makes the files beside it: tiny random models of transformers, and the logits that transformers computes with them.

    python make_families.py       (needs torch, transformers and gguf; nothing else in the tests does)

<name>.gguf holds the matrices in F16, <name>.npz the tokens [n] and their logits [n, n_vocab]. All is computed in f64
but keys and values, which are kept in f16 as the engine's cache keeps them: what is left is the rounding of f32.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import TokenType
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FOLDER = Path(__file__).parent
N_TOKENS = 96
BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
TEXT_LENGTH = 32  # for which the llama was "trained", before its RoPE was stretched
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": TEXT_LENGTH,
}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
SPAN = 20

# What GGUF calls the tensors of a layer. Only Gemma's norms sit elsewhere: what others call the norm behind attention
# is the norm before the feed-forward.
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_PARTS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


class HalfCache(DynamicCache):
    """Keys after RoPE and values, rounded to f16."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        halves = (states.half().to(states.dtype) for states in (key_states, value_states))
        return super().update(*halves, *args, **kwargs)


def models() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    gemma = BASE | {
        "num_hidden_layers": 3,
        "query_pre_attn_scalar": BASE["head_dim"],
        "sliding_window": SPAN,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": GEMMA_ROPE,
    }
    qwen = BASE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    return {
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**qwen)),
        "gemma3": Gemma3ForCausalLM(Gemma3TextConfig(**gemma)),
        "llama3": LlamaForCausalLM(LlamaConfig(**BASE | {"rope_parameters": LLAMA3})),
    }


def randomize(model: PreTrainedModel, rng: np.random.Generator) -> None:
    """Weights of a size that keeps activations near one and makes attention peaked; matrices are exact in f16."""
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if "norm" in name:  # Gemma's are stored less one
            centre, spread = (0, 0.3) if "Gemma" in type(model).__name__ else (1, 0.3)
        else:
            centre, spread = 0, 1.5 / shape[-1] ** 0.5
        with torch.no_grad():
            values = rng.normal(centre, spread, shape).astype(np.float16 if len(shape) > 1 else np.float32)
            parameter.copy_(torch.from_numpy(values.astype(np.float64)))


def interleaved(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a head for a RoPE of neighbours instead of halves: what files of the llama family hold."""
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def llama3_factors(head_dim: int, rope: dict[str, Any]) -> np.ndarray:
    """Waves longer than the text are stretched by `factor`, those much shorter not at all."""
    frequency = rope["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # over the text
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def tensors(arch: str, model: PreTrainedModel) -> dict[str, np.ndarray]:
    """By GGUF name, matrices float16, vectors float32."""
    parts = PARTS | (GEMMA_PARTS if arch == "gemma3" else {})
    out = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        owner = name.removeprefix("model.").removesuffix(".weight")
        if arch == "gemma3" and "norm" in owner:
            values = values + 1
        if arch == "llama" and owner.endswith(("q_proj", "k_proj")):
            values = interleaved(values, BASE["head_dim"])
        if owner.startswith("layers."):
            _, layer, part = owner.split(".", 2)
            target = f"blk.{layer}.{parts[part]}.weight"
        else:
            target = {"embed_tokens": "token_embd", "norm": "output_norm"}[owner] + ".weight"
        out[target] = values.astype(np.float16 if values.ndim > 1 else np.float32)
    if arch == "llama":
        out["rope_freqs.weight"] = llama3_factors(BASE["head_dim"], LLAMA3)
    return out


def write(path: Path, arch: str, model: PreTrainedModel) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        writer.add_array(f"{arch}.attention.sliding_window_pattern", slides)
    writer.add_tokenizer_model("llama")  # a token for each byte, to have a tokenizer at all
    writer.add_token_list([f"<0x{byte:02X}>" for byte in range(config.vocab_size)])
    writer.add_token_types([TokenType.BYTE] * config.vocab_size)
    writer.add_token_scores([0.0] * config.vocab_size)
    for name, values in tensors(arch, model).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    rng = np.random.default_rng(0)
    for name, model in models().items():
        randomize(model, rng)
        tokens = rng.integers(0, BASE["vocab_size"], N_TOKENS)
        with torch.no_grad():
            cache = HalfCache(config=model.config)
            logits = model.double().eval()(torch.from_numpy(tokens[None]), cache=cache).logits[0].numpy()
        write(FOLDER / f"{name}.gguf", "llama" if name == "llama3" else name, model)
        np.savez_compressed(FOLDER / f"{name}.npz", tokens=tokens.astype(np.int32), logits=logits.astype(np.float32))


if __name__ == "__main__":
    main()
