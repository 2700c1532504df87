# The Python on this machine: the standard library and installed packages, about 60 MB; needs no network.
# Takes half a minute on two cores. A BPE of 8,192 ids is learnt from the training text.
name = "local"
source = "local"
package_bytes = 2_000_000  # or torch, sympy and pandas' tests would be two thirds of it
tokenizer = "train:8192"
val_fraction = 0.05
seed = 41  # docs/log.md: puts 25 packages in validation, no giant, about as many bytes a token as training has
