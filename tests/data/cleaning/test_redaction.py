import ast
import gzip
import json
import time

import pytest

from data.cleaning.redaction import Redactor


@pytest.fixture(scope="module")
def redactor() -> Redactor:
    return Redactor()


# Keys are put together here, so that this file holds none for other scanners to find.
AWS = "AKIA" + "IOSFODNN7EXAMPLQ"
GITHUB = "ghp_" + "a1B2c3D4" * 4 + "e5F6"
SLACK = "xoxb-" + "123456789012-123456789012-" + "abcdEFGHijklMNOPqrstUVWX"
JWT = "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"


@pytest.mark.parametrize(
    ("text", "expected", "kinds"),
    [
        ("# by Ann <ann.o'x+y@mail.acme.co.uk>", "# by Ann <ann.o'<EMAIL>>", {"email": 1}),
        ("author = 'ann@acme.io', 'bob@acme.io'", "author = '<EMAIL>', '<EMAIL>'", {"email": 2}),
        ("git clone git@github.com:a/b; me@example.com", None, {}),
        ("@property\n@app.route('/')\nx = y @ z", None, {}),
        ("hosts = ['52.3.4.5', '52.3.4.6', '52.3.4.5']", "hosts = ['10.0.0.2', '10.0.0.3', '10.0.0.2']", {"ipv4": 3}),
        ("ok = '10.1.2.3', '127.0.0.1', '192.168.0.1', '8.8.8.8', '1.1.1.1', '999.1.1.1'", None, {}),
        ("__version__ = '52.3.4.5'; v52.3.4.5; oid 1.3.6.1.4.1", None, {}),
        (
            "dns = '2a01:4f8:c17::2 2001:4860:4860::8888 fe80::1 ::1'",
            "dns = 'fd00::1 2001:4860:4860::8888 fe80::1 ::1'",
            {"ipv6": 1},
        ),
        ("x[1::2], x[::-1], 12:30:45, std::vector::size", None, {}),
        (f"key = '{AWS}'", "key = '<KEY>'", {"key": 1}),
        (f"token: {GITHUB}\nslack = '{SLACK}'", "token: <KEY>\nslack = '<KEY>'", {"key": 2}),
        (f"Bearer {JWT}", "Bearer <KEY>", {"key": 1}),
        ("url = 'https://ann:hunter22pw@acme.io/x'", "url = 'https://ann:<KEY>@acme.io/x'", {"key": 1}),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7\nabcdefghijklmnop=\n-----END RSA PRIVATE KEY-----",
            "-----BEGIN RSA PRIVATE KEY-----\n<KEY>\n<KEY>\n-----END RSA PRIVATE KEY-----",
            {"key": 2},
        ),
    ],
)
def test_what_is_personal_is_replaced_and_what_is_not_stays(text, expected, kinds, redactor):
    redacted, counts = redactor.redact(text, None)
    assert redacted == (text if expected is None else expected)
    assert counts == kinds


def test_python_that_parsed_before_parses_after(redactor):
    text = "def f(weights, user):\n    # mail ann@acme.io\n    return weights@user.data, 'bob@acme.io'\n"
    redacted, counts = redactor.redact(text, "Python")
    assert redacted == text.replace("ann@acme.io", "<EMAIL>").replace("bob@acme.io", "<EMAIL>")
    ast.parse(redacted)
    assert counts == {"email": 2}
    assert redactor.redact("weights@user.data", "Go")[0] == "<EMAIL>"
    assert redactor.redact("\ufeff" + text, "Python") == ("\ufeff" + redacted, counts)


def test_only_the_secret_itself_is_replaced(redactor):
    text = "db = 'postgres://postgres:postgres@acme.io'\nimport postgres\n"
    assert redactor.redact(text, None)[0] == "db = 'postgres://postgres:<KEY>@acme.io'\nimport postgres\n"


@pytest.mark.parametrize(
    "unit", ["/", "a", "@", "a.", "1.", ":", "=", "'", "-", "a@", "AKIA", "-----BEGIN PRIVATE KEY-----"]
)
def test_no_text_takes_long(unit, redactor):
    t0 = time.process_time()  # not wall-clock time, which other programs lengthen
    redactor.redact(unit * (300_000 // len(unit)), "Python")
    assert time.process_time() - t0 < 5


def test_this_pythons_library_still_parses_and_keeps_all_but_what_was_found(corpus, redactor):
    n_found = 0
    for path in corpus.glob("*.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["content"]
                redacted, counts = redactor.redact(text, "Python")
                ast.parse(redacted)
                assert bool(counts) == (redacted != text)
                n_found += counts.total()
    assert n_found > 10  # its authors' addresses
