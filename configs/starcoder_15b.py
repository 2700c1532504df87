# StarCoderBase-15B: GPT-2's architecture with one head of keys and values, context 8192, about 1T tokens, half of the
# documents as fill-in-the-middle. It scored a HumanEval pass@1 of 30.4%. Never run here.
out_dir = "out/starcoder_15b"
dataset = "starcoder"

n_layer = 40
n_head = 48
n_kv_head = 1
n_embd = 6144
block_size = 8192
vocab_size = 49_152
dropout = 0.1

batch_size = 1
tokens_per_step = 512 * 8192
max_steps = 250_000
learning_rate = 3e-4
min_lr = 3e-5
warmup_steps = 2000
weight_decay = 0.1
beta2 = 0.95
