"""kvmix.convert: the recipe of a model's KV cache, computed from its weights and written into its file.

numpy; of kvmix itself the command line and the error classes, which load no engine. That comes in where validate.py
opens a GGUF file, for its reader stands hostile ones, and where measured.py and cache_norms.py run a model on a text.
How an allocation is found (solve.py, ladder.py, allocate.py, kvtypes.py, recipe.py) knows of no model and no engine.
"""
