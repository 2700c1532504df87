"""A training run: how it starts, what it saves, how it continues.

`out/NAME/` holds `last.pt`, `previous.pt` (the checkpoint before it, used when `last.pt` is damaged) and `best.pt`
(only the weights, at the lowest validation loss). weights/checkpoint.py writes and reads them.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.shards import Shards, open_shards, tokenizer_file
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from runtime.device import keep_freed_memory, resolve_device, resolve_dtype, set_rng_state, warn_if_slow
from runtime.errors import UserError
from training.distributed import own_device
from training.recipe import Recipe, make_optimizers
from weights.checkpoint import build_model, open_run, read_newest, save


@dataclass(frozen=True)
class RunConfig(Recipe):
    dataset: str = "local"  # shards to train on: a folder under data/shards, or a path
    out_dir: str = "out/run"  # where checkpoints and metrics go; a run found there is continued
    init_from: str | None = None  # fine-tune: start from the weights of this run, a folder or a .pt file
    batch_size: int | None = 16  # sequences per micro-step; None finds as many as fit in memory
    seed: int = 1337  # seed of the initial weights, dropout and the order of the data
    device: str | None = None  # cuda, mps or cpu; None takes the best available
    dtype: str | None = None  # float32, bfloat16 or float16 for matrix products; None takes the device's fast one
    chunked_loss: bool = True  # compute logits and loss in chunks of rows, to save memory; False: all logits at once
    compile: bool = True  # torch.compile the model; if that fails, warn and train without it
    verify: bool = False  # compare the shards' checksums before starting

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; it must be 0 or more, and below 2**63")
        micro_tokens = (self.batch_size or 1) * self.block_size
        if self.tokens_per_step % micro_tokens:
            nearest = max(1, round(self.tokens_per_step / micro_tokens)) * micro_tokens
            raise UserError(
                f"tokens_per_step is {self.tokens_per_step}, not a multiple of batch_size x block_size, "
                f"{micro_tokens}; set --tokens_per_step={nearest}, or another --batch_size"
            )


@dataclass
class Run:
    """A training run in progress."""

    config: RunConfig
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    tokenizer: Tokenizer
    data_fingerprint: str  # the shards' Shards.fingerprint()
    device: torch.device
    dtype: torch.dtype
    step: int = 0  # optimizer steps taken
    best_val_loss: float = math.inf
    wandb_id: str | None = None

    @property
    def tokens(self) -> int:
        return self.config.tokens_before(self.step)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def open_dataset(config: RunConfig) -> Shards:
    """The shards to train on. Raises UserError if they are damaged or their vocabulary does not fit the model's."""
    shards = open_shards(config.dataset)
    if config.verify:
        shards.verify()
    if not shards.vocab_size <= config.vocab_size < shards.vocab_size + 128:
        raise UserError(
            f"{shards.path}/meta.json: vocab_size is {shards.vocab_size}, the model has {config.vocab_size}; "
            f"set --vocab_size={-(-shards.vocab_size // 128) * 128}, or prepare the data with another --tokenizer"
        )
    end = Tokenizer.from_json(shards.tokenizer_text(), str(tokenizer_file(shards.path))).end_of_text
    if config.document_end not in (None, end):
        raise UserError(
            f"document_end is {config.document_end}, but documents of {shards.path} end with {end}; "
            f"set --document_end={end}"
        )
    return shards


