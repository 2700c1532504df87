"""Finds words in a program with which it could pass a check that shares its interpreter.

There an answer decides itself how it compares, and a program that was written against these very files can reach the
check while it runs. A check in a process of its own is out of its reach.
"""

import re

TRICKS = (
    # answers that decide themselves how they compare
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__sub__", "__rsub__", "__abs__", "__bool__",
    "__contains__", "__getattribute__", "mock", "ANY",
    # code that runs while the check does, and ways from there to the check and to what it uses
    "__traceback__", "tb_frame", "gi_frame", "f_back", "_getframe", "currentframe", "inspect", "signal", "threading",
    "_thread", "__del__", "__globals__", "__main__", "builtins", "__builtins__", "setattr", "modules", "__subclasses__",
    "__array_interface__", "as_strided",
)  # fmt: skip
_TRICKS = re.compile(rf"\b(?:{'|'.join(TRICKS)})\b")
_IMPORTED = re.compile(r"^[ \t]*(?:import|from)[ \t]+(\w+)|\bas[ \t]+(\w+)", re.MULTILINE)
_ASSIGNED = re.compile(r"^[ \t]*((\w+)(?:\.\w+)+[ \t]*=)(?!=)", re.MULTILINE)


def interpreter_tricks(code: str) -> list[str]:
    """Returns the words of TRICKS in `code`, sorted, and `MODULE.NAME =` where it replaces an attribute of a module.
    Few honest programs have any of them, but a hit proves nothing."""
    modules = {name for pair in _IMPORTED.findall(code) for name in pair}
    replaced = {assigned for assigned, module in _ASSIGNED.findall(code) if module in modules}
    return sorted({*_TRICKS.findall(code), *replaced})
