"""A run and its checkpoints: written whole or not at all, read without executing anything in them.

`out/NAME/` holds `last.pt`, `previous.pt` (the one before it, used when `last.pt` is damaged) and `best.pt` (weights
alone, of the lowest validation loss). Each is a torch file of tensors and primitives, with the model's sizes and the
tokenizer's file in it, so that it is all one needs to sample.
"""

import dataclasses
import errno
import math
import os
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atomic import atomic_write
from errors import UserError
from model import GPT, GPTConfig
from recipe import Recipe
from tokenizer import Tokenizer

FORMAT = "codegpt checkpoint 2"


@dataclass
class Run:
    """A training run in progress. What `save_run` keeps of it is all that continuing exactly needs."""

    config: Recipe  # with out_dir, seed and more: train.py's TrainConfig
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    tokenizer: Tokenizer
    data_fingerprint: str  # of the shards it trains on
    device: torch.device
    dtype: torch.dtype
    step: int = 0  # optimizer steps taken
    best_val_loss: float = math.inf
    wandb_id: str | None = None

    @property
    def tokens(self) -> int:
        return self.config.tokens_before(self.step)


def save_run(run: Run, rng: dict[str, torch.Tensor]) -> None:
    """Save as `last.pt` all that `restore_run` needs; the file of that name becomes `previous.pt`. `rng` is the
    `rng_state` to continue with. Raises UserError, saving nothing, if a weight is not finite."""
    out_dir = Path(run.config.out_dir)
    if not all(parameter.isfinite().all() for parameter in run.model.parameters()):
        raise UserError(
            f"step {run.step}: a weight is not finite, so nothing is saved; the checkpoints in {out_dir} are from "
            "before: go on from there with a lower --learning_rate or --dtype=float32"
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
    """Save the weights as `best.pt` if no evaluation before gave so low a loss."""
    if val_loss < run.best_val_loss:
        run.best_val_loss = val_loss
        save(Path(run.config.out_dir) / "best.pt", _weights(run))


def require_continuation(config: Recipe, payload: dict[str, Any], data_fingerprint: str) -> None:
    """Raise UserError, naming what differs, unless a run with `config` can go on from `payload`, the newest checkpoint
    of its `out_dir`: weights of the same shapes, data of the same content in the same order."""
    if "optimizers" not in payload:
        raise UserError(f"{config.out_dir}/last.pt: weights alone, as in best.pt; start a new run with --init_from")
    kept = ("seed", "tokens_per_step", "ramp_doublings", "ramp_steps", "optimizer")
    fixed = {**payload["model_config"], **{key: payload["config"][key] for key in kept}}
    require_same(config, fixed, config.out_dir, "set the values of the run to go on, or start another with --out_dir")
    if payload["data_fingerprint"] != data_fingerprint:
        raise UserError(
            f"{config.out_dir}: began on dataset {payload['config']['dataset']!r}, and {config.dataset!r} does not "
            "hold what that held; restore it, or start another run with --out_dir"
        )
    if payload["step"] > config.max_steps:
        raise UserError(f"{config.out_dir}: at step {payload['step']}, beyond --max_steps={config.max_steps}; raise it")


def restore_run(run: Run, payload: dict[str, Any]) -> None:
    """Put `run`, whose model has the weights of `payload` already, where that checkpoint left it."""
    for optimizer, saved in zip(run.optimizers, payload["optimizers"], strict=True):
        groups = optimizer.state_dict()["param_groups"]  # with the weight decay and betas that are asked for now
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    if payload["scaler"]:  # empty if the run had no use for one, on other hardware
        run.scaler.load_state_dict(payload["scaler"])
    run.step, run.best_val_loss, run.wandb_id = (payload[key] for key in ("step", "best_val_loss", "wandb_id"))
    set_rng_state(payload["rng"], run.device)


def require_same(config: GPTConfig, fixed: dict[str, Any], where: str, remedy: str) -> None:
    """Raise UserError naming each setting of `fixed` that is another in `config`; of some, weights know nothing."""
    free = ("dropout", "zero_init", "document_end")
    different = {key: value for key, value in fixed.items() if getattr(config, key) != value and key not in free}
    if different:
        values = ", ".join(f"{key} is {value} there, {getattr(config, key)} here" for key, value in different.items())
        raise UserError(f"{where}: {values}; {remedy}")


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's random generators that training on `device` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Undo what was drawn since `rng_state`; a generator that the run did not have where it was saved is left alone."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def save(path: Path, payload: dict[str, Any], keep: Path | None = None) -> None:
    """Write `payload` to `path`, whole or not at all; a file already there is first renamed to `keep`, if given.
    Raises OSError when the disk refuses, and `path` is then as it was."""
    try:
        with atomic_write(path, "wb", keep) as file:
            torch.save({"format": FORMAT, **payload}, file)
    except (OSError, RuntimeError) as error:  # torch's writer raises its own error while the disk's is on its way up
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).split("\n")[0]
        raise OSError(
            f"{path}: could not be saved ({reason}); the checkpoint before it is intact: "
            "free disk space and run the same command again"
        ) from None


