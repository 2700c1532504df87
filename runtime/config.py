"""Settings of a stage: one frozen dataclass, set by config files and --key=value arguments.

    python train.py configs/70m.py --batch_size=8    # applied from left to right over the defaults
    python train.py --help                           # every field, its default and its meaning

A config file is Python assignments to these fields; names that begin with `_` are its own variables.
"""

import ast
import dataclasses
import difflib
import inspect
import io
import os
import sys
import tokenize
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from runtime.errors import UserError

Config = TypeVar("Config")


def load_config(cls: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Build `cls`, a dataclass of scalars, from config files and arguments, applied from left to right.

    `argv` defaults to the command line. An argument is `FILE.py`, `--key=value`, `--key value` or, for a bool,
    `--key`. `--help` prints the fields and exits. Raises UserError naming the wrong file or flag.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    values: dict[str, Any] = {}
    while arguments:
        argument = arguments.pop(0)
        if argument in ("-h", "--help"):
            print(help_text(cls))
            raise SystemExit(0)
        if argument.startswith("--"):
            key, value = _read_flag(cls, argument, arguments)
            values[key] = value
        else:
            values.update(_read_file(cls, argument))
    return cls(**values)


def run_stage(entry: Callable[[Config], Any], cls: type[Config]) -> None:
    """Run `entry(load_config(cls))` as a program. A UserError or an OSError (a full disk, a file without permission)
    ends as one line on stderr and exit code 2. Any other exception is a bug and keeps its traceback."""
    if None in (sys.stdout, sys.stderr):  # closed by the shell, as in `python train.py 2>&-`
        nowhere = open(os.devnull, "w")  # noqa: SIM115 (stays open until the program ends)
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a character that the terminal cannot show must not end a run
    try:
        entry(load_config(cls))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader has left: `python sample.py | head`
        sys.stderr.close()
        sys.exit(141)
    except (UserError, OSError) as error:
        print("error: " + " ".join(str(error).split("\n")), file=sys.stderr)
        sys.exit(2)


def format_config(config: Any) -> str:
    """The resolved settings as one line, `key=value` in the order of the fields."""
    return " ".join(f"{key}={value!r}" for key, value in dataclasses.asdict(config).items())


def help_text(cls: type) -> str:
    """Usage, then each field of `cls` with its type, default and trailing comment."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # not None if it runs as `python -m`
    program = f"python -m {spec.name}" if spec is not None else f"python {sys.argv[0]}"
    hints, comments = typing.get_type_hints(cls), field_comments(cls)
    lines = [f"usage: {program} [CONFIG.py ...] [--key=value ...]", ""]
    for field in dataclasses.fields(cls):
        default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
        lines.append(f"  --{field.name}: {_type_name(hints[field.name])}{default}")
        lines.append(f"        {comments.get(field.name, '')}")
    return "\n".join(lines)


def field_comments(cls: type) -> dict[str, str]:
    """The trailing comments of the fields of the dataclass `cls`, inherited ones included."""
    comments = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        source = inspect.cleandoc("\n" + inspect.getsource(base))
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            name = token.line.split(":")[0].strip()
            if token.type == tokenize.COMMENT and name in cls.__dataclass_fields__:
                comments[name] = token.string.lstrip("# ")
    return comments


def _types(hint: Any) -> tuple[type, ...]:
    """The types that a hint allows: `int | None` gives (int, NoneType)."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _type_name(hint: Any) -> str:
    return " | ".join("None" if t is type(None) else t.__name__ for t in _types(hint))


def _require_field(cls: type, key: str, where: str) -> None:
    """Raise UserError, with the nearest known name, unless `cls` has a field called `key`."""
    names = [field.name for field in dataclasses.fields(cls)]
    if key not in names:
        nearest = difflib.get_close_matches(key.replace("-", "_"), names, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else "--help lists the known ones"
        own_names = "" if where.startswith("--") else " (a file's own names begin with _)"
        raise UserError(f"{where}: unknown key {key!r}; {hint}{own_names}")


def _read_flag(cls: type, argument: str, following: list[str]) -> tuple[str, Any]:
    """Key and value of `--key=value`, `--key value` (removed from `following`) or, for a bool, `--key`."""
    key, equals, text = argument[2:].partition("=")
    _require_field(cls, key, f"--{key}")
    hint = typing.get_type_hints(cls)[key]
    if not equals:
        if bool in _types(hint):
            text = following.pop(0) if following and following[0].lower() in ("true", "false") else "True"
        elif following and not following[0].startswith("--"):
            text = following.pop(0)
        else:
            raise UserError(f"--{key}: no value given; write --{key}=VALUE ({_type_name(hint)})")
    return key, _from_text(text, hint, f"--{key}={text}")


def _from_text(text: str, hint: Any, where: str) -> Any:
    """The value that `text` of the command line stands for, of a type that `hint` allows; else raises UserError."""
    allowed = _types(hint)
    if text == "None" and type(None) in allowed:
        return None
    if str in allowed:
        return text
    try:
        value = ast.literal_eval(text.capitalize() if text.lower() in ("true", "false") else text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval may raise
        value = text
    return _checked(value, hint, where)


def _checked(value: Any, hint: Any, where: str) -> Any:
    """`value` if `hint` allows its type (an int becomes a float where needed); else raises UserError."""
    allowed = _types(hint)
    if type(value) is int and float in allowed and int not in allowed and abs(value) < 1e300:
        return float(value)
    if type(value) not in allowed:
        raise UserError(f"{where}: wants {_type_name(hint)}, got {type(value).__name__} {value!r}")
    return value


def _read_file(cls: type, path: str) -> dict[str, Any]:
    """The settings that the config file `path` assigns."""
    file = Path(path)
    if not file.is_file():
        nearest = difflib.get_close_matches(path, [str(p) for p in Path("configs").rglob("*.py")], n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else "settings are given as --key=value"
        raise UserError(f"{path}: no such config file; {hint}")
    namespace: dict[str, Any] = {"__file__": path}
    try:
        exec(compile(file.read_text(encoding="utf-8-sig"), path, "exec"), namespace)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = getattr(error, "lineno", None) or (lines or ["?"])[-1]
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}; fix the config file") from None
    values = {key: value for key, value in namespace.items() if not key.startswith("_")}
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        _require_field(cls, key, path)
        values[key] = _checked(value, hints[key], f"{path}: {key}")
    return values
