"""The systems that bench.py times, each behind the same calls: this project, nanoGPT, and the GPT-2 of transformers.

`train`, `evaluate`, `load` and `decode` return how many tokens they processed; `rate` times them. Training and decoding
use random ids, because their speed does not depend on the ids.
"""

import dataclasses
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from data.shards import tokenizer_file, write_shard
from data.tokenizer import END_OF_TEXT, Tokenizer
from dataloader import Loader
from evaluation.likelihood import evaluate_loss
from inference.batching import Batcher, Piece, Request, in_a_thread
from inference.generate import generate_tokens
from inference.optimize import optimize
from inference.sampling import Sampling, choose_token
from model import GPT
from runtime.device import DTYPES, autocast, peak_flops, peak_memory_bytes, resolve_device
from runtime.errors import UserError
from runtime.files import write_json
from training.compilation import compile_model
from training.recipe import learning_rate
from training.run import RunConfig, open_dataset, start_run

GPT2_SETTINGS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")  # that nanoGPT has
SAMPLING = Sampling(temperature=0.8, top_k=200, top_p=None)  # as in nanoGPT's sample.py
QUANTIZED_BYTES = {"float16": 2, "int8": 1}  # of a weight
SERVED_ROWS = 16  # completions that the server decodes at once
WARM_UP = 3  # steps, batches or tokens: after the prompt and two tokens more, a GPU has recorded its graph


