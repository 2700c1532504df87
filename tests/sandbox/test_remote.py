"""What a check learns of objects of its program, and what the program does not learn by it."""

import marshal

import pytest

from sandbox.judge import Judge
from sandbox.runner import run_program

PROGRAM = """
class Sly:
    n = 0
    def __float__(self):
        self.n += 1
        return float(self.n)
    def __len__(self): return 2
    def __iter__(self):
        self.n += 1
        return iter([self.n, self.n])
    def __getitem__(self, i): return 7
    def __eq__(self, other): return True
    def __sub__(self, other): return 0
    def __array_wrap__(self, *arguments): return True
    def step(self): return self.n
sly = Sly()
class Row(list):
    def __eq__(self, other): return True
row = Row([1, 2])
def count():
    while True: yield 1
"""


@pytest.fixture
def judge(connect) -> Judge:
    judge = connect(lambda end: run_program(end, marshal.dumps((PROGRAM, [])), "/"))
    judge.greet()
    judge.ask("run")
    return judge


def test_a_reading_has_one_answer_until_the_program_is_made_to_do_something(judge):
    sly = judge.look_up("sly")
    first = float(sly)
    assert float(sly) == first and [*sly] == [*sly] == [sly[0], sly[1]] and len(sly) == 2
    sly.step()
    assert float(sly) > first


def test_the_program_has_no_say_in_what_is_compared_with_plain_data(judge):
    sly = judge.look_up("sly")
    assert sly != 3
    with pytest.raises(TypeError):
        print(sly - 3)
    assert not hasattr(sly, "__array_wrap__")
    assert not judge.compared and sly == judge.look_up("Sly")() and judge.compared


def test_what_derives_from_a_container_is_compared_by_what_it_holds(judge):
    row = judge.look_up("row")  # sent as a list
    made = judge.look_up("Row")([1, 2])
    assert row == [1, 2] and made == [1, 2] and made != [1] and isinstance(made, list) and len(made) == 2


def test_an_iterator_of_the_program_has_an_end(judge, monkeypatch):
    monkeypatch.setattr("sandbox.remote.MAX_ITEMS", 50)
    with pytest.raises(ValueError, match="more than 50 items"):
        list(judge.look_up("count")())
