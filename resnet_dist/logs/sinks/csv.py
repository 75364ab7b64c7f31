"""The metrics of a run as a table, `metrics.csv`: a row per log line, a column per key."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from resnet_dist.files import write_file
from resnet_dist.logs.sinks.base import Attachment, Numbers, RunInfo

Row = Mapping[str, Any]


class CsvSink:
    """Append the metrics to metrics.csv.

    The file is rewritten when a new key needs a column.

    Attributes:
        name: The name of the sink.
        location: The path of the file, once `start` was called.
    """

    name = "CSV"
    location = "none"

    def __init__(self) -> None:
        self._path = Path()
        self._columns: list[str] = []

    def start(self, run: RunInfo) -> None:
        """Write the table of the earlier processes of the run, from metrics.jsonl."""
        self._path = run.folder / "metrics.csv"
        self.location = str(self._path)
        rows = [_numbers_of(record) for record in run.earlier]
        self._rewrite(rows)

    def log(self, step: int, values: Numbers) -> None:
        """Append a row.

        Args:
            step: The step that the values belong to.
            values: The metrics of this step.
        """
        row = {"step": step, **values}
        has_new_key = not set(row) <= set(self._columns)
        if has_new_key:
            rows = self._read_rows()
            self._rewrite([*rows, row])
            return
        line = _as_csv([row], self._columns)
        with open(self._path, "a", newline="") as file:
            file.write(line)

    def attach(self, step: int, key: str, item: Attachment) -> None:
        """Do nothing: the table holds numbers only."""

    def close(self, exit_code: int) -> None:
        """Do nothing: every row is written by `log`."""

    def _read_rows(self) -> list[Row]:
        """Read the rows that are in the file."""
        with open(self._path, newline="") as file:
            reader = csv.DictReader(file)
            return list(reader)

    def _rewrite(self, rows: list[Row]) -> None:
        """Replace the file by one with `rows` and a column for each of their keys."""
        # A dict keeps the order of the columns.
        columns = dict.fromkeys(["step", *self._columns])
        for row in rows:
            for key in row:
                columns[key] = None
        self._columns = list(columns)
        header = {column: column for column in self._columns}
        content = _as_csv([header, *rows], self._columns)
        write_file(self._path, content)


def _numbers_of(record: Row) -> Row:
    """Return the numbers of a line of metrics.jsonl.

    The times of the line and the lists with a number per rank are left out.
    """
    numbers = {}
    for key, value in record.items():
        if key in ("time", "elapsed", "elapsed_cpu"):
            continue
        if isinstance(value, (int, float)):
            numbers[key] = value
    return numbers


def _as_csv(rows: Iterable[Row], columns: list[str]) -> str:
    """Format rows as CSV.

    Args:
        rows: The values of each row by column; a missing one leaves its cell empty.
        columns: All columns, in order.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writerows(rows)
    return text.getvalue()
