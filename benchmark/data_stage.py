"""Measures the data stage: its speed beside other programs, and how the search for near duplicates grows.

    python -m benchmark.data_stage speed HumanEval.jsonl.gz    # seconds of prepare.py, datasets.map, tiktoken alone
    python -m benchmark.data_stage dedup 100000                # seconds and memory to search 100,000 documents

`speed` prepares 64 MB of the Python installed here, from four .json.gz files, with two workers. The file of problems is
for decontamination. The programs take turns, for three rounds (a second argument sets another number). Each runs in a
process of its own and is timed from its start to its end, except that for tiktoken alone reading is not timed.
"""

import gzip
import json
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TEXT_BYTES = 64_000_000
NEAR = 0.85  # similarity of near duplicates
CLEANING = ("--filters=codeparrot_v2", f"--near_threshold={NEAR}", "--licenses=permissive")
# With these every filter runs and none drops a document, so that as many tokens are written as without cleaning.
DROP_NOTHING = (
    *("--max_line_length=100000000", "--max_mean_line_length=1e9", "--min_alphanumeric=0", "--config_test_rate=0"),
    *("--no_keywords_rate=0", "--min_assignments=0", "--min_chars_per_token=0", "--near_threshold=1"),
)
ALONE = "tiktoken alone, text in memory"


def speed(problems: str, rounds: int = 3) -> None:
    """Time prepare.py with and without cleaning, datasets.map, and tiktoken alone; print a row for each."""
    with tempfile.TemporaryDirectory() as folder:
        n_bytes = make_corpus(Path(folder))
        shards = Path(folder) / "shards"
        prepare = ("prepare.py", f"--source=files:{folder}/*.gz", "--tokenizer=cl100k_base", "--workers=2")
        cleaning = (*CLEANING, f"--decontaminate={problems}")
        programs = {
            ALONE: ("-m", "benchmark.data_stage", "tokenize_alone", folder),
            "prepare.py, cleaning off": (*prepare, f"--name={shards}", "--exact_duplicates=False"),
            "prepare.py, all cleaning on": (*prepare, f"--name={shards}", *cleaning),
            "  the same, nothing dropped": (*prepare, f"--name={shards}", *cleaning, *DROP_NOTHING),
            "datasets.map": ("-m", "benchmark.data_stage", "datasets_map", folder),
        }
        seconds: dict[str, list[float]] = {program: [] for program in programs}
        for _ in range(rounds):
            for program, arguments in programs.items():
                t0 = time.perf_counter()
                printed = run_python(*arguments)
                seconds[program].append(float(printed) if program == ALONE else time.perf_counter() - t0)
                shutil.rmtree(shards, ignore_errors=True)
    print(f"{n_bytes:,} bytes of Python, four .json.gz, two workers, median of {rounds} rounds")
    middle = {program: median(times) for program, times in seconds.items()}
    for program, s in middle.items():
        print(
            f"{program:32} {s:6.2f} s ({min(seconds[program]):.2f} .. {max(seconds[program]):.2f})  "
            f"{n_bytes / s / 1e6:5.1f} MB/s  {middle['datasets.map'] / s:4.2f} x datasets.map  "
            f"{middle[ALONE] / s:4.2f} x tiktoken alone"
        )


def run_python(*arguments: str) -> str:
    """What a Python program prints, run from the project's folder."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def make_corpus(folder: Path) -> int:
    """Write four .json.gz files with CodeParrot's columns; returns how many bytes of text they hold."""
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


def tokenize_alone(folder: str) -> None:
    """Encode text in memory with tiktoken's own batch encoder; prints the seconds."""
    import tiktoken

    encoding, texts = tiktoken.get_encoding("cl100k_base"), []
    for path in sorted(Path(folder).glob("*.gz")):
        with gzip.open(path) as file:
            texts += [json.loads(line)["content"] for line in file]
    t0 = time.perf_counter()
    encoding.encode_ordinary_batch(texts, num_threads=2)
    print(time.perf_counter() - t0)


def datasets_map(folder: str) -> None:
    """Do what nanoGPT does for OpenWebText: map with tiktoken in two processes, then write a memmap in batches."""
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


def dedup(n_documents: int) -> None:
    """Sketch made-up documents and write the sketches as prepare.py does; then run `search` on them in a process of its
    own. A document keeps 40 to 95% of the words of a file installed here and gets new words for the rest, so that many
    are somewhat alike. Every tenth is a near copy of the one before."""
    from data.cleaning.duplicates import MinHash, shingles

    paths = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    paths = paths[:: max(1, len(paths) // 4000)]
    files = [shingles(path.read_text(encoding="utf-8", errors="replace"), 1) for path in paths]
    files = [file for file in files if 50 <= len(file) <= 400]
    minhash, rng, chance = MinHash(NEAR), np.random.default_rng(0), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        keys = np.lib.format.open_memmap(f"{folder}/keys.npy", "w+", np.uint64, (minhash.n_bands, n_documents))
        signatures = np.lib.format.open_memmap(f"{folder}/signatures.npy", "w+", np.uint8, (n_documents, 256))
        np.save(f"{folder}/digests.npy", rng.integers(0, 2**63, (n_documents, 2), dtype=np.uint64))
        words, t0 = files[0], time.perf_counter()
        for number in range(n_documents):
            copied = number % 10 == 9
            file, kept = (words, 0.97) if copied else (chance.choice(files), chance.uniform(0.4, 0.95))
            n_kept = int(len(file) * kept)
            new = rng.integers(0, 2**32, len(file) - n_kept, dtype=np.uint32)
            words = np.concatenate([rng.permutation(file)[:n_kept], new])
            keys[:, number], signatures[number] = minhash.sketch(words)
        del keys, signatures  # written
        print(f"{n_documents:,} documents, {n_documents // 10:,} near copies; made in {time.perf_counter() - t0:.0f} s")
        print(run_python("-m", "benchmark.data_stage", "search", folder), end="")


def search(folder: str) -> None:
    """Search the sketches in `folder` for exact and near duplicates; prints how many, seconds, and the peak memory."""
    from data.cleaning.duplicates import MinHash, exact_duplicates, near_duplicates
    from data.pipeline.assemble_shards import RowsOnDisk

    before_mb, t0 = peak_mb(), time.perf_counter()
    copies = exact_duplicates(np.load(f"{folder}/digests.npy"))
    t1 = time.perf_counter()
    bands = (np.array(np.load(f"{folder}/keys.npy", mmap_mode="r")[band]) for band in range(MinHash(NEAR).n_bands))
    first = near_duplicates(bands, RowsOnDisk(Path(f"{folder}/signatures.npy")), ~copies, NEAR)
    found = int((first != np.arange(len(first))).sum())
    print(
        f"found {found:,}; exact {t1 - t0:.1f} s, near {time.perf_counter() - t1:.1f} s; "
        f"peak memory {peak_mb():.0f} MB, {before_mb:.0f} MB of it before the search"
    )


def peak_mb() -> float:
    """The most memory that this process has held (Linux), mapped files included. getrusage would also count what the
    parent held."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1000


def main(arguments: list[str]) -> None:
    match arguments:
        case ["speed", problems]:
            speed(problems)
        case ["speed", problems, rounds]:
            speed(problems, int(rounds))
        case ["dedup", n_documents]:
            dedup(int(n_documents))
        case [("search" | "tokenize_alone" | "datasets_map") as step, folder]:  # started by the two above
            {"search": search, "tokenize_alone": tokenize_alone, "datasets_map": datasets_map}[step](folder)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
