from types import SimpleNamespace

from data.pipeline.split import is_validation, split_of


def test_train_and_validation_share_no_repository_and_meet_the_fraction():
    repos = [f"user{i}/repo" for i in range(10_000)]
    in_val = sum(split_of(repo, 0, 0.1) == "val" for repo in repos)
    assert 900 < in_val < 1100  # and split_of sees the repository alone, so a repository is on one side as a whole
    assert {split_of(repo, 1, 0.1) for repo in repos if split_of(repo, 0, 0.1) == "val"} == {"train", "val"}


def test_an_input_is_validation_by_its_file_name_its_path_or_its_publishers_word():
    item = SimpleNamespace(name="raw/b/file-2.json.gz")
    found = {glob: is_validation(item, glob) for glob in ("file-2*", "file-1*", "b/file*", "raw/*/file*")}
    assert found == {"file-2*": True, "file-1*": False, "b/file*": False, "raw/*/file*": True}
    assert not is_validation(item, None) and is_validation(SimpleNamespace(name="x", held_out=True), None)
