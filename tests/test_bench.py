import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import BenchConfig, bench
from runtime.config import load_config

ROOT = Path(__file__).parent.parent
TINY = (
    *("--n_layer=1", "--n_head=2", "--n_embd=32", "--vocab_size=300", "--block_size=32", "--batch_size=2"),
    *("--rounds=2", "--steps=2", "--decode_rounds=2", "--decode_prompt=8", "--decode_tokens=12"),
    *("--decode_batches=1,3", "--peer_batches=3", "--device=cpu", "--compile=False"),
)
# What bench.py uses of a nanoGPT checkout, in few lines.
PEER = """
import dataclasses, torch
@dataclasses.dataclass
class GPTConfig:
    n_layer: int; n_head: int; n_embd: int; block_size: int; vocab_size: int; dropout: float; bias: bool
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
    def forward(self, idx, targets=None):
        logits = self.wte(idx) @ self.wte.weight.t()
        if targets is None:
            return logits[:, [-1]], None
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("a peer that prints")
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        for _ in range(max_new_tokens):
            idx = torch.cat((idx, self(idx)[0][:, -1].softmax(-1).multinomial(1)), dim=1)
        return idx
"""


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout of nanoGPT, where there is one, else a model with its interface."""
    if (ROOT / ".peers" / "nanoGPT" / "model.py").is_file():
        return ROOT / ".peers" / "nanoGPT"
    folder = tmp_path_factory.mktemp("peer")
    (folder / "model.py").write_text(PEER)
    return folder


@pytest.fixture(scope="module")
def timed(peer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, Path]:
    """What one run of the program, with all that it can do, printed to stdout and saved; and its file."""
    output = tmp_path_factory.mktemp("bench") / "tiny.json"
    hf = importlib.util.find_spec("transformers") is not None
    command = [sys.executable, "bench.py", *TINY, f"--peer={peer}", f"--hf={hf}", "--profile", f"--output={output}"]
    command.append("--parts=train,eval,loader,decode,serve")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads(output.read_text()), output


def test_the_json_holds_every_figure_with_its_rounds(timed):
    printed, saved, _ = timed
    ours = {row: systems["codegpt"] for row, systems in saved["figures"].items()}
    decoding = [f"decode_{n}_{figure}" for n in (1, 3) for figure in ("first_token_ms", "tokens_per_s")]
    memory_and_loader = ("train_peak_memory_mb", "loader_tokens_per_s", "loader_percent_of_a_step")
    serving = ("serve_1_tokens_per_s", "serve_16_times_serve_1", "serve_seen_percent_of_unseen")
    expected = {"train_tokens_per_s", "train_tflop_per_s", "eval_tokens_per_s", *memory_and_loader, *decoding, *serving}
    assert expected <= set(ours)
    for row, figure in ours.items():
        assert 0 < figure["min"] <= figure["median"] <= figure["max"], row
        assert len(figure["rounds"]) == (1 if "memory" in row else 2)
    assert saved["config"]["tokens_per_step"] == 2 * 32, "one micro-step, as it was timed"
    speed, flops = ours["train_tokens_per_s"]["median"], saved["machine"]["flops_per_token"]
    assert ours["train_tflop_per_s"]["median"] == pytest.approx(speed * flops / 1e12)
    assert "train tokens/s" in printed and "a peer that prints" not in printed


def test_a_peer_is_timed_beside_ours_and_the_ratios_are_those_of_each_round(timed):
    _, saved, _ = timed
    assert set(saved["ratios"]["train_tokens_per_s"]) == {"nanoGPT"}
    assert "nanoGPT" in saved["ratios"]["eval_tokens_per_s"] and "nanoGPT" in saved["ratios"]["decode_3_tokens_per_s"]
    assert "decode_1_tokens_per_s" not in saved["ratios"], "--peer_batches does not name 1"
    for row, others in saved["ratios"].items():
        for name, ratio in others.items():
            systems = saved["figures"][row]
            pairs = zip(systems["codegpt"]["rounds"], systems[name]["rounds"], strict=True)
            assert ratio["rounds"] == pytest.approx([ours / theirs for ours, theirs in pairs])


def test_decoding_is_timed_beside_transformers_with_the_same_settings(timed):
    pytest.importorskip("transformers")
    _, saved, _ = timed
    assert "transformers" in saved["ratios"]["decode_3_tokens_per_s"]
    assert "transformers" not in saved["ratios"]["train_tokens_per_s"]


def test_profile_names_ten_operations_and_writes_a_trace(timed):
    printed, saved, output = timed
    operations = saved["profile"]
    assert len(operations) == 10 and all(row["operation"][:80] in printed for row in operations)
    times = [row["ms_per_step"] for row in operations]
    assert times == sorted(times, reverse=True) and 0 < sum(row["percent"] for row in operations) <= 100
    assert not any(row["operation"].startswith("Optimizer.step") for row in operations), "annotations are none"
    assert Path(saved["trace"]).parent == output.parent
    assert json.loads(Path(saved["trace"]).read_text())["traceEvents"]


def test_a_step_is_one_micro_step_unless_asked_otherwise():
    config = load_config(BenchConfig, [str(ROOT / "configs" / "70m.py"), "--batch_size=3"])
    assert config.training_config().tokens_per_step == 3 * config.block_size
    longer = dataclasses.replace(config, micro_steps=4, ramp_doublings=1, ramp_steps=8).training_config()
    assert (longer.tokens_per_step, longer.ramp_doublings, longer.ramp_steps) == (12 * config.block_size, 0, 0)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--peer=nowhere", "error: --peer=nowhere: no model.py there; git clone https://github.com/karpathy/nanoGPT"),
        ("--parts=train,all", "error: --parts=train,all: 'all' is not one of train, eval, loader, decode"),
        ("--decode_batches=1,x", "error: --decode_batches=1,x: wants numbers joined by commas"),
        ("--rounds=0", "error: rounds is 0; it must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(argument, message, run_program):
    code, _, err = run_program(bench, BenchConfig, *TINY, argument)
    assert code == 2 and err.startswith(message) and err.count("\n") == 1


def test_a_killed_bench_leaves_no_process(tmp_path):
    """Its workers read the end of their pipes."""
    command = [sys.executable, "bench.py", *TINY, "--parts=train", "--steps=1", "--rounds=1000000"]
    with open(tmp_path / "out", "w") as out:
        environment = {**os.environ, "TMPDIR": str(tmp_path)}  # where it leaves its shards
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True, env=environment)
    time.sleep(6)
    assert process.poll() is None, (tmp_path / "out").read_text()
    process.kill()
    process.wait()
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("a worker went on")
