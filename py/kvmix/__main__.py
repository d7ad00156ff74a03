"""python -m kvmix: names the commands."""

print("""\
python -m kvmix.chat        talk to a model
python -m kvmix.perplexity  measure a model, and what a KV cache costs in quality
python -m kvmix.convert     what the weights say about keys and values; write a recipe into a model's file
python -m kvmix.bench       measure speed, as llama-bench does
Each lists its flags with --help.""")
