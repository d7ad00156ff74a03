"""An F32 copy of a GGUF file: every tensor decoded to float32 by gguf-py, the metadata kept.

    python tests/bench/to_f32.py IN.gguf OUT.gguf

With F32 weights llama.cpp keeps activations in float, as kvmix does with act=f32: divergences measured on such a copy
have nobody's 8-bit rounding in them. One tensor is in memory at a time, a large one in blocks of rows.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, ReaderTensor
from gguf.quants import dequantize

BLOCK_BYTES = 16 << 20  # of float32
STRUCTURE = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")  # fields of the reader, not of the file's metadata
FILE_TYPE = "general.file_type"


def copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    for name, field in reader.fields.items():
        if name in STRUCTURE or name in ("general.architecture", FILE_TYPE):
            continue  # the writer's own
        kind = field.types[0]
        sub_type = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type)
    if FILE_TYPE in reader.fields:
        writer.add_file_type(LlamaFileType.ALL_F32)


def decoded(tensor: ReaderTensor) -> Iterator[np.ndarray]:
    """float32 blocks, in order"""
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    per_block = max(1, BLOCK_BYTES // (4 * int(tensor.shape[0])))
    for first in range(0, len(rows), per_block):
        yield dequantize(rows[first : first + per_block], tensor.tensor_type).astype(np.float32, copy=False)


def write_copy(source: Path, target: Path) -> None:
    reader = GGUFReader(source)
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    writer.data_alignment = reader.alignment
    copy_metadata(reader, writer)
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), int(np.prod(shape)) * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    out = writer.fout[0]
    writer.write_padding(out, out.tell())
    for tensor in reader.tensors:
        n_bytes = 0
        for block in decoded(tensor):
            out.write(block.tobytes())
            n_bytes += block.nbytes
        assert n_bytes == int(np.prod(tensor.shape)) * 4, tensor.name
        writer.write_padding(out, n_bytes)
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN.gguf")
    parser.add_argument("target", type=Path, metavar="OUT.gguf")
    args = parser.parse_args()
    partial = args.target.with_name(args.target.name + ".part")
    try:
        write_copy(args.source, partial)
        os.replace(partial, args.target)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{args.target}: {args.target.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
