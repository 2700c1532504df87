# A 4-layer GPT for two CPU cores: 1.5M tokens of `local` in about four minutes, to 2.07 bits per byte.
# Small steps, a long warmup and a rate that falls to zero: docs/log.md has what else was tried.
out_dir = "out/tiny"
dataset = "local"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
vocab_size = 8192

batch_size = 4
tokens_per_step = 4 * 256
max_steps = 1465  # 1.5M tokens
learning_rate = 2e-3
min_lr = 0.0
warmup_steps = 300
weight_decay = 0.1
beta2 = 0.99

eval_interval = 500
eval_tokens = 100_000
sample_interval = 500
checkpoint_interval = 100
