# CodeGPT-70M's corpus: 3.4B tokens of CodeParrot-clean, about 300M of them for validation. The corpus was cleaned and
# deduplicated by CodeParrot. Its files are downloaded, tokenized and deleted one after the other, about 15 of 54, 4 GB;
# shards take 13.6 GB. Tokenizing takes 13 minutes on two cores at the 17 MB/s of docs/log.md, the download aside.
name = "codeparrot"
source = "hub:codeparrot/codeparrot-clean"
tokenizer = "cl100k_base"
max_tokens = 3_400_000_000
val_files = "file-000000000054.json.gz"  # CodeParrot's validation file, 61,373 documents, about 150M tokens
val_fraction = 150 / 3250  # of the other files' repositories: the other 150M
exact_duplicates = False
