import pytest

from runtime.files import atomic_write


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    with atomic_write(path) as file:
        file.write("é")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "é" and list(tmp_path.iterdir()) == [path]


def test_the_file_before_is_kept_under_its_name(tmp_path):
    for content in (b"1", b"2", b"3"):
        with atomic_write(tmp_path / "last", "wb", keep=tmp_path / "previous") as file:
            file.write(content)
    assert (tmp_path / "last").read_bytes() == b"3" and (tmp_path / "previous").read_bytes() == b"2"
