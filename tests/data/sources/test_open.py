from pathlib import Path

import pytest

from data.documents import Document, Input, Rejection, SourceConfig
from data.sources.open import open_source
from runtime.errors import UserError

LIMIT = 2**24


def opened(**settings) -> list[Input]:
    return open_source(SourceConfig(**settings), Path("downloads"), {})


def records(inputs: list[Input]) -> list[Document | Rejection]:
    return [record for item in inputs for record in item.records(skip=0)]


def test_local_source_reads_this_pythons_standard_library_and_packages():
    inputs = opened(source="local")
    repos = {file.repo for item in inputs for file in item.files}
    assert {"python/json", "torch", "numpy"} <= repos
    document = next(record for record in inputs[0].records(skip=0) if isinstance(record, Document))
    assert document.text == inputs[0].files[0].file.read_text(encoding="utf-8") and document.language == "Python"


def test_several_sources_are_joined_in_order(corpus, tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    inputs = opened(source=f"dir:{tmp_path} ; files:{corpus}/*.gz")
    assert len(inputs) == 3 and inputs[0].name == "a.py"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("lokal", "--source=lokal: unknown; use local, dir:PATH, files:GLOB"),
        ("files:/nowhere/*.gz", "no file matches; check the path, and quote the pattern"),
        ("dir:/nowhere", "--source=dir:/nowhere: no such folder"),
        ("commits:/", "not a git checkout with commits"),
    ],
)
def test_sources_that_are_not_there_are_refused(source, message):
    with pytest.raises(UserError, match=message.replace("*", r"\*")):
        opened(source=source)
