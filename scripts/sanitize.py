"""Runs the GPU tests under compute-sanitizer, one test per process, and prints a table of the outcomes.

    python scripts/sanitize.py --tool memcheck --tool racecheck --limit 240 --total 1500 tests/gpu

A test that exceeds its limit is "cut": nothing was found until then. The exit status is 1 if a tool found anything.
"""

import argparse
import collections
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 99
"""The exit status of compute-sanitizer if it found something."""


def main(arguments: list[str] | None = None) -> int:
    """Runs all tests within the total time; returns the exit status."""
    options = _parser().parse_args(arguments)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        sys.exit("error: compute-sanitizer is not on PATH: it comes with the CUDA toolkit.")
    start, results, logs = time.monotonic(), {}, options.logs
    logs.mkdir(parents=True, exist_ok=True)
    tests = collect(options.paths, options.keyword)
    for tool in options.tool or TOOLS:
        for index, test in enumerate(tests):
            left = options.total - (time.monotonic() - start)
            if left < 1:
                results[tool, test] = "not run"
                continue
            log = logs / f"{tool}-{index}.log"
            command = [
                sanitizer,
                "--tool",
                tool,
                "--error-exitcode",
                str(FOUND),
                sys.executable,
                "-m",
                "pytest",
                "-q",
                test,
            ]
            began = time.monotonic()
            results[tool, test] = run(command, min(options.limit, left), log)
            print(f"{tool:10} {results[tool, test]:8} {time.monotonic() - began:6.1f} s  {test}", flush=True)
    print(table(results))
    return int("found" in results.values())


def collect(paths: list[str], keyword: str) -> list[str]:
    """The ids of the tests in the paths."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--collect-only", "-q", "-k", keyword, *paths]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    tests = [line for line in listed.stdout.splitlines() if "::" in line]
    if not tests:
        sys.exit(f"error: pytest collected no test in {' '.join(paths)}:\n{listed.stdout}{listed.stderr}")
    return tests


def run(command: list[str], limit: float, log: pathlib.Path) -> str:
    """Runs a command within its limit: "clean", "found", "failed" (the test, not the tool), "skipped" or "cut"."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "cut"
    if status == 0:
        return "skipped" if " skipped" in log.read_text() and " passed" not in log.read_text() else "clean"
    return "found" if status == FOUND else "failed"


def table(results: dict[tuple[str, str], str]) -> str:
    """The table of outcomes: the number of tests by tool, then the name of each test that was not clean."""
    outcomes = ("clean", "found", "failed", "cut", "skipped", "not run")
    lines = ["", f"{'tool':10}" + "".join(f"{outcome:>9}" for outcome in outcomes)]
    for tool in dict.fromkeys(tool for tool, _ in results):
        counts = collections.Counter(outcome for (of, _), outcome in results.items() if of == tool)
        lines.append(f"{tool:10}" + "".join(f"{counts[outcome]:9}" for outcome in outcomes))
    others = [f"{outcome:8} {tool:10} {test}" for (tool, test), outcome in results.items() if outcome != "clean"]
    return "\n".join([*lines, "", *others])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", default=["tests/gpu"], help="what pytest collects")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="all of them unless given")
    parser.add_argument("--limit", type=float, default=240, help="seconds of one test")
    parser.add_argument("--total", type=float, default=3600, help="seconds of everything")
    parser.add_argument("-k", dest="keyword", default="", help="which tests, as for pytest")
    parser.add_argument("--logs", type=pathlib.Path, default=pathlib.Path("build/sanitizer"), help="folder of logs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
