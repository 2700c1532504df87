import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data.tokenizer import END_OF_TEXT, Special
from eval_humaneval import HumanEvalConfig, eval_humaneval
from evaluation.problems import load_problems
from runtime.config import load_config
from train import TrainConfig, train
from weights.checkpoint import load

ROOT = Path(__file__).parent.parent
HUMANEVAL = os.environ.get("HUMANEVAL_FILE")
NAMES = ("one", "two", "three", "four")
PROBLEMS = [
    {
        "task_id": f"T/{name}",
        "prompt": f'def {name}(n):\n    """Add {amount} to n.\n    >>> {name}(1)\n    {amount + 1}\n    """\n',
        "canonical_solution": f"    total = n + {amount}\n\n    return total\n",
        "entry_point": name,
        "test": f"def check(candidate):\n    for i in range(9):\n        assert candidate(i) == i + {amount}\n",
    }
    for amount, name in enumerate(NAMES, start=1)
]


@pytest.fixture
def problems_file(tmp_path) -> str:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return str(path)


@pytest.fixture(scope="module")
def run_folder(shards, tmp_path_factory) -> str:
    """A run of one step, with a context in which every prompt of HumanEval fits."""
    out_dir = tmp_path_factory.mktemp("runs") / "run"
    settings = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 4096, "vocab_size": 512, "dataset": shards.path}
    settings |= {"batch_size": 1, "tokens_per_step": 4096, "max_steps": 1, "eval_tokens": 1, "out_dir": out_dir}
    settings |= {"device": "cpu", "dtype": "float32", "compile": False, "sample_interval": None}
    train(load_config(TrainConfig, [f"--{key}={value}" for key, value in settings.items()]))
    return str(out_dir)


@pytest.fixture
def write_solutions(monkeypatch, run_folder):
    """Make the decoder write each problem's solution, then another definition; returns the prompts it was given."""
    tokenizer = load(run_folder, torch.device("cpu"))[1]
    prompts = []

    def install(problems, spoil=lambda row, text: text):
        solutions = {tuple(tokenizer.encode_pieces([Special(END_OF_TEXT), p.prompt])): p.solution for p in problems}

        def script(model, tokens, choose, n_samples):
            prompts.append(tokenizer.decode(tokens[0].tolist()))
            solution = solutions[tuple(tokens[0].tolist())]
            texts = [spoil(row, solution) + "\ndef more():\n    pass" for row in range(n_samples)]
            rows = [[*tokenizer.encode(text), tokenizer.end_of_text] for text in texts]
            longest = max(map(len, rows))
            for index in range(longest):
                yield torch.tensor([row[min(index, len(row) - 1)] for row in rows])

        monkeypatch.setattr("inference.generate.generate_tokens", script)
        return prompts

    return install


def arguments(run_folder: str, problems: str, *more: str) -> list[str]:
    return [f"--out_dir={run_folder}", f"--problems={problems}", "--allow_code_execution=True", "--device=cpu", *more]


@pytest.mark.skipif(HUMANEVAL is None, reason="HUMANEVAL_FILE is not set")
def test_a_model_that_writes_the_solutions_of_humaneval_gets_them_all(
    write_solutions, run_folder, run_program, tmp_path
):
    write_solutions(load_problems(HUMANEVAL))
    more = ("--n_samples=2", "--k=1,2,3", "--max_new_tokens=2000")
    code, out, _ = run_program(eval_humaneval, HumanEvalConfig, *arguments(run_folder, HUMANEVAL, *more))
    assert code == 0 and "HumanEval: 164 problems, 328 samples" in out
    assert "pass@1     100.00% ± 0.00%" in out and "pass@2     100.00%" in out
    assert "pass@3     skipped: needs 3 samples per problem, there are 2" in out


