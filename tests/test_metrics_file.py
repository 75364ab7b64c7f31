"""metrics.jsonl: each step once, whatever went wrong."""

import json
import os
import random
import resource

import pytest

from resnet_dist.logs.metrics_file import MetricsFile, read_metrics


def claimed():
    """A folder that nobody takes over."""


def start(folder, step, evaluated=True, check_claim=claimed):
    file = MetricsFile(folder / "metrics.jsonl", check_claim, evaluated)
    file.start(step)
    return file


def train_line(step):
    return {"step": step, "train/loss": 1.0}


def val_line(step):
    return {"step": step, "val/top1": 50.0}


def steps(folder):
    text = (folder / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line)["step"] for line in text.splitlines()]


class Disk:
    """A disk on which a file cannot grow beyond `room` bytes: a write is cut off there."""

    def __init__(self, room):
        self.room = room

    def __enter__(self):
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, self.limits[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


def test_lines_on_a_full_disk_are_written_later_and_are_never_torn(tmp_path):
    file = start(tmp_path, 0)
    file.append(train_line(1))
    with Disk((tmp_path / "metrics.jsonl").stat().st_size + 10):
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
    with Disk(0):
        # The lines that stay begin the file: it is cut, which needs no room.
        file = start(tmp_path, 2)
        assert steps(tmp_path) == [1, 2]
        with pytest.raises(OSError):
            file.append(train_line(3))
    file.append(train_line(4))
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_file_that_cannot_be_prepared_gets_no_line_before_it_is(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [train_line(1), train_line(2), val_line(2), train_line(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Disk(0):
        file = MetricsFile(path, claimed, evaluated=False)
        file.start(2)
        assert steps(tmp_path) == [1, 2]
    path.write_text('{"torn\n' + "".join(json.dumps(line) + "\n" for line in lines))
    with Disk(0):
        # Here the new content is no beginning of the old one.
        file = MetricsFile(path, claimed, evaluated=False)
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
    old = [train_line(1), train_line(2), {**train_line(2), "train/loss": 7.0}, val_line(2)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in old) + '{"step": 3, "tr')
    assert read_metrics(path) == [old[0], old[2], old[3]]
    start(tmp_path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [old[0], old[2], old[3]]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.slow
def test_any_sequence_of_faults(tmp_path):
    """Random kills, full disks and resumes: at the end of a run without faults, each step once.

    A checkpoint is written on the disk that takes the lines, so that a process resumes from a step
    whose line it could write.
    """
    for seed in range(200):
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        checkpoint = 0
        for _ in range(rng.randint(1, 6)):
            room = rng.choice([10**6, 10**6, rng.randint(0, 900)])
            with Disk(room):
                file = MetricsFile(folder / "metrics.jsonl", claimed, evaluated=False)
                try_to(file.start, checkpoint)
                if checkpoint % 2 == 0 and checkpoint:
                    try_to(file.append, val_line(checkpoint))
                for step in range(checkpoint + 1, checkpoint + rng.randint(1, 8)):
                    written = try_to(file.append, train_line(step))
                    if step % 2 == 0:
                        written = try_to(file.append, val_line(step))
                    if written and rng.random() < 0.3:
                        checkpoint = step
            if rng.random() < 0.3 and (folder / "metrics.jsonl").exists():
                with open(folder / "metrics.jsonl", "a") as torn:
                    torn.write('{"step": 9')
        file = start(folder, checkpoint, evaluated=False)
        if checkpoint % 2 == 0 and checkpoint:
            file.append(val_line(checkpoint))
        for step in range(checkpoint + 1, 41):
            file.append(train_line(step))
            if step % 2 == 0:
                file.append(val_line(step))
        expected = []
        for step in range(1, 41):
            expected.append(step)
            if step % 2 == 0:
                # The line of the evaluation.
                expected.append(step)
        assert steps(folder) == expected, seed


def try_to(function, *arguments):
    try:
        function(*arguments)
    except OSError:
        return False
    return True
