# StarCoderBase-1B: GPT-2's architecture with one head of keys and values, context 8192, about 1T tokens, half of the
# documents as fill-in-the-middle. It scored a HumanEval pass@1 of 15.17%. Never run here.
out_dir = "out/starcoder_1b"
dataset = "starcoder"

n_layer = 24
n_head = 16
n_kv_head = 1
n_embd = 2048
block_size = 8192
vocab_size = 49_152
dropout = 0.1

batch_size = 1
tokens_per_step = 128 * 8192
max_steps = 1_000_000
learning_rate = 4e-4
min_lr = 4e-5
warmup_steps = 2000
weight_decay = 0.1
beta2 = 0.95
