"""A dry run: takes some documents through every step in memory and shows what would be dropped."""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from data.cleaning import duplicates
from data.documents import Document, Input, Rejection
from data.pipeline import report
from data.pipeline.assemble_shards import EXACT, NEAR, STATUS
from data.pipeline.learn_tokenizer import make_tokenizer, spread
from data.pipeline.split import is_validation
from data.pipeline.steps import Draft, PipelineConfig, Refinery
from data.pipeline.tally import Tally

READ_INPUTS = 4  # the documents come from at most this many inputs


def preview(config: PipelineConfig, inputs: list[Input], n_documents: int) -> dict[str, int]:
    """Takes about `n_documents` through every step and prints what is dropped. Returns the number dropped by reason."""
    tally = Tally()
    chosen = spread(inputs, READ_INPUTS)
    documents: dict[bool, list[Document]] = {True: [], False: []}  # by whether their input goes to validation
    for item in chosen:
        for record in islice(item.records(skip=0), -(-n_documents // len(chosen))):
            if isinstance(record, Rejection):
                tally.reject(record.reason, record.where)
            else:
                documents[is_validation(item, config.val_files)].append(record)
    tokenizer = make_tokenizer(config, (document.text for some in documents.values() for document in some))
    refinery = Refinery(config, tokenizer)
    drafts = [draft for to_val, some in documents.items() for draft in refinery.refine(some, to_val, tally)]
    for reason, copy, original in _duplicates(drafts, config):
        tally.drop(reason, copy.document, f", as {original.document.repo}: {original.document.path}")
    n_read = sum(map(len, documents.values()))
    print(report.examples(tally.cases, tally.rejected, n_read))
    print(f"\n{n_read:,} documents read, {sum(tally.rejected.values()):,} dropped; nothing was written")
    return dict(tally.rejected)


def _duplicates(drafts: list[Draft], config: duplicates.DedupConfig) -> Iterator[tuple[str, Draft, Draft]]:
    """For each later copy: the reason to drop it, the copy, and the document that it repeats."""
    firsts: dict[bytes, Draft] = {}
    distinct: list[Draft] = []
    for draft in drafts:
        original = firsts.setdefault(draft.digest, draft) if config.exact_duplicates else draft
        if original is draft:
            distinct.append(draft)
        else:
            yield STATUS[EXACT], draft, original
    sketched = [draft for draft in distinct if draft.sketch is not None]
    if config.near_threshold is None or not sketched:
        return
    keys = np.array([draft.sketch[0] for draft in sketched])
    signatures = np.array([draft.sketch[1] for draft in sketched])
    first = duplicates.near_duplicates(keys.T, signatures, np.ones(len(sketched), bool), config.near_threshold)
    for index, draft in enumerate(sketched):
        if first[index] != index:
            yield STATUS[NEAR], draft, sketched[first[index]]
