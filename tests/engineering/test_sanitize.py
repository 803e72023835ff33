"""The sanitizer script reports tests that pass, fail, skip, exceed their limit or have a fault."""

import importlib.util
import sys

import pytest

from tests.engineering.sandbox import ROOT

spec = importlib.util.spec_from_file_location("sanitize", ROOT / "scripts/sanitize.py")
assert spec
assert spec.loader
sanitize = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sanitize)


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("print('1 passed in 1s')", "clean"),
        ("print('1 skipped in 1s')", "skipped"),
        ("raise SystemExit(99)", "found"),
        ("raise SystemExit(1)", "failed"),
        ("import time; time.sleep(60)", "cut"),
    ],
)
def test_outcomes(tmp_path, code, outcome):
    limit = 1 if outcome == "cut" else 30
    assert sanitize.run([sys.executable, "-c", code], limit, tmp_path / "log") == outcome


def test_the_table_counts_and_names_what_was_not_clean():
    results = {("memcheck", "a::b"): "clean", ("memcheck", "a::c"): "cut", ("racecheck", "a::b"): "not run"}
    lines = sanitize.table(results).splitlines()
    assert lines[2].split() == ["memcheck", "1", "0", "0", "1", "0", "0"]
    assert lines[3].split() == ["racecheck", "0", "0", "0", "0", "0", "1"]
    assert lines[-2:] == ["cut      memcheck   a::c", "not run  racecheck  a::b"]
