# CodeGPT-70M's corpus: 3.4B tokens of CodeParrot-clean, about 300M of them for validation, by repository.
# Download the first 20 of its 54 files (about 5 GB) first, with the command in the README; shards take 13.6 GB.
name = "codeparrot"
source = "files:data/raw/codeparrot-clean/*.json.gz"
tokenizer = "cl100k_base"
max_tokens = 3_400_000_000
val_fraction = 300 / 3400
