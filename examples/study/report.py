"""Makes every table and figure of a study from its rows."""

import io
from pathlib import Path

from examples.study.definition import Study
from examples.study.figures import figures
from examples.study.results import Results
from examples.study.rows import FILE, read_rows
from examples.study.tables import tables
from examples.train.errors import TrainError
from examples.train.plots import DPI
from examples.train.whole_file import write_whole

TABLES = "tables.md"


def write_report(study: Study, folder: Path) -> list[Path]:
    """Writes tables.md and the figures beside the rows, and returns their paths.

    Raises:
        TrainError: there is no row, or the rows do not fit the study, or a file cannot be written.
    """
    rows = read_rows(folder / FILE, study)
    if not rows:
        raise TrainError(
            f"There is no row in {folder / FILE}: python -m examples.study --arms {study.name} --folder {folder} runs "
            "the study."
        )
    results = Results(study, rows)
    written = {folder / TABLES: tables(results).encode()}
    for name, figure in figures(results).items():
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=DPI, metadata={"Software": None})
        written[folder / name] = drawn.getvalue()
    try:
        for path, content in written.items():
            write_whole(path, content)
    except OSError as error:
        raise TrainError(
            f"The report cannot be written to {folder} ({error}): free space or move what is in the way."
        ) from error
    return [*written]
