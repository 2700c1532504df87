"""Every command of README.md and docs/*.md runs, unchanged, in a copy of the project whose configs are made small."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from small_corpus import python_documents, write_json_gz

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ["data", "training", "evaluation", "speed", "editors", "configuration"]),
)


def commands_of(pages: tuple[str, ...]) -> list[str]:
    """The lines of all ```bash blocks but comments, in order, each command once."""
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
    lines = "".join(re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)).splitlines()
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


# What a test cannot run, by how the command begins, and why.
NOT_HERE = {
    "hf download ": "downloads",
    "python -m benchmark.data_stage ": "takes minutes, and cl100k_base from the network",
    "python train.py configs/70m.py --out_dir=/content/drive/": "writes to Colab's Drive",
    "python bench.py configs/70m.py --peer=": "needs a checkout of nanoGPT",
    "python serve.py ": "runs until it is interrupted; tests/test_serve.py starts it",
    "curl ": "needs a server; tests/inference/test_notebook.py runs it beside one",
    "bash runs/ablate.sh": "takes hours, and packages from the network",
    "bash runs/gpu_recipe.sh": "needs a GPU",
    "bash runs/gpu_report.sh": "needs a GPU",
}
# Exit code and message of commands that rightly fail here: a model of three steps writes nothing that passes.
FAILS = {"python sample.py --prompt_file=task.py ": (1, "none of 20 passes; the first failed: line ")}

SMALL_ROWS = "\nsource = 'files:data/raw/*.json.gz'\n"
SMALL_DATA = "\npackage_bytes = 5_000\n"
SMALL_MODEL = "\nn_layer = 1\nn_head = 2\nn_embd = 64\n"
SMALL_RUN = SMALL_MODEL + "max_steps = 3\neval_tokens = 1024\nsample_interval = 3\ncompile = False\n"

PROBLEM = {
    "task_id": "P/1",
    "prompt": 'def same(n):\n    """\n    >>> same(3)\n    3\n    """\n',
    "canonical_solution": "    return n\n",
    "entry_point": "same",
    "test": "def check(candidate):\n    assert candidate(3) == 3\n",
}
DATASETS = """# In the place of the hub, which a test does not reach.
import json
def load_dataset(name, configuration=None, split=None):
    return [json.loads(line) for line in open("problems.jsonl")]
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a clone has it, its configs cut down, with two files of a corpus and one of problems in place."""
    folder = tmp_path_factory.mktemp("clone")
    for name in project_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    changes = {
        "configs/data/local.py": SMALL_DATA,
        "configs/data/codeparrot.py": SMALL_ROWS + "tokenizer = 'train:512'\nval_fraction = 0.3\n",
        "configs/data/starcoder.py": SMALL_ROWS
        + "tokenizer = 'train:512'\nval_fraction = 0.3\nunknown_license = True\n",
        "configs/tiny.py": SMALL_RUN,
        "configs/70m_fast.py": SMALL_RUN
        + "dataset = 'codeparrot'\nvocab_size = 512\nn_embd = 32\nbatch_size = 2\ntokens_per_step = 2048\n",
        "configs/70m.py": SMALL_RUN + "vocab_size = 512\nn_embd = 32\nbatch_size = 2\ntokens_per_step = 2048\n",
    }
    for name, text in changes.items():
        (folder / name).write_text((folder / name).read_text() + text)
    raw = folder / "data" / "raw"
    (raw / "problems").mkdir(parents=True)
    rows = python_documents()
    write_json_gz(raw / "file-000000000001.json.gz", [{**row, "license": "psf"} for row in rows[20:]])
    write_json_gz(raw / "file-000000000054.json.gz", rows[:20])
    problem = {"task_id": "P/1", "text": "a text that is in no file here, for certain", "code": ""}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([problem]), raw / "problems" / "a.parquet")
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "problems.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    (folder / "samples.jsonl").write_text(json.dumps({"task_id": "P/1", "completion": "    return n\n"}) + "\n")
    (folder / "task.py").write_text(PROBLEM["prompt"])
    (folder / "datasets.py").write_text(DATASETS)
    return folder


def project_files() -> list[str]:
    """The files that git tracks, and new ones that it does not ignore, without deleted ones."""
    names = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).splitlines()
    return [name for name in names if (ROOT / name).is_file()]


@pytest.mark.parametrize("command", commands_of(PAGES))
def test_a_command_of_the_pages_runs(command, copy):
    if reason := next((why for start, why in NOT_HERE.items() if command.startswith(start)), None):
        pytest.skip(reason)
    words = shlex.split(command)
    programs = {"python": sys.executable, "bash": "bash", "torchrun": str(Path(sys.executable).with_name("torchrun"))}
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    result = subprocess.run([programs[words[0]], *words[1:]], cwd=copy, capture_output=True, text=True, env=environment)
    code, message = next((fate for start, fate in FAILS.items() if command.startswith(start)), (0, ""))
    assert result.returncode == code and message in result.stderr, result.stderr[-2000:]
    assert "Traceback" not in result.stderr and (result.stdout or result.stderr)


def test_every_page_is_among_those_that_are_run():
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - {"docs/design.md", "docs/log.md"}
    assert {*PAGES} == {"README.md", *pages}


@pytest.mark.parametrize("start", [*NOT_HERE, *FAILS])
def test_an_exception_is_a_command_of_the_pages(start):
    assert any(command.startswith(start) for command in commands_of(PAGES))


def test_the_readmes_file_tree_is_the_projects():
    """It names every file and folder at the top and every wing, and the line of a wing names all of its modules."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"^## Files\n+```\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)[1]
    named, wing = set(), ""
    tree = re.sub(r"\n {9,}", " ", re.sub(r" \(.*?\)", "", tree, flags=re.DOTALL))  # explanations, long lines
    for line in tree.splitlines():
        names, _, description = line.strip().partition("  ")
        parent = wing if line.startswith("  ") else ""
        paths = [(parent + name).rstrip("/") for name in names.split()]
        named.update(paths)
        wing = parent or names
        if (ROOT / paths[0] / "__init__.py").exists():
            modules = {path.stem for path in (ROOT / paths[0]).glob("*.py")} - {"__init__"}
            assert set(description.strip().split(", ")) == modules, line
    files = [name for name in project_files() if not name.startswith(".")]
    wings = {name.removesuffix("/__init__.py") for name in files if name.endswith("/__init__.py")}
    assert named == wings | {name.partition("/")[0] for name in files}
