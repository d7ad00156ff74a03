"""kvmix once more, in NumPy: the executable specification, and the oracle that the engine is tested against.

Nothing here shares code with the engine or calls it. Read in this order:

1. codec.py       the bytes of a packed page: preconditioning, levels, scales, planes (kvtype.h, bit for bit)
2. cache.py       what a row at position t reads: sinks, packed pages, the f16 window; attention over the three
3. model.py       the llama and qwen2 forward pass around it, from a GGUF file
4. perplexity.py  llama.cpp's protocol: perplexity, and KL divergence against the f16 cache

codec.py is float32, operation by operation, because C must give the same bits. The others compute in float64 what the
engine computes in float32 in whatever order is fast, so they agree to a tolerance.
"""
