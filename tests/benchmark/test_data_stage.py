import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PEAK_IN_PROC = Path("/proc/self/status").is_file()


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmark.data_stage", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(not PEAK_IN_PROC, reason="peak memory is read from Linux's /proc")
def test_dedup_finds_the_near_copies_that_it_made():
    result = run("dedup", "2000")
    assert result.returncode == 0, result.stderr
    made, found = result.stdout.splitlines()
    assert made.startswith("2,000 documents, 200 near copies")
    pattern = r"found ([\d,]+); exact [\d.]+ s, near [\d.]+ s; peak memory (\d+) MB, (\d+) MB of it before the search"
    n_found, peak_mb, before_mb = re.fullmatch(pattern, found).groups()
    assert 180 <= int(n_found) <= 220 and int(peak_mb) >= int(before_mb)


def test_an_unknown_command_prints_the_usage():
    result = run("sped", "HumanEval.jsonl.gz")
    assert result.returncode == 1 and "python -m benchmark.data_stage speed" in result.stderr
