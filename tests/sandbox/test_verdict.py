import pytest

from sandbox.verdict import FAILED, KILLED, PASSED, Result


@pytest.mark.parametrize(
    ("result", "detail"),
    [
        (Result(PASSED), ""),
        (Result(KILLED, "SIGKILL"), "SIGKILL"),
        (Result(FAILED, "AssertionError", 3), "line 3: AssertionError"),
        (Result(FAILED, "IndexError", 4, "list index\n\tout of range"), "line 4: IndexError: list index out of range"),
        (Result(FAILED, "E", None, "\x1b[2J\a"), "E: ?[2J?"),
    ],
)
def test_the_detail_of_a_result_is_one_printable_line(result, detail):
    assert result.detail == detail
    assert result.passed == (result.outcome == PASSED)
