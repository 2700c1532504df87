# CodeParrot-clean with CodeParrot's later cleaning: more filters, no near duplicates (sets of words, Jaccard 0.85), and
# a BPE of 32,768 ids learnt from it. All 54 files are downloaded one at a time, about 14 GB.
name = "codeparrot_v2"
source = "hub:codeparrot/codeparrot-clean"
filters = "codeparrot_v2"
near_threshold = 0.85
near_shingle = 1
tokenizer = "train:32768"
tokenizer_sample_bytes = 2**30
val_files = "file-000000000054.json.gz"
val_fraction = 0.0