def read(path: Path, mmap: bool = False, verify: bool = True) -> dict[str, Any]:
    """The payload at `path`, tensors on the CPU. Raises UserError if it is damaged or not a checkpoint.

    Its checksums are compared first: torch writes one per tensor but, reading, does not look at them. With `mmap` the
    tensors are read from the file when used; whoever uses none of them need not `verify` them, and reads kilobytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if verify or name.endswith("/data.pkl"):  # which holds all but the tensors
                    _read_to_the_end(archive, name)
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such checkpoint; train one with python train.py, or name another --out_dir"
        ) from None
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # a zip, pickle or decoding error: whatever a damaged file leads torch's reader to
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the disk's fault, not the file's
            raise
        raise UserError(f"{path}: damaged, or not a checkpoint; name another") from None
    made_by = str(payload.get("format")) if isinstance(payload, dict) else ""
    if made_by != FORMAT and made_by.startswith(FORMAT[:-1]):
        raise UserError(f"{path}: written by another version ({made_by}, not {FORMAT}); train anew with --out_dir")
    if made_by != FORMAT:
        raise UserError(f"{path}: a torch file, but not a checkpoint of this project; name another --out_dir")
    return payload


def _read_to_the_end(archive: zipfile.ZipFile, name: str) -> None:
    """Raise zipfile.BadZipFile if a file in `archive` does not have its checksum."""
    with archive.open(name) as file:
        while file.read(2**20):
            pass


def read_newest(
    out_dir: Path, mmap: bool = False, verify: bool = True, set_aside: bool = False
) -> dict[str, Any] | None:
    """The payload of a run's newest readable checkpoint; None if it has none yet. Raises UserError if all
    are damaged.

    A damaged one is passed over with a warning, and with `set_aside` renamed, so that it never becomes `previous.pt`.
    """
    damaged = {}
    for path in (out_dir / "last.pt", out_dir / "previous.pt"):
        try:
            payload = read(path, mmap, verify)
        except UserError as error:
            if path.exists():
                damaged[path] = error
            continue
        for bad, error in damaged.items():
            print(f"warning: {error}; continuing from {path}", file=sys.stderr)
            if set_aside:
                os.replace(bad, bad.with_suffix(".damaged"))
        return payload
    if damaged:
        first = next(iter(damaged.values()))
        raise UserError(f"{first}; none in {out_dir} can be read; to start anew choose another --out_dir")
    return None


def latest_run() -> str:
    """The folder under out/ with the newest checkpoint. Raises UserError if there is none."""
    checkpoints = [path for name in ("last.pt", "previous.pt") for path in Path("out").glob(f"*/{name}")]
    if not checkpoints:
        raise UserError("out: no run with a checkpoint; train one with python train.py, or name it with --out_dir")
    return str(max(checkpoints, key=lambda path: path.stat().st_mtime).parent)


def load(out_dir: str, device: torch.device, which: str = "last") -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Model in evaluation mode on `device`, tokenizer and payload of the run in `out_dir`, or of one `.pt` file.

    `which` is "last" or "best". Raises UserError if there is none, or if its tokenizer is not the one it was trained
    with or does not fit its vocabulary.
    """
    tokenizer, payload = open_run(out_dir, which, verify=True)
    return build_model(GPTConfig(**payload["model_config"]), payload["model"], device).eval(), tokenizer, payload


def build_model(config: GPTConfig, weights: dict[str, torch.Tensor], device: torch.device) -> GPT:
    """A model with a copy of these weights; none are drawn at random first."""
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict({name: weight.to(device, copy=True) for name, weight in weights.items()}, assign=True)
    return model


def open_run(out_dir: str, which: str = "last", verify: bool = False) -> tuple[Tokenizer, dict[str, Any]]:
    """Tokenizer and payload of the run in `out_dir`, or of one `.pt` file, as `load` finds them. The payload's tensors
    are read when they are used, and unless `verify` is set, not before."""
    path = Path(out_dir)
    if which not in ("last", "best"):
        raise UserError(f"--checkpoint={which}: not one of last, best")
    if path.is_dir() and which == "last":
        payload = read_newest(path, mmap=True, verify=verify)
    else:
        payload = read(path / f"{which}.pt" if path.is_dir() else path, mmap=True, verify=verify)
    if payload is None:
        raise UserError(f"{path}: no checkpoint in it yet; train one with python train.py, or name another --out_dir")
    tokenizer = Tokenizer.from_json(payload["tokenizer"], f"tokenizer in {path}")
    too_large = tokenizer.vocab_size > payload["model_config"]["vocab_size"]
    if tokenizer.sha256 != payload["tokenizer_sha256"] or too_large:
        raise UserError(f"{path}: its tokenizer is not the one the model was trained with; use another checkpoint")
    return tokenizer, payload


def _weights(run: Run) -> dict[str, Any]:
    return {
        "model": run.model.state_dict(),
        "model_config": {field.name: getattr(run.config, field.name) for field in dataclasses.fields(GPTConfig)},
        "tokenizer": run.tokenizer.to_json(),
        "tokenizer_sha256": run.tokenizer.sha256,
        "config": dataclasses.asdict(run.config),
        "dtype": str(run.dtype).removeprefix("torch."),
        "step": run.step,
        "tokens": run.tokens,
        "best_val_loss": run.best_val_loss,
    }
