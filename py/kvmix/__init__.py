"""kvmix: run GGUF models with low-bit, separately typed key and value caches.

>>> model = kvmix.Model("model.gguf")
>>> session = model.session(n_ctx=8192, kv="k4v3")
>>> for piece in session.chat([{"role": "user", "content": "Hi"}]):
...     print(piece, end="")

Names are loaded on first use, so that tools which need no engine do not load it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._model import Model, ModelInfo, TokenAttr
    from ._session import LayerKV, Memory, Row, Sampling, Session, SessionOptions, Stats
    from .errors import (
        ArgumentError,
        Cancelled,
        ContextFull,
        DeviceError,
        FormatError,
        KvmixError,
        ModelIOError,
        OutOfMemory,
        StateError,
        Unsupported,
    )

__all__ = [
    "ArgumentError",
    "Cancelled",
    "ContextFull",
    "DeviceError",
    "FormatError",
    "KvmixError",
    "LayerKV",
    "Memory",
    "Model",
    "ModelIOError",
    "ModelInfo",
    "OutOfMemory",
    "Row",
    "Sampling",
    "Session",
    "SessionOptions",
    "StateError",
    "Stats",
    "TokenAttr",
    "Unsupported",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        for home in ("kvmix.errors", "kvmix._session", "kvmix._model"):
            module = import_module(home)
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'kvmix' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
