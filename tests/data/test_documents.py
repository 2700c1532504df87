from data.documents import fraction, language_named, language_of


def test_languages_are_named_by_extension_and_whatever_the_case():
    paths = ("a/b.PY", "x.tar.rs", "lib.hpp", "Makefile", "notes.ipynb", ".py")
    assert [language_of(path) for path in paths] == ["Python", "Rust", "C++", None, "Jupyter Notebook", None]
    assert [language_named(name) for name in ("python", "c++", "JAVASCRIPT", "Brainfuck")] == [
        *("Python", "C++", "JavaScript", "Brainfuck")
    ]


def test_fractions_are_spread_evenly_and_depend_on_the_key_alone():
    values = [fraction(f"key {i}") for i in range(10_000)]
    assert values == [fraction(f"key {i}") for i in range(10_000)] and len(set(values)) == 10_000
    assert all(900 < sum(int(10 * value) == tenth for value in values) < 1100 for tenth in range(10))
