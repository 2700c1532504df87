# CodeGPT-70M's published recipe, unchanged: 69,560,064 parameters on 3.1B tokens of CodeParrot-clean, one A100.
# It ended at a validation perplexity of 7.48 (2.012 nats per token, about 0.74 bits per byte). Not yet run here.
out_dir = "out/70m"
dataset = "codeparrot"

n_layer = 10
n_head = 8
n_embd = 448
block_size = 1024
vocab_size = 100_352  # cl100k_base's 100,277 ids, padded to a multiple of 128
dropout = 0.1
bias = True

batch_size = 16
tokens_per_step = 2**19  # 32 micro-steps
max_steps = 5912
learning_rate = 6e-4
min_lr = 6e-5
warmup_steps = 222
weight_decay = 0.01
