# StarCoder's treatment, of a sample of The Stack: licences, filters, decontamination, near duplicates by 5-grams at
# Jaccard 0.7, redaction, metadata, fill-in-the-middle, notebooks. Accept The Stack's terms on its page and log in first
# (hf auth login); get the problems to keep out, and detect-secrets, with the commands in the README.
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