class System:
    """What the systems share: the device, a step's batch of random ids, timing. `decode_dtype` is for decoding."""

    def __init__(self, config: RunConfig, decode_dtype: torch.dtype):
        self.config, self.decode_dtype = config, decode_dtype
        self.device = resolve_device(config.device)
        self.on_gpu = self.device.type == "cuda"
        self.warmed_up: set[tuple[Any, ...]] = set()  # methods, with all arguments but the last
        torch.set_float32_matmul_precision("highest")  # no system rounds fp32 to TF32, as nanoGPT's scripts would
        torch.manual_seed(config.seed)
        ids = self.random_ids(config.tokens_per_step // config.block_size, config.block_size + 1)  # (B, T + 1)
        self.inputs, self.targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def random_ids(self, rows: int, columns: int) -> torch.Tensor:
        return torch.randint(self.config.vocab_size, (rows, columns))

    def rate(self, method: str, *arguments: int) -> float:
        """Tokens per second of a method called with `arguments`, the last of which says how many steps, batches or
        tokens. The first time, a call that is not timed goes before: it compiles and allocates."""
        if (method, arguments[:-1]) not in self.warmed_up:
            getattr(self, method)(*arguments[:-1], WARM_UP)
            self.warmed_up.add((method, arguments[:-1]))
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        self.synchronize()
        t0 = time.perf_counter()
        n_tokens = getattr(self, method)(*arguments)
        self.synchronize()
        return n_tokens / (time.perf_counter() - t0)

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def peak_memory(self) -> int | None:
        """Bytes of this process: on CUDA what torch held in the last timed call, elsewhere the most ever resident."""
        return peak_memory_bytes(self.device)


class Ours(System):
    """This project, through the functions that it trains, evaluates, loads and decodes with."""

    def __init__(self, config: RunConfig, decode_dtype: torch.dtype, quantize: str | None, train_step: Callable):
        super().__init__(config, decode_dtype)
        self.quantize, self.train_step = quantize, train_step
        shards = open_dataset(config)
        self.val = shards.split("val")
        sequences = max(config.tokens_per_step, 2**19) // config.block_size  # at least a step of the 70M's recipe
        self.loader = Loader(shards.split("train"), config.block_size, sequences, config.seed)
        self.run = start_run(config, shards)
        self.batch = self.inputs.int().to(self.device), self.targets.int().to(self.device)  # int32, as the loader's
        self.decoders: dict[int, GPT] = {}  # the last one, by its number of rows
        if config.compile:
            compile_model(self.run)

    def facts(self) -> dict[str, Any]:
        """The machine, and what figures are computed from. `weight_bytes` is what decoding a token reads: all weights
        but the embeddings, of which it reads a row."""
        model = self.run.model
        embeddings = [table for table in (model.wpe, None if self.config.tied else model.wte) if table is not None]
        n_read = model.n_parameters() - sum(table.weight.numel() for table in embeddings)
        return {
            "device": torch.cuda.get_device_name(self.device) if self.on_gpu else self.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": self.run.dtype_name,
            "parameters": model.n_parameters(),
            "flops_per_token": model.flops_per_token(),
            "peak_flops": peak_flops(self.device),
            "weight_bytes": n_read * QUANTIZED_BYTES.get(self.quantize, self.decode_dtype.itemsize),
            "compiled": model.is_compiled,
        }

    def train(self, steps: int) -> int:
        for _ in range(steps):
            self.train_step(self.run, self.batch, learning_rate(0, self.config))
        return steps * self.config.tokens_per_step

    def evaluate(self, batches: int) -> int:
        run, batch_size = self.run, self.config.batch_size
        limits = {"batch_size": batch_size, "max_tokens": batches * batch_size * self.config.block_size}
        return evaluate_loss(run.model, self.val, run.tokenizer, dtype=run.dtype, **limits)["tokens"]

    def load(self, batches: int) -> int:
        return sum(self.loader.batch(step)[0].numel() for step in range(batches))

    def decode(self, rows: int, n_prompt: int, n_tokens: int) -> int:
        if rows not in self.decoders:
            self.decoders = {rows: GPT(self.config).to(self.device, self.decode_dtype).eval()}
            optimize(self.decoders[rows], rows, self.quantize)
        generator = torch.Generator(self.device).manual_seed(0)
        prompt = self.random_ids(1, n_prompt).to(self.device)
        choose = partial(choose_token, sampling=SAMPLING, generator=generator)
        tokens = generate_tokens(self.decoders[rows], prompt, choose, rows)
        return sum(len(next(tokens)) for _ in range(n_tokens))

    def profile(self, steps: int, trace: str) -> list[dict[str, Any]]:
        """The ten operations (on a GPU: kernels) on which a training step itself spends most time. Writes a Chrome
        trace of `steps` steps to `trace`."""
        self.train(1)
        with torch.profiler.profile() as profiler:
            self.train(steps)
        profiler.export_chrome_trace(trace)
        operations = []
        for event in profiler.key_averages():
            on_gpu = event.device_type != torch.autograd.DeviceType.CPU
            if on_gpu == self.on_gpu and not getattr(event, "is_user_annotation", False):
                time_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                operations.append((time_us / 1000 / steps, event.count / steps, event.key))
        total_ms = sum(ms for ms, _, _ in operations)
        return [
            {"operation": name, "ms_per_step": ms, "percent": 100 * ms / total_ms, "calls_per_step": calls}
            for ms, calls, name in sorted(operations, reverse=True)[:10]
        ]


class Served(System):
    """This project, decoding as serve.py does. In a process of its own, where nothing else has used OpenMP."""

    def __init__(self, config: RunConfig, decode_dtype: torch.dtype, quantize: str | None):
        super().__init__(config, decode_dtype)
        shards = open_dataset(config)
        tokenizer = Tokenizer.from_json(shards.tokenizer_text(), str(tokenizer_file(shards.path)))

        def ready() -> GPT:
            model = GPT(config).to(self.device, decode_dtype).eval()
            if not self.on_gpu:
                optimize(model, 1, quantize)
            return model

        self.batcher = Batcher(in_a_thread(ready), tokenizer, SERVED_ROWS)

    def serve(self, streams: int, n_prompt: int, n_tokens: int) -> int:
        """Decode that many requests at once as serve.py does."""
        prompts = self.random_ids(streams, n_prompt).tolist()
        return self._served([(prompt, n_tokens) for prompt in prompts])

    def first_token_s(self, n_prompt: int, n_known: int) -> float:
        """Seconds to the first token of a prompt whose first `n_known` tokens the server has just seen."""
        prompt, other = self.random_ids(2, n_prompt).tolist()
        if n_known:
            self._served([(prompt, 1)])
        t0 = time.perf_counter()
        self._served([(prompt[:n_known] + other[n_known:], 1)])
        return time.perf_counter() - t0

    def _served(self, asked: Sequence[tuple[list[int], int]]) -> int:
        """Decode prompts, with the number of tokens to draw of each, through the server's batch."""
        ended: SimpleQueue[Piece] = SimpleQueue()
        for seed, (prompt, n_tokens) in enumerate(asked):
            sampling = dataclasses.replace(SAMPLING, max_new_tokens=n_tokens, seed=seed)
            self.batcher.submit(Request(prompt, sampling, ended.put))
        n_drawn = 0
        for _ in asked:
            while not (piece := ended.get()).finish:
                n_drawn += piece.n_tokens
            n_drawn += piece.n_tokens
        return n_drawn


class NanoGPT(System):
    """nanoGPT from a checkout: its model, optimizer and generate, and the step and the evaluation of its train.py. That
    one uses fp32 on a CPU; here it has our dtype."""

    def __init__(self, config: RunConfig, decode_dtype: torch.dtype, checkout: str):
        super().__init__(config, decode_dtype)
        spec = importlib.util.spec_from_file_location("peer_model", Path(checkout) / "model.py")  # `model` is ours
        module = sys.modules["peer_model"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        settings = {name: getattr(config, name) for name in GPT2_SETTINGS}
        self.plain = module.GPT(module.GPTConfig(**settings)).to(self.device)
        self.model = torch.compile(self.plain) if config.compile else self.plain
        recipe = config.weight_decay, config.learning_rate, (config.beta1, config.beta2)
        self.optimizer = self.plain.configure_optimizers(*recipe, self.device.type)
        self.dtype = DTYPES[config.dtype]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        halves = self.inputs.split(config.batch_size), self.targets.split(config.batch_size)
        self.micro_batches = list(zip(*halves, strict=True))

    def train(self, steps: int) -> int:
        self.model.train()
        for _ in range(steps):
            for micro_batch in self.micro_batches:
                self.scaler.scale(self.loss(micro_batch) / len(self.micro_batches)).backward()
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        return steps * self.config.tokens_per_step

    @torch.no_grad()
    def evaluate(self, batches: int) -> int:
        self.model.eval()
        for _ in range(batches):
            self.loss(self.micro_batches[0]).item()
        return batches * self.micro_batches[0][0].numel()

    def loss(self, micro_batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The loss of inputs and targets, which are sent to the device as its get_batch does."""
        halves = [half.pin_memory() if self.on_gpu else half for half in micro_batch]
        with autocast(self.device, self.dtype):
            return self.model(*(half.to(self.device, non_blocking=self.on_gpu) for half in halves))[1]

    @torch.no_grad()
    def decode(self, rows: int, n_prompt: int, n_tokens: int) -> int:
        self.plain.eval()
        prompts = self.random_ids(rows, n_prompt).to(self.device)  # (B, T)
        with autocast(self.device, self.decode_dtype):
            self.plain.generate(prompts, n_tokens, temperature=SAMPLING.temperature, top_k=SAMPLING.top_k)
        return rows * n_tokens


class HuggingFace(System):
    """The GPT-2 of transformers, decoding with its cache."""

    def __init__(self, config: RunConfig, decode_dtype: torch.dtype):
        super().__init__(config, decode_dtype)
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
        endless = {"bos_token_id": None, "eos_token_id": None}  # or a random end-of-text would end it sooner
        model = GPT2LMHeadModel(GPT2Config(n_positions=config.block_size, **sizes, **endless))
        self.model = model.to(self.device, decode_dtype).eval()

    def decode(self, rows: int, n_prompt: int, n_tokens: int) -> int:
        prompts = self.random_ids(rows, n_prompt).to(self.device)
        settings = {"do_sample": True, "temperature": SAMPLING.temperature, "top_k": SAMPLING.top_k, "pad_token_id": 0}
        mask = torch.ones_like(prompts)
        out = self.model.generate(prompts, attention_mask=mask, max_new_tokens=n_tokens, **settings)
        assert out.size(1) == n_prompt + n_tokens, "it stopped early"
        return rows * n_tokens


def dataset_or_random(config: RunConfig, folder: Path) -> str:
    """The dataset if it has shards that fit the model, else the new `folder`, with shards of random ids in it."""
    try:
        open_dataset(config)
        return config.dataset
    except UserError as error:
        print(f"random ids replace dataset {config.dataset}: {error}")
    n_tokens = max(2**22, 16 * config.tokens_per_step + 1)
    write_random_shards(folder, config.vocab_size, n_tokens, n_tokens)
    return str(folder)


def write_random_shards(folder: Path, vocab_size: int, n_train: int, n_val: int) -> None:
    """Write shards of random ids, `n_train` and `n_val` tokens, to a new folder; and a tokenizer of `vocab_size` ids
    which each stand for one byte or three."""
    folder.mkdir(parents=True)
    ranks = {i.to_bytes(1 if i < 256 else 3, "big"): i for i in range(vocab_size - 1)}
    tokenizer = Tokenizer("random", r"(?s).", ranks, {END_OF_TEXT: vocab_size - 1})
    tokenizer.save(tokenizer_file(folder))
    rng, splits = np.random.default_rng(0), {}
    for split, n_tokens in (("train", n_train), ("val", n_val)):
        ids = rng.integers(0, vocab_size, n_tokens, dtype=np.uint32)
        splits[split] = {"shards": [write_shard(folder / f"{split}_000000.npy", [ids], n_tokens, vocab_size)]}
    meta = {"vocab_size": vocab_size, "tokenizer_sha256": tokenizer.sha256, "splits": splits}
    write_json(folder / "meta.json", meta)
