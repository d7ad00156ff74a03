"""python -m kvmix: names the commands."""

print("""\
python -m kvmix.chat        talk to a model
python -m kvmix.perplexity  measure a model, and what a KV cache costs in quality
Each lists its flags with --help.""")
