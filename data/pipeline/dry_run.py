"""A dry run: some documents through every step in memory, and what is dropped."""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from data.cleaning import duplicates
from data.documents import Document, Input, Rejection
from data.pipeline import report
from data.pipeline.assemble_shards import EXACT, NEAR, STATUS
from data.pipeline.learn_tokenizer import make_tokenizer
from data.pipeline.steps import Draft, RefineConfig, Refinery, Tally, is_validation

READ_INPUTS = 4  # the documents come from at most this many inputs, spread over the source


def preview(config: RefineConfig, inputs: list[Input], n_documents: int) -> dict[str, int]:
    """Take about `n_documents`, the first of some inputs, through every step and print what is dropped and how it
    begins; returns how many for each reason."""
    tally = Tally()
    chosen = [inputs[place] for place in np.unique(np.linspace(0, len(inputs) - 1, READ_INPUTS).astype(int))]
    read = {item: list(islice(item.records(skip=0), -(-n_documents // len(chosen)))) for item in chosen}
    for rejection in (record for records in read.values() for record in records if isinstance(record, Rejection)):
        tally.reject(rejection.reason, rejection.where)
    documents = {item: [d for d in records if isinstance(d, Document)] for item, records in read.items()}
    tokenizer = make_tokenizer(config, (document.text for some in documents.values() for document in some))
    refinery = Refinery(config, tokenizer)
    drafts = [
        draft for item, some in documents.items() for draft in refinery.refine(some, is_validation(item, config), tally)
    ]
    for reason, copy, original in _duplicates(drafts, config):
        tally.drop(reason, copy.document, f", as {original.document.repo}: {original.document.path}")
    n_read = sum(map(len, documents.values()))
    print(report.examples(tally.cases, tally.rejected, n_read))
    print(f"\n{n_read:,} documents read, {sum(tally.rejected.values()):,} dropped; nothing was written")
    return dict(tally.rejected)


def _duplicates(drafts: list[Draft], config: RefineConfig) -> Iterator[tuple[str, Draft, Draft]]:
    """Later copies: the reason, the copy, and the document it is a copy of."""
    firsts: dict[bytes, Draft] = {}
    for draft in drafts:
        if config.exact_duplicates and draft.digest in firsts:
            yield STATUS[EXACT], draft, firsts[draft.digest]
        else:
            firsts[draft.digest if config.exact_duplicates else str(len(firsts)).encode()] = draft
    chosen = [draft for draft in firsts.values() if draft.sketch]
    if config.near_threshold is not None and chosen:
        keys, signatures = (np.array([draft.sketch[place] for draft in chosen]) for place in (0, 1))
        first = duplicates.near_duplicates(keys.T, signatures, np.ones(len(chosen), bool), config.near_threshold)
        pairs = zip(chosen, first, strict=True)
        yield from ((STATUS[NEAR], draft, chosen[f]) for draft, f in pairs if draft is not chosen[f])
