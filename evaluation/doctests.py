"""A prompt's doctests as the code that checks a completion of it."""

import ast
import contextlib
import doctest
import io
import tokenize
import warnings

from runtime.errors import UserError

# Has the program show each example, and compares what it shows as doctest's own runner does. Its imports are not at the
# top, because a program may use those of its check.
CHECK = r'''
def fault(source, want, wanted_error, flags):
    """What an example should show and what it shows; None if they agree."""
    import doctest, program, re

    got, error = program.__display__(source)
    got += "" if not got or got.endswith("\n") else "\n"
    same = doctest.OutputChecker().check_output
    if error is None:
        right = same(want, got, flags)
    elif wanted_error is None:
        right = False
    else:
        error = re.sub(r"^( .*\n)+", "", error)  # the lines that show where a SyntaxError is
        right = same(wanted_error, error, flags)
        if not right and flags & doctest.IGNORE_EXCEPTION_DETAIL:
            right = same(*map(doctest._strip_exception_details, (wanted_error, error)), flags)
    expected = want if wanted_error is None else wanted_error
    return None if right else f"{brief(source)}: expected {brief(expected)}, got {brief(error or got)}"


def brief(text):
    return " ".join(text[:2000].split())[:200] or "nothing"


faults = [found for example in EXAMPLES if (found := fault(*example)) is not None]
assert not faults, f"{len(faults)} of N_EXAMPLES doctests fail; the first: {faults[0]}"
'''


def doctest_check(prompt: str, asked_by: str, instead: str) -> str:
    """The code that runs the doctests of `prompt`. They are judged by what the program does, whatever has become of the
    docstring. Raises UserError if the prompt has none, or malformed ones; the message names what asked for them and
    what could be given instead."""
    parser = doctest.DocTestParser()
    try:
        found = [example for text in docstrings(prompt) for example in parser.get_examples(text)]
    except ValueError as error:  # its line number and what is wrong with it
        raise UserError(f"{asked_by}: the prompt's doctests are malformed: {error}; correct them") from None
    examples = []
    for example in found:
        flags = sum(flag for flag, on in example.options.items() if on)
        if not flags & doctest.SKIP:
            examples.append((example.source, example.want, example.exc_msg, flags))
    if not examples:
        raise UserError(f"{asked_by}: the prompt has no doctests, >>> lines in docstrings; add some, or give {instead}")
    return CHECK.replace("N_EXAMPLES", str(len(examples))).replace("EXAMPLES", repr(examples))


def docstrings(source: str) -> list[str]:
    """The docstrings in which doctest looks for examples: those of the module, of its functions and classes, and of
    their methods. `source` may break off anywhere, within a docstring too."""
    return max((_docstrings(source + end) for end in ("", '\n"""', "\n'''")), key=len)


def _docstrings(source: str) -> list[str]:
    """The docstrings of a text up to where it is no Python."""
    found: list[str] = []
    owners: list[str] = []  # of the blocks around a line, the first word of the line before the block
    line: list[str] = []  # the tokens of a line
    kinds: set[int] = set()  # and their types
    first, word = True, ""
    with contextlib.suppress(tokenize.TokenError, SyntaxError):
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.INDENT:
                owners.append(word)
                first = True
            elif token.type == tokenize.DEDENT:
                owners.pop()
            elif token.type == tokenize.NEWLINE:
                owned = not owners or owners[-1] in ("def", "async", "class")
                seen = not {"def", "async"} & {*owners[:-1]}  # doctest does not look into functions
                if first and owned and seen and kinds == {tokenize.STRING}:
                    found.append(_text(" ".join(line)))
                first, word = False, "".join(line[:1])
                line, kinds = [], set()
            elif token.type not in (tokenize.NL, tokenize.COMMENT):
                line.append(token.string)
                kinds.add(token.type)
    return found


def _text(literals: str) -> str:
    """The text that string literals stand for; "" if it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes that Python does not know
        try:
            value = ast.literal_eval(f"({literals})")
        except (ValueError, SyntaxError):  # a format string, a wrong escape
            return ""
    return value if isinstance(value, str) else ""
