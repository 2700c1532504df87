"""A dry run: some documents through every step in memory, and what is dropped."""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from data import dedup, report
from data.formats import SPECIALS
from data.publish import EXACT, NEAR, STATUS
from data.refine import RefineConfig, Refined, Refinery, Tally
from data.sources import Input, Rejection
from tokenizer import load_tokenizer, train_tokenizer


def preview(config: RefineConfig, inputs: list[Input], n_documents: int) -> dict[str, int]:
    """Take `n_documents`, the first of each input, through every step and print what is dropped and how it begins;
    returns how many for each reason."""
    tally, documents = Tally(), []
    per_input = -(-n_documents // len(inputs))
    for item in inputs:
        for record in islice(item.records(skip=0), per_input):
            if isinstance(record, Rejection):
                tally.reject(record.reason, record.where)
            else:
                documents.append(record)
    kind, _, size = config.tokenizer.partition(":")
    texts = (document.text for document in documents)
    tokenizer = train_tokenizer(texts, int(size)) if kind == "train" else load_tokenizer(config.tokenizer)
    refinery = Refinery(config, tokenizer.with_specials(SPECIALS))
    refined = refinery.refine(documents, False, tally)
    for reason, one, original in _duplicates(refined, config):
        tally.reject(reason, f"{_where(one)}, as {_where(original)}", one.document.text)
    for item in inputs:
        item.release()
    print(report.examples(tally.cases, tally.rejected, len(documents)))
    print(f"\n{len(documents):,} documents read, {sum(tally.rejected.values()):,} dropped; nothing was written")
    return dict(tally.rejected)


def _duplicates(refined: list[Refined], config: RefineConfig) -> Iterator[tuple[str, Refined, Refined]]:
    """Later copies among documents: the reason, the copy, and the document it is a copy of."""
    digests = np.array([np.frombuffer(one.digest, "<u8") for one in refined]).reshape(-1, 2)
    exact = dedup.exact_duplicates(digests) if config.exact_duplicates else np.zeros(len(refined), bool)
    firsts = {one.digest: one for one in reversed(refined)}
    yield from ((STATUS[EXACT], one, firsts[one.digest]) for one, copy in zip(refined, exact, strict=True) if copy)
    chosen = [one for one, copy in zip(refined, exact, strict=True) if not copy and one.sketch]
    if config.near_threshold is not None and chosen:
        keys, signatures = (np.array([one.sketch[place] for one in chosen]) for place in (0, 1))
        first = dedup.near_duplicates(keys.T, signatures, np.ones(len(chosen), bool), config.near_threshold)
        yield from (
            (STATUS[NEAR], one, chosen[f]) for i, (one, f) in enumerate(zip(chosen, first, strict=True)) if f != i
        )


def _where(one: Refined) -> str:
    return f"{one.document.repo}: {one.document.path}"
