# configs/70m.py at a size for two CPU cores: 5.8M parameters, 72% of them in the embedding (65% in the 70M), and the
# same learning rates, decay and dropout. runs/ablate.sh measures changes against it; docs/log.md has the results.
out_dir = "out/ablation/plain"
dataset = "ablation_32k"

n_layer = 8
n_head = 4
n_embd = 128
block_size = 256
vocab_size = 32_768
dropout = 0.1
bias = True

batch_size = 8
tokens_per_step = 2048
max_steps = 241  # 2 MB of text
learning_rate = 6e-4
min_lr = 6e-5
warmup_steps = 9  # the same share as 222 of 5,912
weight_decay = 0.01

eval_interval = 1_000_000
sample_interval = None
checkpoint_interval = 1_000_000
