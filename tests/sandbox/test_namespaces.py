"""What a program sees of the machine in namespaces. Their walls are tested in test_confine.py, with the others."""

import sys

import pytest

from sandbox.pool import Sandbox

LOOK = """
import os
def processes(): return os.getppid(), [pid for pid in range(1, 300) if pid != os.getpid() and exists(pid)]
def exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
def roots(): return sorted(os.listdir('/'))
def read_only():
    try:
        open(os.__file__, 'a')
    except OSError:
        return True
def leave():
    open('kept', 'w').close()
    return os.listdir('.')
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="namespaces are Linux's")
def test_a_program_is_alone_with_python_and_each_with_its_own_folder():
    checks = [
        "parent, others = processes()\nassert parent == 1 and others == [1]",
        "assert {'boot', 'home', 'sys', 'var'}.isdisjoint(roots()) and read_only()",
        "assert leave() == ['kept']",
        "assert leave() == ['kept']",
    ]
    with Sandbox(1) as sandbox:
        if any(layer.startswith("namespaces") for layer in sandbox.missing):
            pytest.skip(f"this machine lacks {sandbox.missing}")
        for check in checks:
            result = sandbox.run(LOOK, check)
            assert result.passed and not result.shared, (check, result.detail)
