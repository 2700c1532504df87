# PolyCoder 2.7B: rotary positions, an output head that is not the embedding, 39B tokens in 12 languages. It scored a
# HumanEval pass@1 of 5.59%, after six weeks on 8 RTX 8000. Never run here.
out_dir = "out/polycoder_2b7"
dataset = "polycoder"

n_layer = 32
n_head = 32
n_embd = 2560
block_size = 2048
vocab_size = 50_304  # 50,257 ids, padded to a multiple of 128
rope_theta = 10_000.0
tied = False

batch_size = 4
tokens_per_step = 2**18
max_steps = 150_000
learning_rate = 1.6e-4
min_lr = 1.6e-5
warmup_steps = 1600
weight_decay = 0.0
