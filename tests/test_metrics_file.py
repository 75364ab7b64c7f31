"""metrics.jsonl: each step once, whatever went wrong."""

import json
import os
import random
import resource

import pytest

from resnet_dist.logs.metrics_file import MetricsFile, read_metrics


def keep_folder():
    """In place of the check that raises once another process has taken over the folder."""


def start(folder, step, evaluated=True, check_claim=keep_folder):
    """The metrics file of a process that resumes from `step`."""
    path = folder / "metrics.jsonl"
    file = MetricsFile(path, check_claim, evaluated)
    file.start(step)
    return file


def train_line(step):
    return {"step": step, "train/loss": 1.0}


def val_line(step):
    return {"step": step, "val/top1": 50.0}


def as_text(lines):
    """The content of a file with these lines."""
    return "".join(json.dumps(line) + "\n" for line in lines)


def lines_in(folder):
    """The lines of a metrics file, none of which may be torn."""
    text = (folder / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def steps(folder):
    """The step of each line of a metrics file."""
    return [line["step"] for line in lines_in(folder)]


class Disk:
    """A disk on which a file cannot grow beyond `room` bytes: a write is cut off there."""

    def __init__(self, room):
        self.room = room

    def __enter__(self):
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        _, hard_limit = self.limits
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, hard_limit))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


def test_lines_on_a_full_disk_are_written_later_and_are_never_torn(tmp_path):
    file = start(tmp_path, 0)
    file.append(train_line(1))
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with Disk(room=size + 10):
        for step in (2, 3):
            with pytest.raises(OSError):
                file.append(train_line(step))
            assert steps(tmp_path) == [1]
    file.append(train_line(4))
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_full_disk_at_a_restart_doubles_no_line(tmp_path):
    file = start(tmp_path, 0)
    for step in (1, 2, 3):
        file.append(train_line(step))
    with Disk(room=0):
        # The lines that stay begin the file: it is cut, which needs no room.
        file = start(tmp_path, 2)
        assert steps(tmp_path) == [1, 2]
        with pytest.raises(OSError):
            file.append(train_line(3))
    file.append(train_line(4))
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_file_that_cannot_be_prepared_gets_no_line_before_it_is(tmp_path):
    """The file ends with a step that is trained again, on a disk that is full."""
    path = tmp_path / "metrics.jsonl"
    lines = [
        train_line(1),
        train_line(2),
        val_line(2),
        train_line(3),
    ]

    # The lines that stay begin the file: it is cut, which needs no room.
    path.write_text(as_text(lines))
    with Disk(room=0):
        start(tmp_path, 2, evaluated=False)
        assert steps(tmp_path) == [1, 2]

    # After a torn line, the new content is no beginning of the old one.
    path.write_text('{"torn\n' + as_text(lines))
    file = MetricsFile(path, keep_folder, evaluated=False)
    with Disk(room=0):
        with pytest.raises(OSError):
            file.start(2)
        with pytest.raises(OSError):
            file.append(train_line(3))
        assert path.read_text().count('"step": 3') == 1
    file.append(train_line(4))
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_process_that_was_superseded_writes_no_more(tmp_path):
    owner = ["first"]

    def is_first():
        if owner != ["first"]:
            raise ValueError("a newer attempt has taken over")

    first = start(tmp_path, 0, check_claim=is_first)
    for step in (1, 2, 3):
        first.append(train_line(step))
    owner[:] = ["second"]
    second = start(tmp_path, 2)
    for line in (train_line(3), val_line(3)):
        with pytest.raises(ValueError, match="newer attempt"):
            first.append(line)
    second.append(train_line(3))
    assert steps(tmp_path) == [1, 2, 3]


def test_a_line_that_is_written_while_another_process_takes_over_is_lost(tmp_path):
    """The check is passed, then the successor starts, then the line is written."""
    successors = []

    def take_over():
        if first_has_started:
            successors.append(start(tmp_path, 0))

    first_has_started = False
    first = start(tmp_path, 0, check_claim=take_over)
    first.append(train_line(1))
    first_has_started = True
    first.append(train_line(2))
    successors[0].append(train_line(1))
    assert steps(tmp_path) == [1]


def test_repeated_lines_are_removed_at_the_next_start_and_by_readers(tmp_path):
    """The last of the lines of a step counts, and a torn line does not."""
    path = tmp_path / "metrics.jsonl"
    first = train_line(1)
    repeated = train_line(2)
    second = {**train_line(2), "train/loss": 7.0}
    evaluation = val_line(2)
    text = as_text([first, repeated, second, evaluation])
    path.write_text(text + '{"step": 3, "tr')

    expected = [first, second, evaluation]
    assert read_metrics(path) == expected
    start(tmp_path, 2)
    assert lines_in(tmp_path) == expected
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


class FaultyRun:
    """A run with a line for each step and an evaluation after each second one.

    It is trained in sessions that random faults end. A checkpoint is written on the disk that takes
    the lines, so that a process resumes from a step whose line it could write.
    """

    def __init__(self, folder, seed):
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.rng = random.Random(seed)
        self.checkpoint = 0

    def train_with_faults(self):
        """One session: on a disk that may be full, a few steps, and a kill."""
        rng = self.rng
        room = rng.choice([10**6, 10**6, rng.randint(0, 900)])
        with Disk(room):
            file = MetricsFile(self.path, keep_folder, evaluated=False)
            try_to(file.start, self.checkpoint)
            start_step = self.checkpoint
            if is_evaluated(start_step):
                try_to(file.append, val_line(start_step))
            for step in range(start_step + 1, start_step + rng.randint(1, 8)):
                is_written = try_to(file.append, train_line(step))
                if is_evaluated(step):
                    is_written = try_to(file.append, val_line(step))
                if is_written and rng.random() < 0.3:
                    self.checkpoint = step
        if rng.random() < 0.3 and self.path.exists():
            with self.path.open("a") as file:
                file.write('{"step": 9')

    def train_to_the_end(self, last_step):
        """A session without faults."""
        file = start(self.folder, self.checkpoint, evaluated=False)
        if is_evaluated(self.checkpoint):
            file.append(val_line(self.checkpoint))
        for step in range(self.checkpoint + 1, last_step + 1):
            file.append(train_line(step))
            if is_evaluated(step):
                file.append(val_line(step))


def is_evaluated(step):
    return step > 0 and step % 2 == 0


def try_to(function, *arguments):
    """Whether a call succeeds; a disk that is full is no error here."""
    try:
        function(*arguments)
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_any_sequence_of_faults(tmp_path):
    """Random kills, full disks and resumes: at the end of a run without faults, each step once."""
    last_step = 40
    expected = []
    for step in range(1, last_step + 1):
        expected.append(step)
        if is_evaluated(step):
            # The line of the evaluation.
            expected.append(step)

    for seed in range(200):
        folder = tmp_path / str(seed)
        run = FaultyRun(folder, seed)
        num_sessions = run.rng.randint(1, 6)
        for _ in range(num_sessions):
            run.train_with_faults()
        run.train_to_the_end(last_step)
        assert steps(folder) == expected, seed
