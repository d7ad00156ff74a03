"""Opens an input with libkvmix, whose reader stands hostile files, before Python code reads it; and asks for sizes."""

from pathlib import Path

from kvmix import Memory, Model

from .recipe import Recipe


class CheckedModel:
    """A file that libkvmix can run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = Model(path)

    def memory(self, recipe: Recipe | str, n_ctx: int, window: int, sink: int) -> Memory:
        """What a chat with this cache would allocate."""
        text = recipe if isinstance(recipe, str) else recipe.text
        return self.model.plan(n_ctx, kv=text, window=window, sink=sink, n_seq_max=1)
