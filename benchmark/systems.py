"""What bench.py times, each behind the same calls: this project, nanoGPT, and Hugging Face's GPT-2.

`train`, `evaluate` and `load` return tokens a second, `decode` seconds, all work on the device included. The first call
of each compiles and allocates, so it is made once unheeded. Training and decoding run on random ids: their speed does
not depend on what the ids are.
"""

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from data.shards import tokenizer_file, write_shard
from data.tokenizer import END_OF_TEXT, Tokenizer
from dataloader import Loader
from evaluation.likelihood import evaluate_loss
from inference.generate import generate_tokens
from inference.optimize import optimize
from inference.sampling import Sampling, choose_token
from model import GPT
from runtime.device import autocast, peak_flops, peak_memory_bytes, resolve_device, resolve_dtype
from runtime.files import write_json
from training.recipe import learning_rate
from training.run import RunConfig, compile_model, open_dataset, start_run


class Decoding(NamedTuple):
    """What all systems decode alike, `sampling.max_new_tokens` aside."""

    prompt: int  # tokens read first
    dtype: torch.dtype  # of the matrix products
    sampling: Sampling = Sampling(top_k=200, top_p=None)
    quantize: str | None = None  # ours alone: float16 or int8

    @property
    def bytes_per_weight(self) -> int:
        return {None: self.dtype.itemsize, "float16": 2, "int8": 1}[self.quantize]


class System:
    """What the systems have in common."""

    def __init__(self, config: RunConfig, decoding: Decoding):
        self.config, self.decoding = config, decoding
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        torch.manual_seed(config.seed)

    def random_ids(self, *shape: int) -> torch.Tensor:
        return torch.randint(self.config.vocab_size, shape)

    def prompts(self, batch: int) -> torch.Tensor:
        """(batch, T) on the device."""
        return self.random_ids(batch, self.decoding.prompt).to(self.device)

    def reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int | None:
        """Bytes, of this process."""
        return peak_memory_bytes(self.device)


