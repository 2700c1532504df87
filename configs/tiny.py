# A 4-layer GPT for two CPU cores: 1.5M tokens of `local` in about two minutes, to about 2.0 bits per byte.
out_dir = "out/tiny"
dataset = "local"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
vocab_size = 4096

batch_size = 16
tokens_per_step = 16 * 256
max_steps = 366  # 1.5M tokens
learning_rate = 2e-3
min_lr = 0.0
warmup_steps = 30
weight_decay = 0.1
beta2 = 0.95

eval_interval = 100
eval_tokens = 200_000
sample_interval = 100
checkpoint_interval = 100
