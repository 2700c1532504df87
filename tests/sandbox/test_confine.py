"""Each layer works where the kernel has it. What the layers prevent is tested in test_pool.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOOK = """
import json, os, sys, tempfile
from sandbox.confine import Confinement
confinement = Confinement(tempfile.mkdtemp(), 2**20, json.loads(sys.argv[1]))
directory = confinement.begin()
pid = os.fork()
if pid == 0:
    confinement.enter(directory)
    seen = {"missing": confinement.missing, "uid": os.getuid(), "parent": os.getppid()}
    seen["outside"] = [name for name in ("home", "proc", "sys", "var") if os.path.exists("/" + name)]
    print(json.dumps({**seen, "inside": os.listdir(directory)}), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
confinement.end(pid, directory)
print(json.dumps(confinement.namespaces or os.path.exists(directory)), flush=True)
"""


def look(*without: str) -> tuple[dict, bool]:
    command = [sys.executable, "-c", LOOK, json.dumps(without)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seen, left = map(json.loads, result.stdout.splitlines())
    return seen, left


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="namespaces are Linux's")
def test_in_namespaces_a_program_is_alone_with_python():
    seen, _ = look()
    if seen["missing"]:
        pytest.skip(f"this machine lacks {seen['missing']}")
    assert seen["parent"] == 1 and seen["uid"] in (0, 1000)  # 0 stands for the user who started it, unless that is root
    assert seen["outside"] == seen["inside"] == []


def test_layers_left_out_are_named_with_what_that_means():
    seen, left = look("namespaces", "Landlock", "seccomp")
    assert [text.split(" (")[0] for text in seen["missing"]] == ["namespaces", "Landlock", "seccomp"]
    assert all(": " in text for text in seen["missing"]) and left is False
