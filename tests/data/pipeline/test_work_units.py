import subprocess
import sys
from pathlib import Path

from small_corpus import (
    arguments,
    code,
    write_json_gz,
)

ROOT = Path(__file__).parents[3]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    rows = [{"content": code(i, 700), "repo_name": f"u/{i}", "path": "x.py"} for i in range(60)]
    peaks = []
    for n_files in (1, 8):
        folder = tmp_path / str(n_files)
        folder.mkdir()
        for number in range(n_files):
            write_json_gz(folder / f"{number}.json.gz", [{**row, "path": f"{number}.py"} for row in rows] * 2)
        settings = [
            "--workers=1",
            "--unit_bytes=1000000",
            "--tokenizer_sample_bytes=100000",
            "--exact_duplicates=False",
        ]
        script = (
            "import sys; from runtime.config import load_config; from prepare import *; "
            "prepare(load_config(PrepareConfig, sys.argv[1:])); "
            "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
        )
        command = [sys.executable, "-c", script, *arguments(folder, folder / "out"), *settings]
        result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        peaks.append(int(result.stdout.split()[-1]) / 1000)
    assert peaks[1] < peaks[0] + 15, f"{peaks} MB for 4 and 32 MB of text"