class Ours(System):
    """This project, through the functions that it trains, evaluates, loads and decodes with."""

    def __init__(self, config: RunConfig, decoding: Decoding, train_step: Callable[..., Any]):
        super().__init__(config, decoding)
        self.train_step = train_step
        shards = open_dataset(config)
        self.val = shards.split("val")
        sequences = config.tokens_per_step // config.block_size
        loaded = max(sequences, 2**19 // config.block_size)  # a step of the 70M's recipe, however small a micro-step
        self.loader = Loader(shards.split("train"), config.block_size, loaded, config.seed)
        self.run = start_run(config, shards)
        rows = self.random_ids(sequences, config.block_size + 1)  # (B, T + 1)
        self.batch = rows[:, :-1].int().to(self.device), rows[:, 1:].int().to(self.device)  # as the prefetcher's
        self.decoders: dict[int, GPT] = {}  # by rows
        self.compiled = not config.compile

    def facts(self) -> dict[str, Any]:
        """The machine, and what rates are computed from. `weight_bytes` are those read to decode a token: all but the
        tables of which it takes a row."""
        model = self.run.model
        looked_up = [table for table in (model.wpe, None if self.config.tied else model.wte) if table is not None]
        n_read = model.n_parameters() - sum(table.weight.numel() for table in looked_up)
        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else self.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "parameters": model.n_parameters(),
            "flops_per_token": model.flops_per_token(),
            "peak_flops": peak_flops(self.device),
            "weight_bytes": n_read * self.decoding.bytes_per_weight,
        }

    def train(self, steps: int) -> float:
        self._compile()
        lr = learning_rate(0, self.config)

        def work() -> None:
            for _ in range(steps):
                self.train_step(self.run, self.batch, lr)

        return steps * self.config.tokens_per_step / seconds(self.device, work)

    def evaluate(self, n_batches: int) -> float:
        self._compile()
        config, scored = self.config, {}
        limits = {"batch_size": config.batch_size, "max_tokens": n_batches * config.batch_size * config.block_size}

        def work() -> None:
            scored.update(evaluate_loss(self.run.model, self.val, self.run.tokenizer, dtype=self.dtype, **limits))

        elapsed_s = seconds(self.device, work)
        return scored["tokens"] / elapsed_s

    def load(self, steps: int) -> float:
        def work() -> None:
            for step in range(steps):
                self.loader.batch(step)

        return steps * self.loader.sequences_per_step * self.config.block_size / seconds(self.device, work)

    def decode(self, batch: int, n_tokens: int) -> float:
        if batch not in self.decoders:
            self.decoders = {batch: GPT(self.config).to(self.device, self.decoding.dtype).eval()}
            optimize(self.decoders[batch], batch, self.decoding.quantize)
        tokens = self.prompts(1)
        return seconds(self.device, lambda: decode(self.decoders[batch], tokens, batch, n_tokens, self.decoding))

    def profile(self, steps: int, trace: str) -> list[dict[str, Any]]:
        """The ten operations that take most of a training step by themselves (on a GPU: kernels); writes a Chrome
        trace of `steps` steps to `trace`."""
        cuda = self.device.type == "cuda"
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
        self.train(1)
        with torch.profiler.profile(activities=activities) as profiler:
            self.train(steps)
        profiler.export_chrome_trace(trace)
        spent_us, calls = {}, {}
        for event in profiler.key_averages():
            on_device = event.device_type != torch.autograd.DeviceType.CPU
            if on_device == cuda and not getattr(event, "is_user_annotation", False):
                spent_us[event.key] = event.self_device_time_total if cuda else event.self_cpu_time_total
                calls[event.key] = event.count
        total_us = sum(spent_us.values()) or 1
        costliest = sorted(spent_us, key=spent_us.__getitem__, reverse=True)[:10]
        return [
            {
                "operation": name,
                "ms_per_step": spent_us[name] / 1000 / steps,
                "percent": 100 * spent_us[name] / total_us,
                "calls_per_step": calls[name] / steps,
            }
            for name in costliest
        ]

    def is_compiled(self) -> bool:
        """False before the first step too, and where the compiler failed."""
        return self.run.model.compiled_trunk is not None or "forward" in vars(self.run.model)

    def _compile(self) -> None:
        if not self.compiled:
            compile_model(self.run, Path(self.config.out_dir) / "compile_cache")
            self.compiled = True


