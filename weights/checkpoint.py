"""Checkpoints: written whole or not at all, verified, and read without executing anything in them.

A checkpoint is a torch file of tensors and primitives. It also holds the model's sizes and the tokenizer, so that
sampling needs nothing else. A run's folder has up to three: last.pt, previous.pt, best.pt (training/run.py).
"""

import errno
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from runtime.errors import UserError
from runtime.files import atomic_write

FORMAT = "codegpt checkpoint 2"


def save(path: Path, payload: dict[str, Any], keep: Path | None = None) -> None:
    """Write `payload` to `path`, whole or not at all. A file already there is first renamed to `keep`, if given.
    Raises OSError if writing fails; `path` is then as it was."""
    try:
        with atomic_write(path, "wb", keep) as file:
            torch.save({"format": FORMAT, **payload}, file)
    except (OSError, RuntimeError) as error:  # torch's writer hides the disk's error behind its own
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).split("\n")[0]
        raise OSError(
            f"{path}: could not be saved ({reason}); the checkpoint before it is intact: "
            "free disk space and run the same command again"
        ) from None


def read(path: Path, mmap: bool = False, verify: bool = True) -> dict[str, Any]:
    """Returns the payload at `path`, tensors on the CPU. Raises UserError if it is damaged or not a checkpoint.

    Checksums are compared first: torch writes one per tensor, but does not check it when reading. With `mmap` a tensor
    is read from the file when it is used. Without `verify` its checksum is not compared, and only kilobytes are read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if verify or name.endswith("/data.pkl"):  # everything but the tensors
                    with archive.open(name) as file:
                        while file.read(2**20):  # at its end the checksum is compared
                            pass
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such checkpoint; train one with python train.py, or name another --out_dir"
        ) from None
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes torch's reader raise anything
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the disk's fault, not the file's
            raise
        raise UserError(f"{path}: damaged, or not a checkpoint; name another") from None
    made_by = str(payload.get("format")) if isinstance(payload, dict) else ""
    if made_by != FORMAT and made_by.startswith(FORMAT[:-1]):
        raise UserError(f"{path}: written by another version ({made_by}, not {FORMAT}); train anew with --out_dir")
    if made_by != FORMAT:
        raise UserError(f"{path}: a torch file, but not a checkpoint of this project; name another --out_dir")
    return payload


def read_newest(
    out_dir: Path, mmap: bool = False, verify: bool = True, set_aside: bool = False
) -> dict[str, Any] | None:
    """Returns the payload of a run's newest readable checkpoint; None if it has none yet. Skips a damaged one with a
    warning; `set_aside` also renames it, so that it never becomes previous.pt. Raises UserError if all are damaged."""
    damaged: dict[Path, UserError] = {}
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
    """Returns the folder under out/ with the newest checkpoint. Raises UserError if there is none."""
    checkpoints = [path for name in ("last.pt", "previous.pt") for path in Path("out").glob(f"*/{name}")]
    if not checkpoints:
        raise UserError("out: no run with a checkpoint; train one with python train.py, or name it with --out_dir")
    return str(max(checkpoints, key=lambda path: path.stat().st_mtime).parent)


def load(out_dir: str, device: torch.device, which: str = "last") -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Returns model (in evaluation mode, on `device`), tokenizer and payload of a run's folder or of a `.pt` file.

    `which` is "last" or "best". Raises UserError if there is no checkpoint, or if its tokenizer is not the one that the
    model was trained with or does not fit its vocabulary.
    """
    tokenizer, payload = open_run(out_dir, which, verify=True)
    return build_model(GPTConfig(**payload["model_config"]), payload["model"], device).eval(), tokenizer, payload


def build_model(config: GPTConfig, weights: dict[str, torch.Tensor], device: torch.device) -> GPT:
    """Returns a model with a copy of `weights`. No random weights are drawn first."""
    with torch.device("meta"):
        model = GPT(config)
    parameters = list(model.named_parameters(remove_duplicate=False))
    model.load_state_dict({name: weight.to(device, copy=True) for name, weight in weights.items()}, assign=True)
    loaded: dict[int, torch.nn.Parameter] = {}
    for name, parameter in parameters:  # one that several modules share stays one
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, loaded.setdefault(id(parameter), model.get_parameter(name)))
    return model


def open_run(out_dir: str, which: str = "last", verify: bool = False) -> tuple[Tokenizer, dict[str, Any]]:
    """Returns tokenizer and payload of a run's folder or of a `.pt` file; raises what `load` does. Tensors are read
    from the file when they are used; only `verify` reads them before, to compare checksums."""
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
