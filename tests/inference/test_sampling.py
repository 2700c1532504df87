import pytest
import torch

from inference.sampling import Sampling, choose_token


def test_top_k_and_top_p_keep_what_they_say():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(2000, 1)

    def drawn(**options):
        sampling = Sampling(**{"temperature": 1.0, "top_p": None, **options})
        return set(choose_token(logits, sampling, torch.Generator().manual_seed(0)).tolist())

    assert drawn() == {0, 1, 2, 3} and drawn(top_k=2) == {0, 1} and drawn(top_k=9) == {0, 1, 2, 3}
    assert drawn(top_p=0.79) == {0, 1} and drawn(top_p=0.81) == {0, 1, 2} and drawn(top_p=0.1) == {0}
    assert drawn(temperature=0.0) == {0} and drawn(temperature=0.01) == {0}
    share = (
        (choose_token(logits, Sampling(temperature=1.0, top_p=None), torch.Generator().manual_seed(0)) == 0)
        .float()
        .mean()
    )
    assert share == pytest.approx(0.5, abs=0.05)
