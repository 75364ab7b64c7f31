"""The numbers of a run as a table, `metrics.csv`: a line per log line, a column per key."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from resnet_dist.files import write_file
from resnet_dist.sinks.base import Numbers, RunInfo

Row = Mapping[str, Any]


class CsvSink:
    """Appends to metrics.csv, and writes it anew when a new key needs a column."""

    name = "CSV"
    location = "none"

    def __init__(self) -> None:
        self._path = Path()
        self._columns: list[str] = []

    def start(self, run: RunInfo) -> None:
        """Write the table of the steps before this process, from metrics.jsonl."""
        self._path = run.folder / "metrics.csv"
        self.location = str(self._path)
        self._write_anew([_numbers_of(record) for record in run.earlier])

    def log(self, step: int, values: Numbers) -> None:
        """Append a line."""
        row = {"step": step, **values}
        if set(row) <= set(self._columns):
            with open(self._path, "a", newline="") as file:
                file.write(_as_csv([row], self._columns))
            return
        with open(self._path, newline="") as file:
            rows: list[Row] = list(csv.DictReader(file))
        self._write_anew([*rows, row])

    def close(self, exit_code: int) -> None:
        """Nothing is left to write."""

    def _write_anew(self, rows: list[Row]) -> None:
        columns = dict.fromkeys(["step", *self._columns])
        for row in rows:
            columns.update(dict.fromkeys(row))
        self._columns = list(columns)
        header = {column: column for column in self._columns}
        write_file(self._path, _as_csv([header, *rows], self._columns))


def _numbers_of(record: Row) -> Row:
    """The numbers of a line of metrics.jsonl, without times and without lists of ranks."""
    return {
        key: value
        for key, value in record.items()
        if isinstance(value, (int, float)) and key not in ("time", "elapsed")
    }


def _as_csv(rows: Iterable[Row], columns: list[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()
