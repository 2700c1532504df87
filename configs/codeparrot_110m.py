# CodeParrot-small: GPT-2 with 110M parameters and a vocabulary of 32,768, on 29B tokens of CodeParrot-clean. It scored
# a HumanEval pass@1 of 3.80%, after a day on 16 A100. Never run here.
out_dir = "out/codeparrot_110m"
dataset = "codeparrot_v2"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 32_768
dropout = 0.1

batch_size = 12
tokens_per_step = 192 * 1024
max_steps = 150_000
learning_rate = 5e-4
min_lr = 0.0
warmup_steps = 2000
weight_decay = 0.1
