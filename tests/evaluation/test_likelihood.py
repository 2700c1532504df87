import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from data.tokenizer import load_tokenizer
from evaluation.likelihood import Scored, Scorer, load_scorer, pygments_tokens, score_documents, windows
from model import GPT, IGNORE, GPTConfig
from runtime.errors import UserError

TEXTS = ["def f(x):\n    return x + 1\n", "import os\n" * 30, "é = '🐍'\n", ""]


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=48, vocab_size=512)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def scorer(model, shards) -> Scorer:
    tokenizer = load_tokenizer(str(shards.path / "bpe.json"))
    return Scorer("ours", 48, tokenizer.end_of_text, tokenizer.encode, model.losses, torch.device("cpu"))


@torch.no_grad()
def nats_directly(model: GPT, scorer: Scorer, text: str, stride: int) -> float:
    """One forward pass per token, over what its window shows of the text before it."""
    ids = [scorer.start, *scorer.encode(text)]
    nats = 0.0
    for t in range(1, len(ids)):
        begin = max(0, math.ceil((t - scorer.context) / stride)) * stride
        logits = model(torch.tensor([ids[begin:t]]))[0, -1].double()
        nats -= logits.log_softmax(-1)[ids[t]].item()
    return nats


@pytest.mark.parametrize(("stride", "batch_size"), [(48, 16), (24, 3), (7, 1), (1, 5)])
def test_nats_are_those_of_a_direct_computation(model, scorer, stride, batch_size):
    scorer.totals.clear()
    score_documents(scorer, (("Python", text) for text in TEXTS), stride, batch_size)
    total = scorer.totals["Python"]
    nats = sum(nats_directly(model, scorer, text, stride) for text in TEXTS)
    assert total.tokens == sum(len(scorer.encode(text)) for text in TEXTS)
    assert total.bytes == sum(len(text.encode()) for text in TEXTS)
    assert total.nats / total.tokens == pytest.approx(nats / total.tokens, abs=1e-6)
    figures = total.figures()
    assert figures["perplexity"] == pytest.approx(math.exp(nats / total.tokens), rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / total.bytes, rel=1e-6)
    n_lexed = sum(pygments_tokens("Python", text) for text in TEXTS)
    assert figures["perplexity_per_pygments_token"] == pytest.approx(math.exp(nats / n_lexed), rel=1e-6)


@torch.no_grad()
def test_a_text_that_fits_the_context_scores_as_one_forward_pass(model, scorer):
    ids = torch.tensor([scorer.start, *scorer.encode(TEXTS[0])])
    assert len(ids) - 1 <= scorer.context
    whole = F.cross_entropy(model(ids[None, :-1])[0].double(), ids[1:], reduction="sum").item()
    for stride in (1, 10, 48):
        scorer.totals.clear()
        score_documents(scorer, [("Python", TEXTS[0])], stride, 4)
        assert scorer.totals["Python"].nats == pytest.approx(whole, rel=1e-6)


def test_every_token_is_a_target_once_with_the_context_that_the_stride_says():
    for n, context, stride in itertools.product((1, 2, 9, 10, 11, 37), (4, 10), (1, 3, 4)):
        ids = list(range(100, 100 + n))
        seen = {}
        for inputs, targets in windows(ids, context, stride):
            assert len(inputs) == len(targets) <= context
            for position, target in enumerate(targets):
                if target != IGNORE:
                    assert target not in seen and inputs[position] == target - 1
                    seen[target] = position + 1  # ids before it in its window
        assert sorted(seen) == ids[1:]
        assert all(had >= min(target - 100, context - stride + 1) for target, had in seen.items())


def test_pygments_tokens_are_those_of_the_language():
    assert pygments_tokens("Python", "x = 1\n") == 6  # x, space, =, space, 1, newline
    assert pygments_tokens("C++", "int x;") > 3 and pygments_tokens("Klingon", "x") is None
    total = Scored(1.0, 1, 1, 5)
    total.add(Scored(1.0, 1, 1, None))
    assert "perplexity_per_pygments_token" not in total.figures() and total.figures()["loss"] == 1.0


@torch.no_grad()
def test_a_hugging_face_folder_is_scored_as_it_scores_itself(tmp_path):
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS * 5, vocab_size=300, special_tokens=["<|endoftext|>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64, vocab_size=300)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    scorer = load_scorer(str(tmp_path), "last", torch.device("cpu"), torch.float32)
    assert scorer.context == 64
    score_documents(scorer, [("Python", TEXTS[0])], 64, 1)
    ids = torch.tensor([[fast.eos_token_id, *fast.encode(TEXTS[0])]])
    loss = model(ids, labels=ids).loss.item()
    assert scorer.totals["Python"].figures()["loss"] == pytest.approx(loss, abs=1e-6)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not a model that transformers can load"):
        load_scorer(str(tmp_path), "last", torch.device("cpu"), torch.float32)
