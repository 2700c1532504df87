"""A run's checkpoints: written whole or not at all, read without executing anything in them.

`out/NAME/` holds `last.pt`, `previous.pt` (the one before it, used when `last.pt` is damaged) and `best.pt` (weights of
the lowest validation loss). Each is a torch file of tensors and primitives, with the model's sizes and the tokenizer's
file in it, so that it is all one needs to sample.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch

from model import GPT, GPTConfig
from tokenizer import Tokenizer

FORMAT = "codegpt checkpoint 1"


def save(path: Path, payload: dict[str, Any], keep: Path | None = None) -> None:
    """Write `payload` under a temporary name, flush it to the disk, then rename it to `path`; a file already there is
    first renamed to `keep`, if given. Raises OSError when the disk refuses, and `path` is then as it was."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **payload}, file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns some failures of the disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = str(error).split("\n")[0]
        raise OSError(
            f"{path}: could not be saved ({reason}); the checkpoint before it is intact: "
            "free disk space and run the same command again"
        ) from None


def save_last(out_dir: Path, payload: dict[str, Any]) -> None:
    """Save as `last.pt`; the file of that name becomes `previous.pt`."""
    save(out_dir / "last.pt", payload, keep=out_dir / "previous.pt")


def read(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The payload at `path`, tensors on the CPU. Raises ValueError if it is damaged or not a checkpoint.

    With `mmap`, tensors are read from the file when used, and their checksums are not compared.
    """
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such checkpoint; train one with python train.py, or name another --out_dir"
        ) from None
    except Exception:  # a zip, pickle, I/O or decoding error: whatever a damaged file leads torch's reader to
        raise ValueError(f"{path}: damaged, or not a checkpoint; use another, or delete it") from None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise ValueError(f"{path}: a torch file, but not a checkpoint of this project; name another --out_dir")
    return payload


def read_newest(out_dir: Path, mmap: bool = False, set_aside: bool = False) -> dict[str, Any] | None:
    """The payload of a run's newest readable checkpoint; None if it has none yet, ValueError if all are damaged.

    A damaged one is passed over with a warning, and with `set_aside` renamed, so that it never becomes `previous.pt`.
    """
    damaged = {}
    for path in (out_dir / "last.pt", out_dir / "previous.pt"):
        try:
            payload = read(path, mmap)
        except ValueError as error:
            if path.exists():
                damaged[path] = error
            continue
        for bad, error in damaged.items():
            print(f"warning: {error}; continuing from {path}", file=sys.stderr)
            if set_aside:
                os.replace(bad, bad.with_suffix(".damaged"))
        return payload
    if damaged:
        raise ValueError(f"{next(iter(damaged.values()))}; none in {out_dir} can be read: to start anew, move it away")
    return None


def load(out_dir: str, device: torch.device, which: str = "last") -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Model in evaluation mode on `device`, tokenizer and payload of the run in `out_dir`, or of one `.pt` file.

    `which` is "last" or "best". Raises ValueError if there is none, or if its tokenizer is not the one it was trained
    with or does not fit its vocabulary.
    """
    path = Path(out_dir)
    if which not in ("last", "best"):
        raise ValueError(f"--checkpoint={which}: not one of last, best")
    if path.is_dir() and which == "last":
        payload = read_newest(path, mmap=True)
    else:
        payload = read(path / f"{which}.pt" if path.is_dir() else path, mmap=True)
    if payload is None:
        raise ValueError(f"{path}: no checkpoint in it yet; train one with python train.py, or name another --out_dir")
    tokenizer = Tokenizer.from_json(payload["tokenizer"], f"tokenizer in {path}")
    config = GPTConfig(**payload["model_config"])
    if tokenizer.sha256 != payload["tokenizer_sha256"] or tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{path}: its tokenizer is not the one the model was trained with; use another checkpoint")
    model = GPT(config)
    model.load_state_dict(payload["model"])
    return model.to(device).eval(), tokenizer, payload


def model_config(config: GPTConfig) -> dict[str, Any]:
    """The fields of `config` that GPTConfig has, so that a training config's sizes can be stored and compared."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(GPTConfig)}
