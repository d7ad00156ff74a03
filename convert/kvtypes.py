"""The engine's KV types as a solver sees them, bytes of a packed page and error; runtime/kvtype.h specifies them.

A page is 128 tokens of one KV head. Its bytes are those of kvm_page_layout_of, with a key balance frozen at the
sequence's first page (the default), which takes no room in the others.
"""

from dataclasses import dataclass

PAGE = 128
GROUP = 64  # values that share a scale
LINE = 64  # bytes


@dataclass(frozen=True)
class KvType:
    name: str
    bits: int
    planes: tuple[int, ...]  # widths that a code's bits are split into
    nmse: float  # of Gaussian keys, as kvtype.h measures it
    v_nmse: float  # of Gaussian values, after the best gain: a trellis code at 2 bits


TYPES = {
    t.name: t
    for t in (
        KvType("q2", 2, (2,), 0.1116, 0.0758),
        KvType("q3", 3, (2, 1), 0.0293, 0.0293),
        KvType("q4", 4, (4,), 0.0071, 0.0071),
        KvType("q5", 5, (4, 1), 0.0022, 0.0022),
        KvType("q6", 6, (4, 2), 0.00056, 0.00056),
        KvType("q8", 8, (8,), 0.000035, 0.000035),
        KvType("f16", 16, (), 0.0, 0.0),
    )
}


def page_bytes(name: str, d: int, *, is_k: bool) -> int:
    """One side of one head's page; d: channels of the head."""
    kind = TYPES[name]
    if kind.name == "f16":
        return 2 * PAGE * d
    n_tiles, reduced = (PAGE // 16, d) if is_k else (-(-d // 16), PAGE)
    codes = n_tiles * sum(LINE * -(-reduced // (32 // width)) for width in kind.planes)
    scales = 2 * PAGE * (d // GROUP if d % GROUP == 0 else 1)
    mean = 2 * d if is_k else 0
    return -(-(codes + scales + mean) // LINE) * LINE
