"""The house keeps its plan: who imports whom, what imports do, and what the README says there is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A room may import the rooms named here and, of outside packages needed at import, the ones in the second set.
ROOMS = {
    "config": (set(), set()),
    "atomic": (set(), set()),
    "interruption": (set(), set()),
    "tokenizer": ({"atomic"}, {"numpy", "tiktoken"}),
    "loss": (set(), {"torch"}),
    "device": (set(), {"torch"}),
    "attention": ({"device"}, {"torch"}),
    "model": ({"device", "loss", "attention"}, {"torch"}),
    "muon": (set(), {"torch"}),
    "recipe": ({"model", "muon"}, {"torch"}),
    "decoding": ({"device", "model"}, {"torch"}),
    "distributed": (set(), {"torch"}),
    "shards": ({"atomic"}, {"numpy"}),
    "dataloader": ({"shards"}, {"numpy", "torch"}),
    "metrics": ({"atomic"}, set()),
    "checkpoint": ({"atomic", "model", "recipe", "tokenizer"}, {"torch"}),
    "data.documents": (set(), set()),
    "data.rows": ({"data.documents"}, set()),
    "data.hub": ({"data.documents", "data.rows"}, set()),
    "data.commits": ({"data.documents"}, set()),
    "data.sources": ({"data.documents", "data.rows", "data.hub", "data.commits"}, set()),
    "data.clean": ({"data.documents"}, set()),
    "data.dedup": (set(), {"numpy"}),
    "data.decontaminate": (set(), {"numpy"}),
    "data.redact": (set(), set()),
    "data.formats": ({"tokenizer", "data.documents"}, set()),
    "data.refine": (
        {
            *("tokenizer", "data.documents", "data.rows", "data.clean", "data.dedup"),
            *("data.decontaminate", "data.redact", "data.formats"),
        },
        {"numpy"},
    ),
    "data.units": ({"atomic", "shards", "data.documents", "data.dedup", "data.refine"}, {"numpy"}),
    "data.workers": ({"data.units"}, set()),
    "data.publish": ({"atomic", "shards", "data.dedup", "data.units"}, {"numpy"}),
    "data.report": ({"data.clean", "data.publish"}, {"numpy", "tqdm"}),
    "data.vocabulary": (
        {"atomic", "tokenizer", "data.documents", "data.formats", "data.refine", "data.report"},
        {"numpy"},
    ),
    "data.preview": (
        {"data.documents", "data.dedup", "data.refine", "data.publish", "data.report", "data.vocabulary"},
        {"numpy"},
    ),
    "data.parts": ({"atomic"}, set()),
    "data.prepare": (
        {
            *("config", "atomic", "tokenizer", "shards"),
            *("data.documents", "data.sources", "data.refine", "data.units", "data.workers", "data.publish"),
            *("data.report", "data.vocabulary", "data.preview", "data.parts"),
        },
        {"numpy", "tqdm"},
    ),
    "confine": (set(), set()),
    "forkserver": ({"confine"}, set()),
    "sandbox": ({"confine", "forkserver"}, set()),
    "problems": ({"data.rows"}, set()),
    "judging": ({"data.rows", "problems", "sandbox"}, {"tqdm"}),
    "scoring": ({"model", "device", "checkpoint"}, {"torch"}),
    "eval_perplexity": (
        {
            *("config", "model", "tokenizer", "device", "shards", "dataloader", "checkpoint", "scoring"),
            "data.documents",
        },
        {"numpy", "torch"},
    ),
    "sample": (
        {"config", "model", "decoding", "tokenizer", "device", "checkpoint", "problems", "sandbox"},
        {"torch"},
    ),
    "completions": (
        {"atomic", "tokenizer", "model", "decoding", "device", "checkpoint", "problems", "sample"},
        {"tqdm"},
    ),
    "pass_at_k": ({"forkserver", "sandbox"}, set()),
    "eval_humaneval": ({"config", "atomic", "sandbox", "problems", "judging", "pass_at_k"}, set()),
    "quick_score": (
        {"tokenizer", "model", "sandbox", "problems", "judging", "completions", "pass_at_k", "eval_humaneval"},
        set(),
    ),
    "eval_infilling": (
        {"config", "atomic", "tokenizer", "device", "decoding", "checkpoint", "data.formats", "sample"},
        {"tqdm"},
    ),
    "train": (
        {
            "config",
            "model",
            "tokenizer",
            "device",
            "distributed",
            "shards",
            "dataloader",
            "checkpoint",
            "metrics",
            "interruption",
            "recipe",
            "eval_perplexity",
            "sample",
            "quick_score",
        },
        {"torch", "tqdm"},
    ),
    "plot": ({"atomic", "config"}, {"numpy"}),
    "systems": (
        {
            *("atomic", "tokenizer", "model", "device", "shards", "dataloader", "eval_perplexity", "sample"),
            *("decoding", "recipe", "train"),
        },
        {"numpy", "torch"},
    ),
    "turns": ({"systems"}, {"torch"}),
    "bench": ({"config", "atomic", "decoding", "device", "shards", "train", "systems", "turns"}, set()),
}


def room_files() -> dict[str, Path]:
    files = [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name: path for name, path in names.items() if name != "data.__init__"}


def imported(tree: ast.Module) -> set[str]:
    """Modules imported when the file is."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" if node.module == "data" else node.module for alias in node.names}
    return names


def test_every_file_is_a_room_of_the_plan():
    assert set(room_files()) == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_import_arrows_point_only_where_the_plan_allows(room):
    rooms, packages = ROOMS[room]
    names = imported(ast.parse(room_files()[room].read_text(encoding="utf-8")))
    assert {name for name in names if name in ROOMS} <= rooms
    outside = {name.split(".")[0] for name in names if name not in ROOMS} - set(sys.stdlib_module_names)
    assert outside <= packages
    earlier = list(ROOMS)[: list(ROOMS).index(room)]
    assert rooms <= set(earlier), "a room imports only rooms above it in the list, so there are no circles"


def test_importing_a_stage_does_nothing_visible():
    code = (
        "import torch; a = torch.initial_seed(); import bench, sample, data.prepare; assert a == torch.initial_seed()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
