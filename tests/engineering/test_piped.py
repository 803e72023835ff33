"""Commands whose output goes to a program that ends early, as in `python -m examples.train --help | head -1`."""

import ast
import os
import subprocess
import sys

import pytest

from jax_latent_moe.piped import STATUS
from tests.engineering.sandbox import ROOT

COMMANDS = "examples.train", "examples.study", "jax_latent_moe.plan", "benchmarks.gpu"
# Programs to be read, which take no options.
READ = {"examples/drop_in.py", "examples/maxtext_block.py", "examples/check_with_transformers.py"}


def without_a_reader(*arguments, stderr=subprocess.PIPE):
    """A Python process whose output nothing reads; with stderr=STDOUT, nothing reads its errors either."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": ""}
        command = [sys.executable, *arguments]
        return subprocess.run(command, stdout=writer, stderr=stderr, cwd=ROOT, env=environment, text=True, check=False)
    finally:
        os.close(writer)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_without_a_reader_prints_no_traceback(command):
    ended = without_a_reader("-m", command, "--help")
    assert (ended.returncode, ended.stderr) == (STATUS, "")


PROGRAM = """
import os, socket, sys
from jax_latent_moe.piped import piped
with piped():
    {}
"""


@pytest.mark.parametrize(
    "body",
    [
        "print('one line')",
        "print('x' * 100_000)",
        "print('a line', flush=True); print('another')",
        "print('a line'); sys.exit('error: a sentence')",
        "print('a line'); sys.exit()",
    ],
)
def test_a_program_without_a_reader(body):
    ended = without_a_reader("-c", PROGRAM.format(body))
    assert (ended.returncode, ended.stderr) == (STATUS, "")


def test_without_a_reader_of_its_errors():
    ended = without_a_reader("-c", PROGRAM.format("print('a line', file=sys.stderr)"), stderr=subprocess.STDOUT)
    assert ended.returncode == STATUS


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("print('a line')", 0, ""),
        ("print('a line'); sys.exit('error: a sentence')", 1, "error: a sentence\n"),
        ("a, b = socket.socketpair(); b.close(); a.send(b'1')", 1, "BrokenPipeError"),
        ("print('a line'); raise ValueError('a reason')", 1, "ValueError: a reason"),
    ],
)
def test_everything_else_is_as_without_it(body, status, said):
    """A broken socket among it: the output has its reader."""
    command = [sys.executable, "-c", PROGRAM.format(body)]
    ended = subprocess.run(command, capture_output=True, cwd=ROOT, text=True, check=False)
    assert ended.returncode == status
    assert said in ended.stderr
    assert bool(said) == bool(ended.stderr)
    assert ended.stdout == ("a line\n" if "a line" in body else "")


def programs():
    """The paths of all modules of the package, the examples and the benchmarks that run as commands."""
    for folder in ("jax_latent_moe", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name == "__main__.py" or '__name__ == "__main__"' in path.read_text():
                yield path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", sorted({*programs()} - READ))
def test_every_command_may_lose_its_reader(path):
    """All that it runs is within `piped`."""
    body = ast.parse((ROOT / path).read_text()).body
    guarded = body[-1].body if isinstance(body[-1], ast.If) else body[-1:]
    assert [ast.unparse(item) for item in guarded[0].items] == ["piped()"]
    assert len(guarded) == 1