def start_run(config: RunConfig, shards: Shards) -> Run:
    """The run in `out_dir`, as its newest checkpoint saved it, or a new run.

    Raises UserError if that run, or the one that `init_from` names, does not match `config`.
    """
    device = own_device(resolve_device(config.device))
    payload = read_newest(Path(config.out_dir), set_aside=True)
    shape = (config.batch_size or 1) * config.block_size, config.n_embd
    dtype = resolve_dtype(config.dtype, device, *shape, began_in=payload.get("dtype") if payload else None)
    warn_if_slow(dtype, device, *shape)
    if device.type == "cpu":
        keep_freed_memory()
    tokenizer = Tokenizer.from_json(shards.tokenizer_text(), str(tokenizer_file(shards.path)))
    torch.manual_seed(config.seed)
    if payload is not None:
        require_continuation(config, payload, shards.fingerprint())
        model = build_model(config, payload["model"], device)
    elif config.init_from is not None:
        model = fine_tuned(config, tokenizer, shards.path, device)
    else:
        model = GPT(config).to(device)
    model.chunked_loss = config.chunked_loss
    optimizers = make_optimizers(model, config, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run = Run(config, model, optimizers, scaler, tokenizer, shards.fingerprint(), device, dtype)
    if payload is not None:
        restore_run(run, payload)
    return run


def fine_tuned(config: RunConfig, tokenizer: Tokenizer, shards_path: Path, device: torch.device) -> GPT:
    """The model of the run `init_from`. Raises UserError if its shapes or its tokenizer differ from this run's."""
    source_tokenizer, payload = open_run(config.init_from, verify=True)
    where = f"--init_from={config.init_from}"
    require_same(config, payload["model_config"], where, "set those values here")
    if source_tokenizer.sha256 != tokenizer.sha256:
        raise UserError(
            f"{where}: trained with another tokenizer than that of {shards_path}; prepare the data with "
            "--tokenizer=PATH of the bpe.json beside the shards of that run"
        )
    return build_model(config, payload["model"], device)


def require_finite(result: tuple[torch.Tensor, torch.Tensor], run: Run) -> tuple[float, float]:
    """The loss and the gradient norm as numbers. Raises UserError if one of them is not finite, except a norm in fp16:
    the scaler skips that step."""
    loss, grad_norm = (value.item() for value in result)
    if not math.isfinite(loss) or not (math.isfinite(grad_norm) or run.scaler.is_enabled()):
        raise UserError(
            f"step {run.step}: loss is {loss}, gradient norm {grad_norm}; continue from the last checkpoint in "
            f"{run.config.out_dir} with a lower --learning_rate or --dtype=float32"
        )
    return loss, grad_norm


def save_run(run: Run, rng: dict[str, torch.Tensor]) -> None:
    """Save to `last.pt` everything that `start_run` needs to continue exactly, and rename the file it replaces to
    `previous.pt`. `rng` is the `rng_state` to continue with. Raises UserError if a weight is not finite."""
    out_dir = Path(run.config.out_dir)
    if not all(parameter.isfinite().all() for parameter in run.model.parameters()):
        raise UserError(
            f"step {run.step}: a weight is not finite, so nothing is saved; continue from the last checkpoint in "
            f"{out_dir} with a lower --learning_rate or --dtype=float32"
        )
    payload = {
        **_weights(run),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "scaler": run.scaler.state_dict(),
        "rng": rng,
        "wandb_id": run.wandb_id,
        "data_fingerprint": run.data_fingerprint,
    }
    save(out_dir / "last.pt", payload, keep=out_dir / "previous.pt")


def keep_best(run: Run, val_loss: float) -> None:
    """Save the weights as `best.pt` if `val_loss` is the lowest of the run so far."""
    if val_loss < run.best_val_loss:
        run.best_val_loss = val_loss
        save(Path(run.config.out_dir) / "best.pt", _weights(run))


def _weights(run: Run) -> dict[str, Any]:
    return {
        "model": run.model.state_dict(),
        "model_config": {field.name: getattr(run.config, field.name) for field in dataclasses.fields(GPTConfig)},
        "tokenizer": run.tokenizer.to_json(),
        "tokenizer_sha256": run.tokenizer.sha256,
        "config": dataclasses.asdict(run.config),
        "dtype": run.dtype_name,
        "step": run.step,
        "tokens": run.tokens,
        "best_val_loss": run.best_val_loss,
    }


def require_continuation(config: RunConfig, payload: dict[str, Any], data_fingerprint: str) -> None:
    """Check that a run with `config` can continue from `payload`, the newest checkpoint in its `out_dir`: same shapes,
    same data in the same order, same optimizer. Raises UserError naming what differs."""
    if "optimizers" not in payload:
        raise UserError(f"{config.out_dir}/last.pt: only weights, as in best.pt; start a new run with --init_from")
    kept = ("seed", "tokens_per_step", "ramp_doublings", "ramp_steps", "optimizer")
    fixed = {**payload["model_config"], **{key: payload["config"][key] for key in kept}}
    require_same(config, fixed, config.out_dir, "set those values to continue it, or start another run with --out_dir")
    if payload["data_fingerprint"] != data_fingerprint:
        raise UserError(
            f"{config.out_dir}: began on dataset {payload['config']['dataset']!r}, and the content of "
            f"{config.dataset!r} differs from it; restore it, or start another run with --out_dir"
        )
    if payload["step"] > config.max_steps:
        raise UserError(f"{config.out_dir}: at step {payload['step']}, beyond --max_steps={config.max_steps}; raise it")


def restore_run(run: Run, payload: dict[str, Any]) -> None:
    """Restore all of `run` but the model from the checkpoint `payload`: optimizers, scaler, step, random state."""
    for optimizer, saved in zip(run.optimizers, payload["optimizers"], strict=True):
        groups = optimizer.state_dict()["param_groups"]  # the weight decay and betas of the current config
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    if payload["scaler"]:  # empty if it was saved by a run in another dtype
        run.scaler.load_state_dict(payload["scaler"])
    run.step, run.best_val_loss, run.wandb_id = (payload[key] for key in ("step", "best_val_loss", "wandb_id"))
    set_rng_state(payload["rng"], run.device)


def require_same(config: GPTConfig, fixed: dict[str, Any], where: str, remedy: str) -> None:
    """Raise UserError naming the settings of `config` that differ from `fixed` and that weights depend on."""
    free = ("dropout", "zero_init", "document_end")
    different = {key: value for key, value in fixed.items() if getattr(config, key) != value and key not in free}
    if different:
        values = ", ".join(f"{key} is {value} there, {getattr(config, key)} here" for key, value in different.items())
        raise UserError(f"{where}: {values}; {remedy}")
