# CodeParrot: GPT-2's architecture with 1.5B parameters, on 26B tokens of CodeParrot-clean and 16 A100. It scored a
# HumanEval pass@1 of 3.99%. Never run here.
out_dir = "out/codeparrot_1b5"
dataset = "codeparrot_v2"

n_layer = 48
n_head = 25
n_embd = 1600
block_size = 1024
vocab_size = 32_768
dropout = 0.1

batch_size = 2
tokens_per_step = 512 * 1024
max_steps = 50_000
learning_rate = 2e-4
min_lr = 0.0
warmup_steps = 750
weight_decay = 0.1
