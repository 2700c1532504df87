# The Python on this machine: the standard library and installed packages, about 60 MB; needs no network.
# Takes half a minute on two cores. A BPE of 8,192 ids is learnt from the training text.
name = "local"
source = "local"
package_bytes = 2_000_000  # without a limit, torch, sympy and the tests of pandas make up two thirds of it
tokenizer = "train:8192"
val_fraction = 0.05
seed = 41  # docs/log.md: validation gets 25 packages, no giant, and about as many bytes per token as training
