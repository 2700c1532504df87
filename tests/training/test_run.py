import dataclasses
from pathlib import Path

import pytest
import torch

from runtime.config import load_config
from runtime.errors import UserError
from train import TrainConfig, train
from training import muon
from training.run import open_dataset, start_run
from weights.checkpoint import read


def test_a_run_keeps_the_arithmetic_it_began_in_unless_that_is_slow_here(run_config, tmp_path, monkeypatch):
    """A measurement near one must not change the bits of a continued run; Muon multiplies in the run's dtype too."""
    config = dataclasses.replace(run_config, dtype=None, optimizer="muon", max_steps=2)
    muons, orthogonalize = [], muon.orthogonalize

    def watched(matrices, dtype):
        muons.append(dtype)
        return orthogonalize(matrices, dtype)

    monkeypatch.setattr("training.muon.orthogonalize", watched)
    for max_steps, bf16_time, expected in ((2, 0.5, "bfloat16"), (3, 0.95, "bfloat16"), (4, 9.0, "float32")):
        monkeypatch.setattr("runtime.device._relative_time", lambda dtype, rows, width, times=bf16_time: times)
        train(dataclasses.replace(config, max_steps=max_steps))
        assert read(tmp_path / "run" / "last.pt")["dtype"] == expected
        assert muons[-1] == getattr(torch, expected)


def test_what_may_change_changes_when_a_run_goes_on(run_config):
    train(dataclasses.replace(run_config, max_steps=4))
    changed = dataclasses.replace(run_config, weight_decay=0.5, beta2=0.9, batch_size=8, log_interval=5)
    run = start_run(changed, open_dataset(changed))
    assert run.step == 4
    embeddings, rest, matrices = run.optimizers[0].param_groups
    assert (embeddings["weight_decay"], rest["weight_decay"], matrices["weight_decay"]) == (0.5, 0.0, 0.5)
    assert matrices["betas"] == (0.9, 0.9)
    assert all(state["step"] == 4 for state in run.optimizers[0].state.values())
    train(changed)


def test_fine_tuning_starts_from_the_weights_of_another_run(run_config, tmp_path):
    train(run_config)
    config = dataclasses.replace(run_config, init_from=run_config.out_dir, out_dir=str(tmp_path / "tuned"), seed=2)
    run = start_run(config, open_dataset(config))
    weights = read(Path(run_config.out_dir) / "last.pt")["model"]
    assert run.step == 0 and all(torch.equal(weights[k], v) for k, v in run.model.state_dict().items())
    with pytest.raises(UserError, match=r"--init_from=.*: n_layer is 2 there, 3 here; set those values here"):
        start_run(dataclasses.replace(config, n_layer=3), open_dataset(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--n_layer=3", "n_layer is 2 there, 3 here"),
        ("--seed=7", "seed is 1337 there, 7 here"),
        ("--tokens_per_step=512", "tokens_per_step is 256 there, 512 here"),
        ("--max_steps=5", "at step 12, beyond --max_steps=5; raise it"),
    ],
)
def test_a_run_does_not_go_on_with_other_shapes_or_data(change, message, run_arguments, run_config, run_program):
    train(run_config)
    before = (Path(run_config.out_dir) / "last.pt").read_bytes()
    code, _, err = run_program(train, TrainConfig, *run_arguments, change)
    assert code == 2 and message in err and err.count("\n") == 1
    assert (Path(run_config.out_dir) / "last.pt").read_bytes() == before


def test_a_run_does_not_go_on_with_a_dataset_prepared_anew(run_config, corpus, tmp_path):
    from small_corpus import SHARD_SETTINGS

    from prepare import PrepareConfig, prepare

    train(run_config)
    arguments = [f"--name={tmp_path / 'other'}", f"--source=files:{corpus}/*.gz", *SHARD_SETTINGS, "--seed=3"]
    prepare(load_config(PrepareConfig, arguments))
    with pytest.raises(UserError, match=r"the content of .* differs from it"):
        train(dataclasses.replace(run_config, dataset=str(tmp_path / "other")))


def test_a_compiler_that_fails_is_one_warning_and_training_goes_on(run_config, monkeypatch, capsys):
    def no_compiler(function, **options):
        def fail(*args):
            raise RuntimeError("no C++ compiler\nwas found")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    compiled = train(dataclasses.replace(run_config, compile=True))
    err = capsys.readouterr().err
    assert err.count("warning: torch.compile failed (no C++ compiler); continuing without it, slower") == 1
    eager = train(dataclasses.replace(run_config, out_dir=f"{run_config.out_dir}-eager"))
    assert compiled["val_loss"] == eager["val_loss"]
