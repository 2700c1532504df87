# The data of `local` with a small validation split, so that each run of runs/ablate.sh scores all of it: 14 packages,
# 0.6 MB, the largest a fifth. For another tokenizer on the same split: --tokenizer=train:16384 --name=ablation_16k.
name = "ablation_8k"
source = "local"
package_bytes = 2_000_000
tokenizer = "train:8192"
val_fraction = 0.05
seed = 1758  # chosen from 2,000 for that split
