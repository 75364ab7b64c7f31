"""The preflight: it finds what is wrong before a run does, on all ranks, in text and in JSON."""

import json
import shutil

from dist_utils import run_app

from resnet_dist import cli

ARGUMENTS = [
    "doctor",
    "--config",
    "configs/quickstart.yaml",
    "--log.wandb",
    "disabled",
    "--data.threads",
    "1",
]


def examine(tmp_path, *more, world_size=1, entry=None):
    output = tmp_path / "printed"
    output.unlink(missing_ok=True)
    codes = run_app(
        world_size, [*ARGUMENTS, "--output_dir", str(tmp_path / "run"), *more], str(output), entry
    )
    return codes, output.read_text()


def levels(printed):
    return {
        one["check"]: (one["level"], one["text"]) for one in json.loads(printed.splitlines()[-1])
    }


def test_a_good_run_on_two_ranks(digits, tmp_path):
    codes, printed = examine(tmp_path, "--data.data_dir", digits, world_size=2)
    assert codes == [0, 0], printed
    lines = printed.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["ok", name] for name in ("layout", "folder", "data", "decoder", "software")
    ]
    for line, words in zip(
        lines,
        (
            "64 = 2 ranks (gloo at 127.0.0.1:",
            "can be written",
            "1442 + 355 images, 10 classes",
            "JPEG: CPU decoder",
            "torch ",
        ),
        strict=True,
    ):
        assert words in line
    assert not (tmp_path / "run").exists()  # it leaves nothing behind


def test_warnings_and_errors(digits, tmp_path):
    codes, printed = examine(tmp_path, "--data.data_dir", digits, "--optim.base_lr", "3", "--json")
    level, text = levels(printed)["layout"]
    assert codes == [1] and level == "warning" and "is 3 for 256" in text
    data = shutil.copytree(digits, tmp_path / "data")
    next((data / "val" / "0").glob("*.jpg")).write_bytes(b"")
    more = ("--data.kind", "folder", "--data.data_dir", str(data), "--json")
    codes, printed = examine(tmp_path, *more)
    assert codes == [1] and "of 192 shown 1 are broken" in levels(printed)["data"][1]
    shutil.rmtree(data / "val" / "7")
    for setting, value, check, words in (
        ("--train.grad_accum_steps", "3", "layout", "63 or 66"),
        ("--output_dir", "/proc/nowhere", "folder", "/proc"),
        ("--log.wandb", "disabled", "data", "only in train/ (7)"),
    ):
        codes, printed = examine(tmp_path, *more, setting, value)
        level, text = levels(printed)[check]
        assert codes == [2] and level == "error" and words in text, printed


def test_a_disk_that_is_too_small(digits, tmp_path):
    def entry(arguments):
        shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
        return cli.main(arguments)

    codes, printed = examine(tmp_path, "--data.data_dir", digits, "--json", entry=entry)
    level, text = levels(printed)["folder"]
    assert codes == [2] and level == "error" and "0.0 GB are free" in text
