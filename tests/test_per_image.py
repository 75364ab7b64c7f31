"""Figures about an evaluation: their definitions, computed by hand or by another library, and that
they are the same on any number of ranks.
"""

import base64
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pyarrow.parquet
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from dist_utils import cpu_runtime, run_ranks
from image_files import encode, open_split, picture, write_split

from resnet_dist.config import DataConfig
from resnet_dist.data.pixels.loader import DaliValLoader, LoaderSettings
from resnet_dist.data.sources.scan import build_index
from resnet_dist.data.types import IGNORED_LABEL, Batch
from resnet_dist.evaluation.calibration import (
    equal_mass_bins,
    equal_width_bins,
    expected_calibration_error,
    measure_calibration,
)
from resnet_dist.evaluation.comparison import (
    paired_test,
    sign_test,
    student_quantile,
    summarize_seeds,
)
from resnet_dist.evaluation.confusion import find_confusions, results_per_class
from resnet_dist.evaluation.evaluation_file import (
    EvaluatedNetwork,
    describe_evaluation,
    read_evaluation,
    write_evaluation,
)
from resnet_dist.evaluation.image_collector import Collected, ImageCollector, results_of_batch
from resnet_dist.evaluation.loop import evaluate
from resnet_dist.evaluation.per_image import join_results, temperature_grid
from resnet_dist.evaluation.predictions_file import read_predictions, write_predictions
from resnet_dist.metrics import Counts
from resnet_dist.precision import Precision

NUM = 400
CLASSES = 8


