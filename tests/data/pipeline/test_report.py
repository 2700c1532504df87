import numpy as np

from data.pipeline.assemble_shards import EXACT, KEPT
from data.pipeline.report import examples, report_table, sum_up
from data.pipeline.work_units import DOCUMENT


def test_the_report_adds_units_up_and_says_what_was_chosen():
    counts = {"read": {"documents": 5, "bytes": 500}, "tokenize": {"documents": 3, "bytes": 300}}
    note = {"steps": counts, "rejected": {"long_line": 2}, "problems": {"HumanEval/3": 1}, "redacted": {"email": 4}}
    note |= {"seconds": {"read": 0.5}, "languages": {"Go": {"documents": 5, "bytes": 500}}}
    note |= {"documents": 3, "groups": [["train", "Go"]]}
    rows = np.zeros(6, DOCUMENT)
    rows["tokens"], rows["bytes"], rows["copies"] = 10, 100, [1, 2, 1, 1, 1, 1]
    report = sum_up([note, note], rows, np.array([KEPT, KEPT, KEPT, EXACT, KEPT, KEPT], np.uint8))
    steps = {step["step"]: {k: v for k, v in step.items() if k != "step"} for step in report["steps"]}
    assert steps["read"] == {"documents": 10, "bytes": 1000}
    assert steps["tokenize"] == {"documents": 6, "bytes": 600, "tokens": 60}
    assert steps["without exact duplicates"] == {"documents": 5, "bytes": 500, "tokens": 50}
    assert steps["shards"] == {"documents": 6, "bytes": 600, "tokens": 60}, "copies counted"
    assert report["rejected"] == {"long_line": 4, "exact duplicate": 1} and report["seconds"] == {"read": 1.0}
    assert report["languages"]["Go"] == {
        "read": {"documents": 10, "bytes": 1000},
        "kept": {"documents": 6, "bytes": 600, "tokens": 60},
    }
    text = report_table(report)
    assert "dropped, long_line: 4" in text and "HumanEval/3 2" in text and "redacted, email: 8" in text


def test_examples_give_filters_first_and_the_beginning_of_each_case():
    cases = {"empty": [("a/b: x", "")], "long_line": [("a/b: y", "one\ntwo\n" * 9)]}
    text = examples(cases, {"empty": 1, "long_line": 3}, 20)
    assert text.index("long_line: 3 of 20 (15.0%)") < text.index("empty: 1 of 20 (5.0%)")
    assert text.count("    | ") == 4
    assert examples({}, {}, 0) == "nothing was dropped"
