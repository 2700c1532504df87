# PolyCoder's recipe for the checkouts in data/raw/repositories, one folder per repository: 12 languages, files of at
# most 1 MB and at least 100 tokens, no exact duplicates.
name = "polycoder"
source = "dir:data/raw/repositories"
languages = "C,C#,C++,Go,Java,JavaScript,PHP,Python,Ruby,Rust,Scala,TypeScript"
max_document_bytes = 1_000_000
filters = "polycoder"
min_tokens = 100
tokenizer = "train:50257"
tokenizer_sample_bytes = 2**28
