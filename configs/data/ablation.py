# `local` with little held out, so that each run of runs/ablate.sh scores all of it: 14 packages, 0.6 MB, the largest a
# fifth. They are the same whatever the tokenizer: --tokenizer=train:16384 --name=ablation_16k makes another one.
name = "ablation_8k"
source = "local"
package_bytes = 2_000_000
tokenizer = "train:8192"
val_fraction = 0.05
seed = 1758  # found among 2,000 by these measures