class NanoGPT(System):
    """nanoGPT from a checkout: its model, optimizer and generate, and the step, the evaluation and the settings of its
    train.py. On a CPU that one would train in fp32; here it has the same dtype as ours."""

    def __init__(self, config: RunConfig, decoding: Decoding, peer: str):
        super().__init__(config, decoding)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as its scripts do
        module = import_file(Path(peer) / "model.py", "peer_model")
        names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
        self.plain = module.GPT(module.GPTConfig(**{name: getattr(config, name) for name in names})).to(self.device)
        betas = config.beta1, config.beta2
        self.optimizer = self.plain.configure_optimizers(
            config.weight_decay, config.learning_rate, betas, self.device.type
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.model = torch.compile(self.plain) if config.compile else self.plain
        self.micro_steps = config.tokens_per_step // (config.batch_size * config.block_size)
        rows = self.random_ids(config.batch_size, config.block_size + 1)  # (B, T + 1)
        self.rows = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def batch(self) -> list[torch.Tensor]:
        """Inputs and targets, sent to the device as its get_batch does."""
        if self.device.type != "cuda":
            return [rows.to(self.device) for rows in self.rows]
        return [rows.pin_memory().to(self.device, non_blocking=True) for rows in self.rows]

    def train(self, steps: int) -> float:
        self.model.train()

        def work() -> None:
            for _ in range(steps):
                self._step()

        return steps * self.config.tokens_per_step / seconds(self.device, work)

    def evaluate(self, n_batches: int) -> float:
        self.model.eval()

        @torch.no_grad()
        def work() -> None:
            for _ in range(n_batches):
                inputs, targets = self.batch()
                with autocast(self.device, self.dtype):
                    _, loss = self.model(inputs, targets)
                loss.item()

        return n_batches * self.rows[0].numel() / seconds(self.device, work)

    def decode(self, batch: int, n_tokens: int) -> float:
        self.plain.eval()
        tokens, decoding = self.prompts(batch), self.decoding

        def work() -> None:
            with torch.no_grad(), autocast(self.device, decoding.dtype):
                self.plain.generate(
                    tokens, n_tokens, temperature=decoding.sampling.temperature, top_k=decoding.sampling.top_k
                )

        return seconds(self.device, work)

    def _step(self) -> None:
        for _ in range(self.micro_steps):
            inputs, targets = self.batch()
            with autocast(self.device, self.dtype):
                _, loss = self.model(inputs, targets)
            self.scaler.scale(loss / self.micro_steps).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


class HuggingFace(System):
    """The GPT-2 of transformers, decoding with its cache."""

    def __init__(self, config: RunConfig, decoding: Decoding):
        super().__init__(config, decoding)
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
        sizes |= {"n_positions": config.block_size, "vocab_size": config.vocab_size}
        endless = {"bos_token_id": None, "eos_token_id": None}  # or a random end-of-text would end it sooner
        self.model = GPT2LMHeadModel(GPT2Config(**sizes, **endless)).to(self.device, decoding.dtype).eval()

    def decode(self, batch: int, n_tokens: int) -> float:
        tokens, decoding = self.prompts(batch), self.decoding
        draw = {"do_sample": True, "temperature": decoding.sampling.temperature, "top_k": decoding.sampling.top_k}
        mask = torch.ones_like(tokens)

        def work() -> None:
            out = self.model.generate(tokens, attention_mask=mask, max_new_tokens=n_tokens, pad_token_id=0, **draw)
            assert out.size(1) == tokens.size(1) + n_tokens, "it stopped early"

        return seconds(self.device, work)


SYSTEMS = {"codegpt": Ours, "nanoGPT": NanoGPT, "transformers": HuggingFace}


def decode(model: GPT, tokens: torch.Tensor, n_samples: int, n_tokens: int, decoding: Decoding) -> None:
    """Decode `n_tokens` of `n_samples` rows after tokens (1, T): the one place here that knows our decoder."""
    generator = torch.Generator(tokens.device).manual_seed(0)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        return choose_token(logits, decoding.sampling, generator)

    steps = generate_tokens(model, tokens, choose, n_samples)
    for _ in range(n_tokens):
        next(steps)


def seconds(device: torch.device, work: Callable[[], None]) -> float:
    """How long `work()` takes, s, until the device has done all of it."""
    synchronize(device)
    t0 = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - t0


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def import_file(path: Path, name: str) -> ModuleType:
    """The module in the file `path`, under another name, so that it meets no file of ours."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def write_random_shards(folder: Path, vocab_size: int, n_train: int, n_val: int) -> None:
    """Shards of random ids in a new folder, `n_train` and `n_val` tokens, with a tokenizer of `vocab_size` ids that
    stand for a byte, or three. Nothing is to be learned from them but speed."""
    folder.mkdir(parents=True)
    names = [i.to_bytes(1 if i < 256 else 3, "big") for i in range(vocab_size - 1)]
    ranks = {name: rank for rank, name in enumerate(names)}
    tokenizer = Tokenizer("random", r"(?s).", ranks, {END_OF_TEXT: vocab_size - 1})
    tokenizer.save(tokenizer_file(folder))
    chance, splits = np.random.default_rng(0), {}
    for split, n_tokens in (("train", n_train), ("val", n_val)):
        ids = chance.integers(0, vocab_size, n_tokens, dtype=np.uint32)
        splits[split] = {"shards": [write_shard(folder / f"{split}_000000.npy", [ids], n_tokens, vocab_size)]}
    meta = {"vocab_size": vocab_size, "tokenizer_sha256": tokenizer.sha256, "splits": splits}
    write_json(folder / "meta.json", meta)