def test_what_is_kept_of_an_evaluation(write_solutions, run_folder, problems_file, capsys):
    write_solutions(load_problems(problems_file), spoil=lambda row, text: text if row else "    return n\n")
    settings = arguments(run_folder, problems_file, "--n_samples=4", "--k=1,4", "--temperature=0.2,0.8", "--first=3")
    sweep = eval_humaneval(load_config(HumanEvalConfig, settings))
    out = capsys.readouterr().out
    assert "mine subset 3 of 4" in out and "temperature" in out and "75.00%*" in out
    assert sweep["best"] == {"1": 0.2, "4": 0.2}
    folders = sorted((Path(run_folder) / "eval").glob("mine-subset-3-of-4-t*"))
    assert len(folders) == 2
    summary = json.loads((folders[0] / "summary.json").read_text())
    assert summary["pass@k"] == {"1": 0.75, "4": 1.0} and summary["outcomes"]["failed"] == 3
    assert summary["config"]["n_samples"] == 4 and summary["step"] == 1 and summary["temperature"] == 0.2
    samples = [json.loads(line) for line in (folders[0] / "samples.jsonl").read_text().splitlines()]
    assert samples[1]["task_id"] == "T/one" and samples[1]["completion"] == PROBLEMS[0]["canonical_solution"]
    assert samples[1]["raw"].endswith("\n\ndef") and samples[1]["finish"] == "stop"
    results = [json.loads(line) for line in (folders[0] / "results.jsonl").read_text().splitlines()]
    assert [list(result) for result in results] == [["task_id", "passed", "outcome", "detail", "shared"]] * 12
    assert [result["passed"] for result in results] == [False, True, True, True] * 3


def test_a_killed_evaluation_goes_on_and_others_are_kept_apart(write_solutions, run_folder, problems_file):
    prompts = write_solutions(load_problems(problems_file))
    settings = arguments(run_folder, problems_file, "--n_samples=3", "--k=1", "--seed=5")
    whole = eval_humaneval(load_config(HumanEvalConfig, settings))
    assert len(prompts) == 4 and whole["pass@k"]["1"] == 1.0
    paths = (Path(run_folder) / "eval").glob("mine-t*/samples.jsonl")
    (path,) = (path for path in paths if len(path.read_text().splitlines()) == 12)
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    path.write_text("".join(lines[:7]) + lines[7][:20])  # killed within the third problem
    again = eval_humaneval(load_config(HumanEvalConfig, settings))
    assert len(prompts) == 6 and "three" in prompts[-2] and path.read_text() == text
    assert again["pass@k"] == whole["pass@k"]
    eval_humaneval(load_config(HumanEvalConfig, [*settings, "--top_p=0.5"]))
    assert len(prompts) == 10, "other settings, other samples"


def test_samples_are_repeated_by_a_seed_and_drawn_independently(run_folder, problems_file):
    def drawn(*more: str) -> list[str]:
        settings = arguments(
            run_folder, problems_file, "--n_samples=6", "--max_new_tokens=8", "--temperature=1.5", *more
        )
        eval_humaneval(load_config(HumanEvalConfig, [*settings, "--k=1", "--stop=@@@"]))
        newest = max((Path(run_folder) / "eval").glob("mine-t1.5-*/samples.jsonl"), key=lambda p: p.stat().st_mtime_ns)
        texts = [json.loads(line)["completion"] for line in newest.read_text().splitlines()]
        newest.unlink()
        return texts

    first = drawn()
    assert drawn() == first and len(set(first)) > 20
    assert drawn("--seed=1") != first
    assert len(set(drawn("--batch_size=2"))) > 20, "each batch has a seed of its own"


