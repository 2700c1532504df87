# CodeParrot's extended cleaning of its own corpus, and a tokenizer of its own: filters, near duplicates by words at
# Jaccard 0.85, a BPE of 32,768 ids. All 54 files, about 14 GB of downloads, one at a time.
name = "codeparrot_v2"
source = "hub:codeparrot/codeparrot-clean"
filters = "codeparrot_v2"
near_threshold = 0.85
near_shingle = 1
tokenizer = "train:32768"
tokenizer_sample_bytes = 2**30
val_files = "file-000000000054.json.gz"
val_fraction = 0.0
