# configs/70m.py at a size for two CPU cores: 5.8M parameters, 72% of them the embedding (of the 70M 65%), with its
# rates, decay and dropout. runs/ablate.sh measures changes against it; docs/ablation.md has what it comes to.
out_dir = "out/ablation/plain"
dataset = "ablation_32k"

n_layer = 8
n_head = 4
n_embd = 128
block_size = 256
vocab_size = 32_768
dropout = 0.1
bias = True

batch_size = 4
tokens_per_step = 1024
max_steps = 1000
learning_rate = 6e-4
min_lr = 6e-5
warmup_steps = 38  # 222 of 5,912
weight_decay = 0.01

eval_interval = 250
sample_interval = None
checkpoint_interval = 1_000_000
