"""Measure the data stage beside what one would use instead, and how near-duplicate search grows.

    python -m benchmark.data_stage speed HumanEval.jsonl.gz    # prepare.py beside datasets.map and tiktoken alone
    python -m benchmark.data_stage dedup 100000      # memory and seconds to find near duplicates among so many

`speed` takes 64 MB of the Python installed here, in four .json.gz files, and two workers. The rounds alternate; each
program runs in a process of its own and is timed from its start to its end.
"""

import gzip
import json
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT_BYTES = 64_000_000
CLEANING = (
    "--filters=codeparrot_v2",
    "--near_threshold=0.85",
    "--licenses=permissive",
)


def make_corpus(folder: Path) -> int:
    """Four .json.gz files in CodeParrot's columns; returns the bytes of text in them."""
    root = Path(sysconfig.get_paths()["purelib"])
    paths = sorted(path for path in root.rglob("*.py") if path.stat().st_size)
    random.Random(0).shuffle(paths)
    rows, n_bytes = [], 0
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        name = path.relative_to(root)
        rows.append({"repo_name": name.parts[0], "path": str(name), "content": text, "license": "mit"})
        n_bytes += len(text.encode())
        if n_bytes >= TEXT_BYTES:
            break
    for number in range(4):
        with gzip.open(folder / f"file-{number:012d}.json.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows[number::4])
    return n_bytes


def _lines(path: Path) -> list[bytes]:
    with gzip.open(path) as file:
        return file.readlines()


def tokenize_alone(folder: Path) -> None:
    """tiktoken's own batch encoder on text in memory; prints its seconds, reading aside."""
    import tiktoken

    encoding = tiktoken.get_encoding("cl100k_base")
    texts = [json.loads(line)["content"] for path in sorted(folder.glob("*.gz")) for line in _lines(path)]
    t0 = time.perf_counter()
    encoding.encode_ordinary_batch(texts, num_threads=2)
    print(time.perf_counter() - t0)


def datasets_map(folder: Path) -> None:
    """What nanoGPT does for OpenWebText: map with tiktoken in two processes, then write a memmap in batches."""
    import numpy as np
    import tiktoken
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    encoding = tiktoken.get_encoding("cl100k_base")

    def process(row: dict) -> dict:
        ids = [*encoding.encode_ordinary(row["content"]), encoding.eot_token]
        return {"ids": ids, "len": len(ids)}

    with tempfile.TemporaryDirectory() as cache:
        dataset = load_dataset("json", data_files=f"{folder}/*.gz", split="train", cache_dir=cache, num_proc=2)
        tokenized = dataset.map(process, remove_columns=dataset.column_names, num_proc=2)
        total = int(np.sum(tokenized["len"], dtype=np.uint64))
        array = np.memmap(f"{cache}/train.bin", dtype=np.uint32, mode="w+", shape=(total,))
        start, n_batches = 0, min(1024, len(tokenized))
        for number in range(n_batches):
            batch = tokenized.shard(num_shards=n_batches, index=number, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            array[start : start + len(ids)] = ids
            start += len(ids)
        array.flush()


def speed(problems: str, rounds: int = 3) -> None:
    cleaning = (*CLEANING, f"--decontaminate={problems}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n_bytes = make_corpus(folder)
        prepare = ["prepare.py", f"--source=files:{folder}/*.gz", "--tokenizer=cl100k_base", "--workers=2"]
        programs = {
            "tiktoken alone, text in memory": [__file__, "tokenize_alone", name],
            "prepare.py, cleaning off": [*prepare, f"--name={folder}/shards", "--exact_duplicates=False"],
            "prepare.py, all cleaning on": [*prepare, f"--name={folder}/shards", *cleaning],
            "  the same, nothing dropped": [*prepare, f"--name={folder}/shards", *cleaning, *_DROP_NOTHING],
            "datasets.map": [__file__, "datasets_map", name],
        }
        seconds: dict[str, list[float]] = {program: [] for program in programs}
        for _ in range(rounds):
            for program, command in programs.items():
                t0 = time.perf_counter()
                out = subprocess.run(
                    [sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True
                ).stdout
                seconds[program].append(float(out) if "alone" in program else time.perf_counter() - t0)
                subprocess.run(["rm", "-rf", f"{folder}/shards"], check=True)
        base = statistics.median(seconds["datasets.map"])
        alone = statistics.median(seconds["tiktoken alone, text in memory"])
        print(f"{n_bytes:,} bytes of Python, four .json.gz, two workers, median of {rounds} rounds")
        for program, times in seconds.items():
            s = statistics.median(times)
            print(
                f"{program:32} {s:6.2f} s ({min(times):.2f} .. {max(times):.2f})  {n_bytes / s / 1e6:5.1f} MB/s  "
                f"{base / s:4.2f} x datasets.map  {alone / s:4.2f} x tiktoken alone"
            )


# Every filter runs and none drops: the work of tokenizing is then the same as without.
_DROP_NOTHING = (
    *("--max_line_length=100000000", "--max_mean_line_length=1e9", "--min_alphanumeric=0", "--config_test_rate=0"),
    *("--no_keywords_rate=0", "--min_assignments=0", "--min_chars_per_token=0", "--near_threshold=1"),
)


def dedup(n_documents: int) -> None:
    """Sketches of made-up documents on disk, as prepare has them; then the search. A document takes 40 to 95% of the
    words of a file installed here and as many new ones as that leaves, so that many are somewhat alike; every tenth is
    a near copy of the one before."""
    sys.path.insert(0, str(ROOT))
    import numpy as np

    from data.cleaning.duplicates import MinHash, shingles

    paths = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    files = [shingles(path.read_text(encoding="utf-8", errors="replace"), 1) for path in paths[:: len(paths) // 4000]]
    files = [file for file in files if 50 <= len(file) <= 400]
    minhash, rng, chance = MinHash(0.85), np.random.default_rng(0), random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        keys = np.lib.format.open_memmap(f"{name}/keys.npy", "w+", np.uint64, (minhash.n_bands, n_documents))
        signatures = np.lib.format.open_memmap(f"{name}/signatures.npy", "w+", np.uint8, (n_documents, 256))
        np.save(f"{name}/digests.npy", rng.integers(0, 2**63, (n_documents, 2), dtype=np.uint64))
        t0, words = time.perf_counter(), files[0]
        for number in range(n_documents):
            file = words if number % 10 == 9 else chance.choice(files)
            n_kept = int(len(file) * (0.97 if number % 10 == 9 else chance.uniform(0.4, 0.95)))
            new = rng.integers(0, 2**32, len(file) - n_kept, dtype=np.uint32)
            words = np.concatenate([rng.permutation(file)[:n_kept], new])
            keys[:, number], signatures[number] = minhash.sketch(words)
        del keys, signatures
        print(f"{n_documents:,} documents, {n_documents // 10:,} near copies; made in {time.perf_counter() - t0:.0f} s")
        sys.stdout.flush()
        subprocess.run([sys.executable, __file__, "search", name, str(n_documents)], check=True)


def search(folder: str, n_documents: int) -> None:
    """The search alone, in a process of its own, so that its memory is its own."""
    sys.path.insert(0, str(ROOT))
    import numpy as np

    from data.cleaning.duplicates import MinHash, exact_duplicates, near_duplicates
    from data.pipeline.assemble_shards import RowsOnDisk

    base = _peak_mb()
    t0 = time.perf_counter()
    copies = exact_duplicates(np.load(f"{folder}/digests.npy"))
    t1 = time.perf_counter()
    bands = (np.array(np.load(f"{folder}/keys.npy", mmap_mode="r")[b]) for b in range(MinHash(0.85).n_bands))
    first = near_duplicates(bands, RowsOnDisk(Path(f"{folder}/signatures.npy")), ~copies, 0.85)
    found = int((first != np.arange(n_documents)).sum())
    print(
        f"found {found:,}; exact {t1 - t0:.1f} s, near {time.perf_counter() - t1:.1f} s; "
        f"peak memory {_peak_mb():.0f} MB, {base:.0f} MB of it before the search"
    )


def _peak_mb() -> float:
    """This process's peak, files' pages in its memory included; getrusage's counts its parent's, too."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1000


if __name__ == "__main__":
    if sys.argv[1:2] == ["speed"]:
        speed(sys.argv[2], *map(int, sys.argv[3:]))
    elif sys.argv[1:2] == ["dedup"]:
        dedup(int(sys.argv[2]))
    elif sys.argv[1:2] == ["search"]:
        search(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] in (["tokenize_alone"], ["datasets_map"]):
        globals()[sys.argv[1]](Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
