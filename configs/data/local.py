# The Python on this machine: the standard library and every installed package, about 60-250 MB; needs no network.
# Takes about a minute on two cores. A BPE of 8,192 ids is learnt from the training text.
name = "local"
source = "local"
tokenizer = "train:8192"
val_fraction = 0.05
seed = 41  # see docs/log.md: puts 25 packages in validation, no giant, and as many bytes a token as training has
