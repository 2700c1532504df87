import json

import pytest

from plot import PlotConfig, plot


def write_run(folder, bpb, tokens_per_s=(100.0, 50.0)):
    folder.mkdir(parents=True)
    events = []
    for i, rate in enumerate(tokens_per_s, 1):
        seen = {"step": i, "tokens": 1000 * i, "bytes": 3500 * i, "flops": 10**9 * i}
        events.append({**seen, "loss": 5.0 - i, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": rate})
        events.append({**seen, "val_loss": 4.5 - i, "perplexity": 50.0, "val_bpb": bpb + 2 - i})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_the_table_has_means_spreads_and_gains_over_the_baseline(tmp_path):
    for name, bpb in (("plain/seed1", 2.2), ("plain/seed2", 2.4), ("muon/seed1", 2.0), ("muon/seed2", 2.1)):
        write_run(tmp_path / name, bpb)
    rows = plot(
        PlotConfig(f"{tmp_path}/plain/seed*;{tmp_path}/muon/seed*", f"{tmp_path}/a.svg", table=f"{tmp_path}/table.md")
    )
    assert rows["plain"]["val_bpb"] == pytest.approx(2.3) and rows["plain"]["seeds"].keys() == {"seed1", "seed2"}
    assert rows["plain"]["seconds"] == pytest.approx(1000 / 100 + 1000 / 50)
    write_run(tmp_path / "adamw/seed2", 2.3)
    write_run(tmp_path / "alone", 2.2)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].split(" | ")[3] == "improvement over plain, bits per byte"
    assert lines[2] == "| plain | 2 | 2.3000 ± 0.1414 |  | 0.01 | 2,000 | 2.00e+09 | 30 |"
    # the gain is 0.2 and 0.3, seed by seed
    assert lines[3] == "| muon | 2 | 2.0500 ± 0.0707 | +0.2500 ± 0.0500 | 0.01 | 2,000 | 2.00e+09 | 30 |"
    plot(PlotConfig(f"{tmp_path}/plain/*;{tmp_path}/adamw/*;{tmp_path}/alone", f"{tmp_path}/a.svg", f"{tmp_path}/t.md"))
    gains = [line.split(" | ")[3] for line in (tmp_path / "t.md").read_text().splitlines()[3:]]
    assert gains == ["+0.1000 (pairs: 1)", "+0.1000"]


def test_two_runs_of_one_name_are_not_taken_for_one(tmp_path, run_program):
    for name in ("a/tiny", "b/tiny"):
        write_run(tmp_path / name, 2.2)
    code, _, err = run_program(plot, PlotConfig, f"--runs={tmp_path}/*/tiny")
    assert code == 2 and "are both called tiny; rename" in err


def test_pictures_are_files_and_the_same_for_the_same_runs(tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "a", 2.2)
    for name in ("one.svg", "two.svg", "three.png"):
        plot(PlotConfig(f"{tmp_path}/a", f"{tmp_path}/{name}"))
    svg = (tmp_path / "one.svg").read_text()
    assert svg == (tmp_path / "two.svg").read_text() and "bytes of text seen" in svg
    assert (tmp_path / "three.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_shown_is_one_line(tmp_path, run_program):
    (tmp_path / "empty").mkdir()
    for argument, message in (
        (f"--runs={tmp_path}/none", "error: --runs="),
        (f"--runs={tmp_path}/empty", "metrics.jsonl: not found; name"),
        ("--output=a.pdf", "the name must end in"),
    ):
        code, _, err = run_program(plot, PlotConfig, argument)
        assert code == 2 and message in err and err.count("\n") == 1
