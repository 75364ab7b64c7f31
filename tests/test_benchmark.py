"""The benchmark runs and reports what it measured."""

import json

from dist_utils import run_app


def test_benchmark_of_the_loop(tmp_path):
    output = tmp_path / "printed"
    arguments = ["benchmark", "--json", "--windows", "1", "--steps", "4", "--model.name", "resnet20", "--data.kind",
                 "synthetic", "--data.train_crop_size", "16", "--train.global_batch_size", "8",
                 "--train.precision", "fp32", "--output_dir", str(tmp_path), "--distributed.threads", "1"]
    assert run_app(2, arguments, str(output)) == [0, 0], output.read_text()
    result = json.loads(output.read_text().splitlines()[-1])
    assert result["ranks"] == 2
    assert result["local_batch_size"] == 4
    assert result["whole_images_per_second"] > 0
    assert 0 < result["ratio"] < 2