def random_batch(seed=0, num=NUM, scale=3.0, first_row=0):
    """Logits that favour the label, some unreadable images, and equal logits."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (num,), generator=generator)
    noise = torch.randn(num, CLASSES, generator=generator)
    logits = noise + 1.5 * F.one_hot(labels, CLASSES)
    # Rounded to bf16, some of them are equal.
    logits = (scale * logits).bfloat16().float()
    labels[::50] = IGNORED_LABEL
    images = torch.zeros(num, 3, 2, 2)
    rows = np.arange(first_row, first_row + num)
    return Batch(images, labels, rows), logits


def test_rows_agree_with_the_counts_and_with_torch():
    batch, logits = random_batch()
    results = results_of_batch(batch, logits)

    losses = F.cross_entropy(logits, batch.labels, reduction="none")
    counts = Counts.of(logits, batch.labels, losses).result(CLASSES)
    assert results.is_hit.sum() == counts["correct1"]
    assert results.is_top5_hit.sum() == counts["correct5"]
    readable = results.is_readable
    assert readable.sum() == NUM - 8
    expected_losses = losses.numpy()[readable]
    assert np.allclose(results.losses[readable], expected_losses, atol=1e-5)

    probabilities = logits.softmax(1)
    predicted = logits.argmax(1).numpy()
    confidences = probabilities.amax(1).numpy()
    assert np.array_equal(results.top_classes[:, 0], predicted)
    assert np.allclose(results.confidences, confidences, atol=1e-6)

    some_label = batch.labels.clamp(min=0)
    targets = F.one_hot(some_label, CLASSES)
    squares = (probabilities - targets).square()
    brier = squares.sum(1).numpy()
    assert np.allclose(results.brier, brier, atol=1e-5)

    # Temperature 1 is in the grid.
    temperatures = temperature_grid()
    middle = len(temperatures) // 2
    assert temperatures[middle] == 1
    losses_at_one = results.tempered_losses[:, middle]
    assert np.allclose(losses_at_one, results.losses, atol=1e-5)


def test_logits_that_are_not_finite_are_no_hits():
    batch, logits = random_batch()
    logits[1] = math.nan
    logits[2, 0] = math.inf
    results = results_of_batch(batch, logits)
    assert np.flatnonzero(~results.is_finite).tolist() == [1, 2]
    assert not results.is_hit[1]
    assert not results.is_top5_hit[2]


def test_bins_by_hand():
    confidences = np.array([0.0, 1 / 15, 0.5, 0.52, 0.9, 1.0])
    hits = np.array([False, True, True, False, True, True])
    bins = equal_width_bins(confidences, hits)
    numbers = [each.num for each in bins]
    assert numbers == [2, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 1, 1]
    middle = bins[7]
    assert middle.accuracy == 0.5
    assert middle.confidence == pytest.approx(0.51)

    # The images of each bin that is not empty, times |accuracy - mean confidence|.
    error_of_first = 2 * abs(0.5 - 1 / 30)
    error_of_middle = 2 * abs(0.5 - 0.51)
    error_of_last_but_one = abs(1 - 0.9)
    error_of_last = abs(1 - 1.0)
    errors = error_of_first + error_of_middle + error_of_last_but_one + error_of_last
    assert expected_calibration_error(bins) == pytest.approx(errors / 6)

    confidences = np.linspace(0, 1, 32)
    hits = np.ones(32, dtype=bool)
    mass = equal_mass_bins(confidences, hits)
    numbers = [each.num for each in mass]
    assert numbers == [3, 3] + 13 * [2]
    assert mass[-1].confidence == pytest.approx(61 / 62)
    assert mass[0].confidence < mass[-1].confidence


def test_the_temperature_undoes_a_scale():
    """Logits of a calibrated network, times 2: the best temperature is 2."""
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(6000, CLASSES, generator=generator)
    probabilities = logits.softmax(1)
    labels = probabilities.multinomial(1, generator=generator)[:, 0]
    images = torch.zeros(6000, 3, 1, 1)
    batch = Batch(images, labels, np.arange(6000))
    results = results_of_batch(batch, 2 * logits)
    calibration = measure_calibration(results)
    scaling = calibration.scaling
    assert scaling.temperature == pytest.approx(2, rel=0.08)
    assert scaling.num == 3000
    assert not scaling.is_at_the_edge
    assert scaling.loss_after < scaling.loss_before
    assert scaling.ece_after < 0.03 < scaling.ece_before
    assert calibration.ece > 0.05
    assert calibration.ece_equal_mass > 0.05


def test_unreadable_images_are_misses_and_have_no_probabilities():
    batch, logits = random_batch()
    results = results_of_batch(batch, logits)
    calibration = measure_calibration(results)
    assert calibration.num == NUM - 8
    losses = results.losses[results.is_readable]
    mean_loss = losses.mean(dtype=np.float64)
    assert calibration.loss == pytest.approx(mean_loss)
    none_is_readable = np.zeros(NUM, dtype=bool)
    nothing = replace(results, is_readable=none_is_readable)
    assert measure_calibration(nothing) is None
    assert nothing.is_hit.sum() == 0


def test_classes_and_confusions():
    batch, logits = random_batch()
    results = results_of_batch(batch, logits)
    readable = results.is_readable
    labels = results.labels[readable]
    predictions = results.top_classes[readable, 0]
    matrix = np.zeros((CLASSES, CLASSES), dtype=int)
    for label, predicted in zip(labels, predictions, strict=True):
        matrix[label, predicted] += 1

    classes = results_per_class(results, CLASSES)
    assert sum(each.num for each in classes) == NUM
    accuracies = [each.correct1 / each.num for each in classes]
    assert accuracies == sorted(accuracies)
    for each in classes:
        assert each.correct1 == matrix[each.label, each.label]
        assert each.correct1 <= each.correct5

    confusions = find_confusions(results, CLASSES)
    counts = [each.num for each in confusions]
    assert counts == sorted(counts, reverse=True)
    for each in confusions:
        assert matrix[each.label, each.predicted] == each.num
    num_hits = np.trace(matrix)
    assert sum(counts) == matrix.sum() - num_hits


def test_parts_are_joined_in_the_order_of_the_index():
    first, first_logits = random_batch(0, 60, first_row=100)
    second, second_logits = random_batch(1, 40, first_row=0)
    first_part = results_of_batch(first, first_logits)
    second_part = results_of_batch(second, second_logits)
    joined = join_results([first_part, second_part])
    assert joined.rows.tolist() == [*range(40), *range(100, 160)]
    assert np.array_equal(joined.losses[:40], second_part.losses)
    with pytest.raises(AssertionError):
        join_results([first_part, first_part])


def test_the_paired_test_is_the_exact_binomial_test():
    assert sign_test(0, 0) == 1.0
    for wins, losses in ((3, 3), (0, 6), (12, 3), (700, 800), (10_000, 10_300)):
        test = scipy.stats.binomtest(wins, wins + losses)
        assert sign_test(wins, losses) == pytest.approx(test.pvalue, rel=1e-6)
        assert sign_test(wins, losses) == sign_test(losses, wins)

    first = np.arange(100) < 90
    second = np.arange(100) < 95
    test = paired_test(first, second)
    assert test.only_first == 0
    assert test.only_second == 5
    assert test.points == 5.0
    assert test.p_value == 0.0625
    assert not test.is_different


def test_seeds():
    for freedom in (1, 2, 3, 4, 9, 30):
        expected = scipy.stats.t.ppf(0.975, freedom)
        assert student_quantile(freedom) == pytest.approx(expected, rel=1e-9)

    summary = summarize_seeds([90.0, 91.0, 92.0])
    assert summary.mean == 91
    assert summary.deviation == 1
    error_of_mean = 1 / math.sqrt(3)
    low, high = scipy.stats.t.interval(0.95, 2, 91, error_of_mean)
    assert summary.interval.low == pytest.approx(low)
    assert summary.interval.high == pytest.approx(high)


def tiny_network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(48, CLASSES),
    )


def evaluate_images(rank, world_size, folder, options):
    """Evaluate; the main process writes evaluation.json and predictions.parquet."""
    runtime = cpu_runtime(rank, world_size)
    index = build_index(str(folder), "val", runtime)
    data = DataConfig(val_resize_size=20, val_crop_size=16, val_batch_size=8, **options)
    settings = LoaderSettings(torch.device("cpu"), torch.float32, 1, str(folder))
    loader = DaliValLoader(index, data, rank=rank, world_size=world_size, settings=settings)
    collector = ImageCollector(data)
    precision = Precision("fp32", torch.device("cpu"))
    model = tiny_network()
    counts = evaluate(model, loader, runtime, precision, collect=collector)
    collected = collector.gather(loader, runtime)
    loader.close()
    if collected is None:
        return None
    network = EvaluatedNetwork("tiny", "raw", 7, list(index.class_names))
    details = describe_evaluation(collected, network)
    write_evaluation(details, folder / "evaluation.json")
    write_predictions(collected, network, folder / "predictions.parquet")
    return counts.result(CLASSES)


@pytest.mark.slow
def test_files_are_the_same_on_any_number_of_ranks(tmp_path):
    """With one view and with several. One image is broken."""
    files = []
    for number in range(43):
        image = picture(24 + number % 5, 30, number)
        files.append(encode(image))
    files[9] = b"no image"
    write_split(tmp_path, files, classes=CLASSES, split="val")
    several_views = {"val_flip": True, "val_scales": (20, 24)}
    for options in ({}, several_views):
        alone = files_of_ranks(1, tmp_path, options)
        for world_size in (2, 3):
            assert files_of_ranks(world_size, tmp_path, options) == alone
        assert_agree(tmp_path, alone.counts)

    rows = pyarrow.parquet.read_table(tmp_path / "predictions.parquet").to_pylist()
    index = open_split(tmp_path, "val")
    names = [index.name(row) for row in range(43)]
    labels = index.labels_of(np.arange(43)).tolist()
    assert [row["path"] for row in rows] == names
    assert [row["label"] for row in rows] == labels
    assert rows[9]["loss"] is None
    assert rows[9]["top_classes"] is None
    assert len(rows[0]["top_probabilities"]) == 5


class Written(NamedTuple):
    """What an evaluation has written, and its counts."""

    evaluation: str
    predictions: bytes
    counts: dict[str, float | int]


def files_of_ranks(world_size, folder, options):
    """Evaluate on `world_size` ranks."""
    results = run_ranks(evaluate_images, world_size, folder, options)
    return Written(
        evaluation=(folder / "evaluation.json").read_text(),
        predictions=(folder / "predictions.parquet").read_bytes(),
        counts=results[0],
    )


def assert_agree(folder, counts):
    """Both files say what the counts say; image 9 of 43 cannot be decoded."""
    details = read_evaluation(folder / "evaluation.json")
    assert counts["correct1"] > 0
    assert details.is_hit.sum() == counts["correct1"]
    assert details.num_top5_hits == counts["correct5"]
    assert counts["num"] == 43
    assert len(details.is_hit) == 43
    assert sum(each.num for each in details.classes) == 43
    assert details.num_unreadable == 1
    assert details.calibration.num == 42

    confidences = [entry.confidence for entry in details.mistakes]
    assert confidences == sorted(confidences, reverse=True)
    assert len(confidences) == 12
    png = base64.b64decode(details.hits[0].png)
    assert png[:4] == b"\x89PNG"

    predictions = read_predictions(folder / "predictions.parquet")
    assert np.array_equal(predictions.is_hit, details.is_hit)
    assert predictions.images == details.images
    assert predictions.num_top5_hits == details.num_top5_hits


def nan_logits(rank, world_size, folder):
    """The error of each rank."""
    runtime = cpu_runtime(rank, world_size)
    batch, logits = random_batch(num=4, first_row=4 * rank)
    if rank == 1:
        logits[2] = math.nan
    collector = ImageCollector(DataConfig())
    collector(batch, logits)
    with pytest.raises(ValueError) as caught:
        collector.gather(SimpleNamespace(num_samples=8), runtime)
    return str(caught.value)


def test_nan_logits_are_an_error_on_every_rank(tmp_path):
    first, second = run_ranks(nan_logits, 2, tmp_path)
    assert first == second
    assert "1 of 8 images logits that are not finite (first: image 6)" in first


def test_damaged_files_are_refused_in_one_sentence(tmp_path):
    batch, logits = random_batch(num=20)
    paths = [f"class/{row}" for row in range(20)]
    collected = Collected(results_of_batch(batch, logits), paths, [], [])
    class_names = [f"class{number}" for number in range(CLASSES)]
    network = EvaluatedNetwork("tiny", "raw", 7, class_names)
    parquet = tmp_path / "p.parquet"
    evaluation = tmp_path / "e.json"
    write_predictions(collected, network, parquet)
    details = describe_evaluation(collected, network)
    write_evaluation(details, evaluation)

    problems = []
    for path, read in ((parquet, read_predictions), (evaluation, read_evaluation)):
        read(path)
        whole = path.read_bytes()
        for damage in damaged(whole):
            path.write_bytes(damage)
            problem = find_problem(read, path)
            if problem:
                problems.append(f"{path.name} with {damage[:20]!r}: {problem}")
        path.unlink()
        with pytest.raises(ValueError, match="cannot be read: No such file"):
            read(path)
    assert problems == []

    of_somebody_else = pyarrow.table({"a": [1]})
    pyarrow.parquet.write_table(of_somebody_else, parquet)
    with pytest.raises(ValueError, match="does not say which network"):
        read_predictions(parquet)


def damaged(whole):
    """Contents of a file that was cut, overwritten, or is of another kind."""
    half = len(whole) // 2
    return [
        b"",
        whole[:half],
        b"{}",
        100 * b"\xff",
        whole[:-30] + 30 * b"x",
    ]


def find_problem(read, path):
    """What is wrong with the answer to a damaged file; "" if it is refused in one sentence."""
    try:
        read(path)
    except ValueError as error:
        message = str(error)
        if "write it again" in message and "\n" not in message:
            return ""
        return message
    return "it was read"
