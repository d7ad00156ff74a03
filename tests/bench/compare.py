"""kvmix and llama.cpp on the same file, threads and machine, in turns: tokens a second and their ratio.

    python tests/bench/compare.py MODEL.gguf [-t 2] [-r 5] [-p 512] [-n 64] [-d 0] [--pair k4v3:q4_0/q4_0 ...]

Needs the package llama-cpp-python beside kvmix (a peer to measure, never a dependency). Each repetition runs kvmix,
then llama.cpp; the table has medians, the spread (max - min) / median, and the median of the ratios. Prefill is
n_prompt tokens in one batch behind `depth` tokens of context; decoding is n_gen single tokens behind the same depth.
Tokens are arbitrary ids: time does not depend on them.
"""

import argparse
import ctypes
import platform
import statistics
import time
from pathlib import Path

import kvmix
from kvmix._native import cpu_kernels

BATCH = 512


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


class Kvmix:
    def __init__(self, path: str, threads: int, n_ctx: int, kv: str) -> None:
        self.model = kvmix.Model(path)
        self.session = self.model.session(n_ctx=n_ctx, kv=kv, n_threads=threads, n_batch=BATCH)

    def restart(self, depth: int) -> None:
        self.session.sync([])
        self.feed(depth)

    def feed(self, n: int) -> None:
        held = self.session.tokens
        self.session.sync([*held, *((7 * (len(held) + i)) % 1000 + 10 for i in range(n))])


class LlamaCpp:
    def __init__(self, path: str, threads: int, n_ctx: int, types: str) -> None:
        import llama_cpp as lib

        self.lib = lib
        lib.llama_backend_init()
        self.log = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(self.log, ctypes.c_void_p())
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 1
        k, v = (getattr(lib, f"GGML_TYPE_{name.upper()}") for name in types.split("/"))
        params.type_k, params.type_v = k, v
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp refuses a cache of {types}")
        self.n = 0

    def restart(self, depth: int) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.n = 0
        self.feed(depth)

    def feed(self, n: int) -> None:
        while n > 0:
            size = min(n, BATCH)
            tokens = (ctypes.c_int32 * size)(*((7 * (self.n + i)) % 1000 + 10 for i in range(size)))
            if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, size)) != 0:
                raise SystemExit("llama.cpp failed to decode")
            self.lib.llama_synchronize(self.context)
            self.n, n = self.n + size, n - size


def rate(engine: Kvmix | LlamaCpp, kind: str, n: int, depth: int) -> float:
    engine.restart(depth)
    start = time.perf_counter()
    for size in [n] if kind == "pp" else [1] * n:
        engine.feed(size)
    return n / (time.perf_counter() - start)


def spread(values: list[float]) -> float:
    return (max(values) - min(values)) / statistics.median(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-t", type=int, default=2)
    parser.add_argument("-r", type=int, default=5)
    parser.add_argument("-p", type=int, default=512)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("-d", type=int, nargs="*", default=[0])
    parser.add_argument("--pair", nargs="*", default=["f16:f16/f16"], help="kvmix recipe:llama.cpp K/V types")
    args = parser.parse_args()
    print(f"# {Path(args.model).name}, {args.t} threads, {cpu_name()}, {cpu_kernels()} kernels, medians of {args.r}")
    print(f"{'test':<14}{'kvmix':<12}{'llama.cpp':<14}{'t/s':>9}{'t/s':>9}{'ratio':>8}   spread")
    for pair in args.pair:
        recipe, types = pair.split(":")
        n_ctx = max(args.d) + max(args.p, args.n) + 256
        ours, theirs = Kvmix(args.model, args.t, n_ctx, recipe), LlamaCpp(args.model, args.t, n_ctx, types)
        for depth in args.d:
            for kind, n in (("pp", args.p), ("tg", args.n)):
                rates = [(rate(ours, kind, n, depth), rate(theirs, kind, n, depth)) for _ in range(args.r)]
                a, b = [x for x, _ in rates], [y for _, y in rates]
                ratio = statistics.median(x / y for x, y in rates)
                test = f"{kind}{n}" + (f"@d{depth}" if depth else "")
                print(
                    f"{test:<14}{recipe:<12}{types:<14}{statistics.median(a):9.1f}{statistics.median(b):9.1f}"
                    f"{ratio:8.2f}   {spread(a):.0%} {spread(b):.0%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
