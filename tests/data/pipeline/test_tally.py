from data.documents import Document
from data.pipeline.tally import Tally


def test_every_rejection_counts_and_the_first_three_of_a_reason_are_kept():
    tally = Tally()
    for index in range(5):
        tally.drop("empty", Document(f"text {index}", "u/r", f"{index}.py"))
    tally.reject("not UTF-8", "somewhere")
    assert dict(tally.rejected) == {"empty": 5, "not UTF-8": 1}
    assert tally.cases["empty"] == [(f"u/r: {index}.py", f"text {index}") for index in range(3)]
    assert "cases" not in tally.counts() and tally.counts()["rejected"] == tally.rejected
