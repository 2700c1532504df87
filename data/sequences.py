"""Turns documents into sequences: plain, with StarCoder's metadata, for filling in the middle, or from a notebook.

A sequence is a list of pieces. A Special stands for a special token, any other string is ordinary text. Random choices
depend only on the seed and the document. `restore` turns a sequence back into the text.

Sources: StarCoder (specials, metadata, notebooks, commits); Bavarian et al., "Efficient training of language models to
fill in the middle", 2022 (PSM and SPM, cut by characters).
"""

import json
import random
import re
from dataclasses import dataclass

from data.documents import Document, Rejection
from data.tokenizer import Special
from runtime.errors import UserError

NOTEBOOK = "Jupyter Notebook"
FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX = map(Special, ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"))
FIM_PAD, FILENAME, STARS, REPO = map(Special, ("<fim_pad>", "<filename>", "<gh_stars>", "<reponame>"))
# StarCoder's special tokens in its order, without end-of-text, which every tokenizer here has already.
SPECIALS = (
    *(FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX, FIM_PAD, FILENAME, STARS),
    *map(Special, ("<issue_start>", "<issue_comment>", "<issue_closed>")),
    *map(Special, ("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>")),
    *map(Special, ("<commit_before>", "<commit_msg>", "<commit_after>")),
    REPO,
)
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
MAX_OUTPUT = 2000  # characters of a cell's output that are kept


@dataclass(frozen=True)
class FormatConfig:
    metadata_rate: float = 0.0  # chance for each of repository, file name and stars to precede a training document
    fim_rate: float = 0.0  # share of training documents cut and reordered for filling in the middle
    spm_rate: float = 0.5  # share of fill-in-the-middle documents ordered suffix, prefix, middle (SPM, not PSM)
    notebooks: bool = False  # turn .ipynb files into their text, code and output; False keeps the JSON

    def __post_init__(self) -> None:
        for name in ("metadata_rate", "fim_rate", "spm_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be in 0 .. 1")


def sequence(document: Document, config: FormatConfig, seed: int) -> list[str]:
    """The pieces of a training document. The sections of a notebook or commit keep their order."""
    if document.sections or not (config.metadata_rate or config.fim_rate):
        return plain(document)
    chance = random.Random(f"{seed}\0{document.repo}\0{document.path}\0{document.text}")
    metadata = _metadata(document, config.metadata_rate, chance)
    code = [document.text]
    if chance.random() < config.fim_rate:
        code = fill_in_the_middle(document.text, chance, spm=chance.random() < config.spm_rate)
    return _joined([*metadata, "\n", *code] if metadata else code)


def plain(document: Document) -> list[str]:
    """The pieces of a validation document: its text, or the sections of a notebook or commit with their markers."""
    if not document.sections:
        return [document.text]
    return _joined([piece for marker, text in document.sections for piece in (Special(marker), text) if piece])


def fill_in_the_middle(text: str, chance: random.Random, spm: bool) -> list[str]:
    """Cuts the text at two uniformly random positions into prefix, middle and suffix, and puts the middle last. In SPM
    the prefix stands right before the middle, without a marker between them."""
    start, end = sorted((chance.randint(0, len(text)), chance.randint(0, len(text))))
    prefix, middle, suffix = text[:start], text[start:end], text[end:]
    if spm:
        return [FIM_PREFIX, FIM_SUFFIX, suffix, FIM_MIDDLE, prefix + middle]
    return [FIM_PREFIX, prefix, FIM_SUFFIX, suffix, FIM_MIDDLE, middle]


def restore(pieces: list[str]) -> str:
    """The text of a document from the pieces that `sequence` made of it."""
    texts: dict[str, str] = {}
    marker = ""
    for piece in pieces:
        if isinstance(piece, Special):
            marker = piece
            texts[marker] = ""
        else:
            texts[marker] = texts.get(marker, "") + piece
    if FIM_MIDDLE in texts:
        return texts[FIM_PREFIX] + texts[FIM_MIDDLE] + texts[FIM_SUFFIX]
    return texts[marker].partition("\n")[2] if marker in (REPO, FILENAME, STARS) else texts[marker]


def notebook(document: Document) -> Document | Rejection:
    """The notebook as sections: each cell's text, or its code and output. `text` becomes the sources of all cells."""
    where = f"{document.repo}: {document.path}"
    sections: list[tuple[str, str]] = []
    sources = []
    try:
        for cell in json.loads(document.text)["cells"]:
            source = _text(cell["source"])
            if not source.strip():
                continue
            sources.append(source)
            if cell["cell_type"] == "code":
                output = ANSI.sub("", "".join(map(_output, cell["outputs"])))[:MAX_OUTPUT]
                sections.append(("<jupyter_code>", source))
                sections.append(("<jupyter_output>", output) if output.strip() else ("<empty_output>", ""))
            else:
                sections.append(("<jupyter_text>", source))
        text = "\n".join(sources)
        "".join(section for _, section in sections).encode()  # a lone surrogate raises
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Rejection("malformed notebook", where)
    if not sections:
        return Rejection("empty", where)
    return document._replace(text=text, sections=(("<jupyter_start>", ""), *sections), language=NOTEBOOK)


def _metadata(document: Document, rate: float, chance: random.Random) -> list[str]:
    pieces: list[str] = []
    for marker, value in ((REPO, document.repo), (FILENAME, document.path), (STARS, _bucket(document.stars))):
        drawn = chance.random() < rate  # also for an unknown value, so that later draws do not depend on it
        if drawn and value:
            pieces += [marker, value.replace("\n", " ")]
    return pieces


def _bucket(stars: int | None) -> str:
    if stars is None:
        return ""
    if stars <= 0:
        return "0"
    for low, high in ((1, 10), (10, 100), (100, 1000)):
        if stars <= high:
            return f"{low}-{high}"
    return "1000+"


def _joined(pieces: list[str]) -> list[str]:
    """The pieces without empty texts, and with neighbouring texts joined, so that they are tokenized as one."""
    joined: list[str] = []
    for piece in pieces:
        if joined and not isinstance(piece, Special) and not isinstance(joined[-1], Special):
            joined[-1] = joined[-1] + piece
        elif piece:
            joined.append(piece)
    return joined


def _text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def _output(output: dict) -> str:
    """The text of one output of a cell; pictures are left out."""
    if output["output_type"] == "stream":
        return _text(output["text"])
    if output["output_type"] == "error":
        return f"{output['ename']}: {output['evalue']}"
    return _text(output["data"].get("text/plain", ""))
