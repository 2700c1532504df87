# PolyCoder 160M: rotary positions, an output head that is not the embedding, 39B tokens in 12 languages. It scored a
# HumanEval pass@1 of 2.13%. Its learning rate is not published; this is GPT-3's for the size. Never run here.
out_dir = "out/polycoder_160m"
dataset = "polycoder"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 2048
vocab_size = 50_304  # 50,257 ids, padded to a multiple of 128
rope_theta = 10_000.0
tied = False

batch_size = 4
tokens_per_step = 2**18
max_steps = 150_000
learning_rate = 6e-4
min_lr = 6e-5
warmup_steps = 1600
weight_decay = 0.0
