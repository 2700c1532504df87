# The fast counterpart of configs/70m.py: Qwen3's architecture with 40.0M parameters, Muon, a vocabulary of 16,384
# learnt from the corpus. Its 0.63B tokens are a fifth of the plain recipe's bytes and 1/7.6 of its FLOPs. At 5.8M
# parameters that was enough (docs/ablation/fast_vs_plain.md); at this size it has not been run. To make its data:
# python prepare.py configs/data/codeparrot.py --name=codeparrot_16k --tokenizer=train:16384
out_dir = "out/70m_fast"
dataset = "codeparrot_16k"

n_layer = 10
n_head = 8
n_embd = 512
block_size = 1024
vocab_size = 16_384
bias = False
swiglu = True
rms_norm = True
qk_norm = True
rope_theta = 10_000.0

batch_size = 32
tokens_per_step = 2**17
max_steps = 4840
optimizer = "muon"
learning_rate = 2e-3
embedding_rate = 2.0
min_lr = 0.0
warmup_steps = 100
decay = "linear"
weight_decay = 0.1
beta2 = 0.99