def test_samples_made_elsewhere(problems_file, tmp_path, run_program):
    right = {p["task_id"]: p["canonical_solution"] for p in PROBLEMS}
    rows = [
        {"task_id": "T/two", "completion": right["T/two"], "extra": 1},
        {"task_id": "T/one", "completion": "    1/0\n"},
    ]
    rows += [
        {"task_id": "T/one", "completion": "    import sys; sys.exit()\n"},
        {"task_id": "T/one", "completion": "  x"},
    ]
    (tmp_path / "made.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    flags = (f"--samples={tmp_path / 'made.jsonl'}", f"--problems={problems_file}", "--allow_code_execution=True")
    code, out, _ = run_program(eval_humaneval, HumanEvalConfig, *flags, "--k=1")
    assert code == 0 and "mine, 2 of 4 attempted: 2 problems, 4 samples" in out and "pass@1      50.00%" in out
    results = [json.loads(line) for line in (tmp_path / "made.results.jsonl").read_text().splitlines()]
    assert [(r["task_id"], r["passed"]) for r in results] == [("T/two", True), *[("T/one", False)] * 3]
    assert [r["detail"].split(":")[1].strip() for r in results[1:]] == [
        "ZeroDivisionError",
        "SystemExit",
        "IndentationError",
    ]
    (tmp_path / "made.jsonl.gz").write_bytes(gzip.compress((tmp_path / "made.jsonl").read_bytes()))
    assert run_program(eval_humaneval, HumanEvalConfig, flags[0] + ".gz", *flags[1:])[0] == 0


def test_programs_that_must_share_an_interpreter_with_their_check_are_counted_or_fail(tmp_path, run_program):
    problem = {**PROBLEMS[0], "test": "class Mine(Base): pass\n" + PROBLEMS[0]["test"]}
    problem |= {"task_id": "T/base", "prompt": "class Base: pass\n\n" + problem["prompt"]}
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, [*PROBLEMS, problem])))
    rows = [{"task_id": p["task_id"], "completion": p["canonical_solution"]} for p in (*PROBLEMS, problem)]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = (f"--samples={tmp_path / 's.jsonl'}", f"--problems={tmp_path / 'p.jsonl'}", "--allow_code_execution=True")
    for strict, n_passed in ((), 5), (("--strict",), 4):
        code, out, _ = run_program(eval_humaneval, HumanEvalConfig, *flags, "--k=1", *strict)
        assert code == 0 and f"passed {n_passed}, failed {5 - n_passed}" in out
        assert f"with their check: 1 samples, of which passed {n_passed - 4} (0 suspicious); the solutions of 1" in out
        summary = json.loads((tmp_path / "s.summary.json").read_text())
        assert (summary["shared"], summary["shared_problems"]) == (1, ["T/base"])
        results = [json.loads(line) for line in (tmp_path / "s.results.jsonl").read_text().splitlines()]
        assert [result["shared"] for result in results] == [False] * 4 + [True]


def test_a_sandbox_that_does_not_start_is_one_line(problems_file, run_program, run_folder, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    code, out, err = run_program(eval_humaneval, HumanEvalConfig, *arguments(run_folder, problems_file))
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--allow_code_execution=False"], "say --allow_code_execution=True"),
        (["--problems=missing.jsonl"], "--problems=missing.jsonl: no such file"),
        (["--tasks=T/one,T/five"], "mine.jsonl has no T/five, but T/one"),
        (["--exclude=T/five"], "has no T/five"),
        (["--temperature=hot"], "--temperature=hot: wants numbers of at least 0"),
        (["--k=0"], "--k=0: wants numbers of at least 1"),
        (["--n_samples=0"], "--n_samples=0: must be at least 1"),
        (["--top_p=2"], "--top_p=2.0: must be above 0"),
        (["--dtype=int8"], "--dtype=int8: not one of float32"),
        (["--out_dir=missing"], "missing: no such checkpoint"),
        (["--stop=[]"], "--stop=[]: wants a text"),
    ],
)
def test_bad_input_is_one_line(wrong, message, run_folder, problems_file, run_program):
    code, _, err = run_program(eval_humaneval, HumanEvalConfig, *arguments(run_folder, problems_file, *wrong))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0]


def test_judging_a_file_does_not_load_torch():
    code = "import sys, eval_humaneval; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_real_process_that_is_killed_goes_on(run_folder, problems_file):
    settings = arguments(run_folder, problems_file, "--n_samples=1", "--max_new_tokens=400", "--seed=77", "--stop=@@@")
    command = [sys.executable, "eval_humaneval.py", *settings, "--k=1", "--temperature=0.7"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = Path(run_folder) / "eval"
    for _ in range(600):
        written = [p for p in folder.glob("mine-t0.7-*/samples.jsonl") if p.stat().st_size]
        if written or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = written[0].read_text().splitlines()[0]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "4 problems, 4 samples" in done.stdout
    assert written[0].read_text().splitlines()[0] == first and len(written[0].read_text().splitlines()) == 4
