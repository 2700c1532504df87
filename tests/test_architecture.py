"""The house keeps its plan (docs/design.md): which wing may import which, and what importing does."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A wing, or a room that stages share, imports itself and wings below it. `train` stands for the stages.
BELOW = {
    "runtime": set(),
    "ops": {"runtime"},
    "sandbox": set(),
    "data": {"runtime"},
    "model": {"ops", "runtime"},
    "dataloader": {"data", "runtime"},
    "weights": {"model", "data", "runtime"},
    "inference": {"weights", "model", "data", "runtime"},
    "training": {"inference", "weights", "model", "dataloader", "data", "runtime"},
    "evaluation": {"inference", "weights", "model", "dataloader", "data", "sandbox", "runtime"},
    "benchmark": {"training", "evaluation", "inference", "model", "dataloader", "data", "runtime"},
}
FILES = [path for path in ROOT.glob("**/*.py") if path.relative_to(ROOT).parts[0] in {*BELOW, f"{path.stem}.py"}]


def imported(path: Path) -> set[str]:
    """The full names of modules of this project that a file imports, at its start or in a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES}
    return names & modules


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_down(path):
    wing = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imported(path):
        target = name.partition(".")[0]
        if wing in BELOW:
            assert target in BELOW[wing] | {wing}, f"{wing} may not import {target}"
        else:
            assert target in {*BELOW, "train"}, f"a stage imports wings, and of the stages train.py alone, not {target}"


def test_no_room_imports_itself_in_a_circle():
    arrows = {".".join(path.relative_to(ROOT).with_suffix("").parts): imported(path) for path in FILES}
    while leaves := {room for room, targets in arrows.items() if not targets}:
        arrows = {room: targets - leaves for room, targets in arrows.items() if room not in leaves}
    assert arrows == {}


def test_at_the_top_stand_the_stages_and_what_they_share():
    assert len(list(ROOT.glob("*.py"))) <= 14


def test_the_plan_names_every_room():
    plan = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("```")[1]
    assert {path.stem for path in FILES} - {"__init__"} <= set(re.findall(r"\w+", plan))


@pytest.mark.parametrize("wing", ["data", "sandbox"])
def test_a_wing_starts_without_torch(wing):
    names = [path.relative_to(ROOT).with_suffix("").parts for path in FILES]
    modules = [".".join(parts) for parts in names if parts[0] == wing]
    modules += ["prepare"] if wing == "data" else []
    code = f"import sys, {', '.join(modules)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_importing_a_stage_does_nothing_visible():
    stages = ", ".join(path.stem for path in ROOT.glob("*.py"))
    code = f"import torch; a = torch.initial_seed(); import {stages}; assert a == torch.initial_seed()"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
