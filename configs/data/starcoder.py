# StarCoder's recipe for a sample of The Stack: licences, filters, decontamination, near duplicates (5-grams, Jaccard
# 0.7), redaction, metadata, fill-in-the-middle, notebooks. First accept The Stack's terms on its page and log in (hf
# auth login). docs/data.md has the commands that download the benchmark problems and install detect-secrets.
name = "starcoder"
source = "hub:bigcode/the-stack-smol"
licenses = "permissive"
filters = "starcoder"
decontaminate = "data/raw/problems/**/*.parquet"
near_threshold = 0.7
near_shingle = 5
redact = True
metadata_rate = 0.2
fim_rate = 0.5
spm_rate = 0.5
notebooks = True
tokenizer = "train:49152"
tokenizer_sample_bytes = 2**28
