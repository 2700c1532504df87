"""A prompt's doctests as the code that checks a completion of it."""

import doctest

from runtime.errors import UserError

# Counts the examples, because a completion may define the function again without its docstring.
CHECK = """
import doctest, sys
done = doctest.testmod(sys.modules["program"])
assert done.attempted >= {}, f"only {{done.attempted}} doctests are left"
assert not done.failed, f"{{done.failed}} of {{done.attempted}} doctests fail"
"""


def doctest_check(prompt: str, asked_by: str, instead: str) -> str:
    """The code that runs the doctests of `prompt`. Raises UserError if it has none, or malformed ones; the message
    names what asked for them and what could be given instead."""
    try:
        n_examples = len(doctest.DocTestParser().get_examples(prompt))
    except ValueError as error:  # its line number and what is wrong with it
        raise UserError(f"{asked_by}: the prompt's doctests are malformed: {error}; correct them") from None
    if not n_examples:
        raise UserError(f"{asked_by}: the prompt has no doctests, >>> lines; add some, or give {instead}")
    return CHECK.format(n_examples)
