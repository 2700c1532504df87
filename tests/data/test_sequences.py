import json
import random
from collections import Counter
from itertools import pairwise

import pytest

from data import sequences
from data.documents import Document, Rejection
from data.sequences import (
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
    SPECIALS,
    FormatConfig,
    notebook,
    plain,
    restore,
    sequence,
)
from data.tokenizer import Special, train_tokenizer
from runtime.errors import UserError

DOCUMENT = Document("def f(x):\n    return x  # <fim_middle> é\n", "user/repo", "src/f.py", (), "Python", 42)
TEXTS = [DOCUMENT.text, "x", "\n", "<fim_prefix><|endoftext|>\x00", "naïve\n" * 50]


def test_the_specials_are_starcoders_in_its_order():
    assert len(SPECIALS) == 18 and SPECIALS[0] == "<fim_prefix>" and SPECIALS[-1] == "<reponame>"


@pytest.mark.parametrize("spm", [False, True])
def test_a_filled_in_document_can_be_put_back_together(spm):
    for text in TEXTS:
        for seed in range(50):
            pieces = sequences.fill_in_the_middle(text, random.Random(seed), spm)
            assert restore(pieces) == text
            markers = [piece for piece in pieces if isinstance(piece, Special)]
            assert markers == [FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE]


def test_all_of_it_comes_back_through_tokens_too():
    tokenizer = train_tokenizer(TEXTS * 3, 300).with_specials(SPECIALS)
    config = FormatConfig(metadata_rate=0.5, fim_rate=0.7)
    names = {i: Special(name) for name, i in tokenizer.specials.items()}
    kinds = Counter()
    for number in range(200):
        document = DOCUMENT._replace(text=TEXTS[number % len(TEXTS)], path=f"{number}.py")
        pieces = sequence(document, config, seed=3)
        assert pieces == sequence(document, config, seed=3)
        assert restore(pieces) == document.text
        (ids,) = tokenizer.encode_documents([pieces])
        back, run = [], []
        for i in [*ids[:-1].tolist(), None]:
            if i is None or i in names:
                back += [tokenizer.decode(run)] if run else []
                back += [names[i]] if i is not None else []
                run = []
            else:
                run.append(i)
        assert back == pieces
        kinds["fim"] += FIM_MIDDLE in [piece for piece in pieces if isinstance(piece, Special)]
        kinds["spm"] += any(a == FIM_PREFIX and b == FIM_SUFFIX for a, b in pairwise(pieces))
        kinds.update(piece for piece in pieces if isinstance(piece, Special) and "fim" not in piece)
    assert 115 < kinds["fim"] < 165 and 45 < kinds["spm"] < 95
    assert all(75 < kinds[name] < 125 for name in ("<reponame>", "<filename>", "<gh_stars>"))


def test_metadata_is_starcoders_prefix():
    assert sequence(DOCUMENT, FormatConfig(metadata_rate=1.0), 0) == [
        *("<reponame>", "user/repo", "<filename>", "src/f.py", "<gh_stars>", "10-100\n" + DOCUMENT.text)
    ]
    buckets = [(0, "0"), (1, "1-10"), (10, "1-10"), (11, "10-100"), (1000, "100-1000"), (1001, "1000+")]
    for stars, bucket in buckets:
        assert f"{bucket}\n{DOCUMENT.text}" in sequence(
            DOCUMENT._replace(stars=stars), FormatConfig(metadata_rate=1.0), 0
        )
    unknown = DOCUMENT._replace(stars=None, repo="")
    assert sequence(unknown, FormatConfig(metadata_rate=1.0), 0)[0] == "<filename>"
    assert sequence(DOCUMENT, FormatConfig(), 0) == plain(DOCUMENT) == [DOCUMENT.text]


def cell(kind: str, source: str | list[str], outputs: list | None = None) -> dict:
    return {"cell_type": kind, "source": source} | ({} if outputs is None else {"outputs": outputs})


def test_a_notebook_becomes_text_code_and_output():
    cells = [
        cell("markdown", ["# Title\n", "words"]),
        cell("code", "print(1)", [{"output_type": "stream", "text": ["\x1b[31m1\x1b[0m\n"]}]),
        cell("code", " \n", []),
        cell("code", "x = 2", [{"output_type": "display_data", "data": {"image/png": "AAAA"}}]),
        cell("code", "1/0", [{"output_type": "error", "ename": "ZeroDivisionError", "evalue": "division by zero"}]),
    ]
    document = notebook(Document(json.dumps({"cells": cells}), "a/b", "n.ipynb", (), sequences.NOTEBOOK))
    assert document.text == "# Title\nwords\nprint(1)\nx = 2\n1/0"
    assert (
        sequence(document, FormatConfig(fim_rate=1.0, metadata_rate=1.0), 0)
        == plain(document)
        == [
            *("<jupyter_start>", "<jupyter_text>", "# Title\nwords"),
            *("<jupyter_code>", "print(1)", "<jupyter_output>", "1\n"),
            *("<jupyter_code>", "x = 2", "<empty_output>"),
            *("<jupyter_code>", "1/0", "<jupyter_output>", "ZeroDivisionError: division by zero"),
        ]
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"cells": 1}', '{"cells": [{"cell_type": "code"}]}', "[" * 100_000])
def test_a_malformed_notebook_is_rejected(text):
    assert notebook(Document(text, "a/b", "n.ipynb")) == Rejection("malformed notebook", "a/b: n.ipynb")


def test_rates_out_of_range_are_refused():
    with pytest.raises(UserError, match=r"fim_rate is 50.0; it must be in 0 .. 1"):
        FormatConfig(fim_rate=50.0)
