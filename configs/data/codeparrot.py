# CodeGPT-70M's corpus: 3.4B tokens of CodeParrot-clean, which CodeParrot cleaned and deduplicated. About 300M tokens
# are for validation. About 15 of 54 files (4 GB) are downloaded, tokenized and deleted one by one. The shards take
# 13.6 GB. Tokenizing takes 13 minutes on two cores at the 17 MB/s of docs/log.md, without the download.
name = "codeparrot"
source = "hub:codeparrot/codeparrot-clean"
tokenizer = "cl100k_base"
max_tokens = 3_400_000_000
val_files = "file-000000000054.json.gz"  # CodeParrot's validation file: 61,373 documents, about 150M tokens
val_fraction = 150 / 3250  # another 150M tokens, from repositories of the other files
exact_duplicates = False
