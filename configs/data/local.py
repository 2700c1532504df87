# The Python on this machine: the standard library and every installed package, about 60-250 MB; needs no network.
# Takes about a minute on two cores. A BPE of 4,096 ids is learnt from the training text.
name = "local"
source = "local"
tokenizer = "train:4096"
val_fraction = 0.05
seed = 5  # by its hash validation gets pyarrow, protobuf, urllib3, asyncio and 20 smaller ones, no giant
