"""Compiling a run's model: tried on everything that the run will do, and kept in one file for when it continues.

What the compiler made goes to `compiled.bin` in the run's folder, 14 MB of the 70M on a GPU. A run that continues on a
new machine of the same kind loads it, and need not compile again; on a CPU the C++ compiler still has to run, and half
of the time is saved. It is code that will be executed: it is read only from the run's own folder, and only if the file
belongs to the user.
"""

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from inference.generate import generate
from inference.sampling import Sampling
from runtime.device import autocast, is_out_of_memory
from runtime.files import atomic_write
from training.run import Run


def compile_model(run: Run, choose_batch_size: Callable[[], None] = lambda: None) -> None:
    """Compile the model in place, and try it on one micro-batch, one evaluation batch and a sample; if that fails, warn
    and leave the model as it was. `choose_batch_size` is called first, with the model compiled; it may run micro-steps.
    """
    load_compiled(run)
    run.model.compile_training()
    try:
        choose_batch_size()
        try_micro_step(run, run.config.batch_size)
        try_reports(run, run.config.batch_size)
    except Exception as error:  # no C++ compiler, an unsupported platform: any exception is possible
        run.model.zero_grad(set_to_none=True)
        if is_out_of_memory(error):  # compiling is not at fault; a step that runs out halves batch_size
            return
        run.model.compile_training(False)
        print(f"warning: torch.compile failed ({_first_line(error)}); continuing without it, slower", file=sys.stderr)


def try_micro_step(run: Run, batch_size: int) -> None:
    """Run a micro-step of `batch_size` sequences, then clear its gradients and restore the random state."""
    tokens = torch.zeros((batch_size, run.config.block_size), dtype=torch.int32, device=run.device)
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []), autocast(run.device, run.dtype):
        run.model(tokens, tokens.clone()).backward()  # two tensors, as in training; with one it would compile again
    run.model.zero_grad(set_to_none=True)


@torch.no_grad()
def try_reports(run: Run, batch_size: int) -> None:
    """Run what a report runs: an evaluation of `batch_size` sequences, and a sample."""
    tokens = torch.zeros((batch_size, run.config.block_size), dtype=torch.int32, device=run.device)
    run.model.eval()
    try:
        with autocast(run.device, run.dtype):
            run.model(tokens, tokens.clone())
    finally:
        run.model.train()
    generate(run.model, run.tokenizer, "\n", Sampling(max_new_tokens=2))


def save_compiled(run: Run) -> None:
    """Write what this process has compiled to the run's folder. If that fails, warn: it only saves time."""
    try:
        made = torch.compiler.save_cache_artifacts()
        if made is not None:
            head = {**made_on(run.device), "sha256": hashlib.sha256(made[0]).hexdigest()}
            with atomic_write(_file(run), "wb") as file:
                file.write(json.dumps(head).encode() + b"\n" + made[0])
    except Exception as error:  # a full disk, a cache that this torch cannot save
        print(f"warning: {_file(run)}: not saved ({_first_line(error)})", file=sys.stderr)


def load_compiled(run: Run) -> bool:
    """Give the compiler what `save_compiled` wrote, if that was this user, on a machine like this one. Returns whether
    it did."""
    path = _file(run)
    try:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            if hasattr(os, "getuid") and os.fstat(file.fileno()).st_uid != os.getuid():
                return False
            head, artifacts = json.loads(file.readline()), file.read()
        if head.pop("sha256") != hashlib.sha256(artifacts).hexdigest():
            raise ValueError("damaged")
        return head == made_on(run.device) and torch.compiler.load_cache_artifacts(artifacts) is not None
    except Exception as error:  # cut short, or by another version
        print(f"warning: {path}: not used ({_first_line(error)}); compiling again", file=sys.stderr)
        return False


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _file(run: Run) -> Path:
    return Path(run.config.out_dir) / "compiled.bin"


def made_on(device: torch.device) -> dict[str, Any]:
    """What compiled code is tied to: the version of torch, and the GPU or the processor. torch itself does not tell
    processors apart; with the instructions of another one, its code would compute nonsense or stop."""
    if device.type == "cuda":
        return {"torch": torch.__version__, "device": torch.cuda.get_device_name(device)}
    known = f"{platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
    if (cpu_info := Path("/proc/cpuinfo")).exists():  # Linux: the instructions that the processor has
        known += str(re.findall(r"^(?:flags|Features)\s*:.*$", cpu_info.read_text(), re.M)[:1])
    return {"torch": torch.__version__, "device": f"{device.type} {hashlib.sha256(known.encode()).hexdigest()[:16]}"}
