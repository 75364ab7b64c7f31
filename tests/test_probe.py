"""Which decoder serves JPEG, and which build of DALI is installed."""

import os
import sys

import pytest
import torch

from resnet_dist.data.pixels import dali
from resnet_dist.data.pixels.dali import LOG_LEVEL
from resnet_dist.data.pixels.probe import (
    BACKENDS,
    _NvImageCodec,
    count_library_warnings,
    decode_probe_batch,
    describe_dali_wheels,
    describe_jpeg_decoder,
)

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("kinds", "level", "text"),
    [
        ({"HW_GPU_ONLY", "GPU_ONLY", "CPU_ONLY"}, "ok", "JPEG: hardware decoder"),
        ({"GPU_ONLY", "CPU_ONLY"}, "ok", "JPEG: CUDA decoder"),
        ({"HYBRID_CPU_GPU", "CPU_ONLY"}, "ok", "JPEG: hybrid decoder"),
        ({"CPU_ONLY"}, "warning", "JPEG: CPU decoder: no GPU decoder"),
        (set(), "warning", "no decoder of nvImageCodec"),
    ],
)
def test_the_first_decoder_that_works_alone_is_named(kinds, level, text):
    asked = []

    def decodes(backend):
        asked.append(backend.kind)
        return backend.kind in kinds

    found = describe_jpeg_decoder(GPU, decodes=decodes, run_graph=lambda: None)
    assert found[0] == level
    assert found[1].startswith("JPEG: ")
    assert text in found[1]
    assert asked == [backend.kind for backend in BACKENDS][: len(asked)]


def test_warnings_of_the_training_graph_are_counted(capfd):
    """A fallback of the graph is one line, though each decoder works alone."""

    def run_graph():
        for _ in range(3):
            os.write(2, b"[WARNING] nvImageCodec: falls back\n")

    level, text = describe_jpeg_decoder(GPU, decodes=lambda _: True, run_graph=run_graph)
    assert level == "warning"
    assert "printed 3 warnings of its libraries for a batch of 8" in text

    def fail():
        raise RuntimeError("no such device")

    level, text = describe_jpeg_decoder(GPU, decodes=lambda _: True, run_graph=fail)
    assert level == "error"
    assert text.endswith("the graph of training fails: no such device")
    # The real graph, as far as a machine without a GPU has it.
    with count_library_warnings() as warnings:
        decode_probe_batch(torch.device("cpu"))
    assert warnings.count == 0
    assert capfd.readouterr().err == ""


def test_the_cpu_decoder_decodes_the_shipped_image():
    """The interface to nvImageCodec, as far as a machine without a GPU has it."""
    assert describe_jpeg_decoder(torch.device("cpu")) == ("ok", "JPEG: CPU decoder")
    by_kind = {backend.kind: backend for backend in BACKENDS}
    decodes = _NvImageCodec(GPU)
    assert decodes(by_kind["CPU_ONLY"])
    if not torch.cuda.is_available():
        level, text = describe_jpeg_decoder(GPU)
        assert level == "warning"
        assert text.startswith("JPEG: CPU decoder")


def test_warnings_are_counted_and_the_rest_is_printed(capfd):
    with count_library_warnings() as warnings:
        os.write(2, b"\x1b[0;33m[WARNING] \x1b[0m[pynvimgcodec] Something went wrong\n")
        print("our own line", file=sys.stderr)
        os.write(2, b"[WARNING] [nvjpeg] again\n")
    assert warnings.count == 2
    assert capfd.readouterr().err == "our own line\n"
    os.write(2, b"[WARNING] later\n")
    assert capfd.readouterr().err == "[WARNING] later\n"


def test_decoders_warn_only_while_warnings_are_counted(monkeypatch, capfd):
    """The installed DALI obeys the variable; training on a GPU sets it to errors."""
    printed = {}
    for level in ("1", "5"):
        monkeypatch.setenv(LOG_LEVEL, level)
        decode_probe_batch(torch.device("cpu"))
        printed[level] = capfd.readouterr().err
    assert printed["1"] == ""
    assert "[INFO]" in printed["5"]
    with count_library_warnings():
        assert os.environ[LOG_LEVEL] == "2"
    assert os.environ[LOG_LEVEL] == "5"
    monkeypatch.delenv(LOG_LEVEL)
    with count_library_warnings():
        assert os.environ[LOG_LEVEL] == "2"
    assert LOG_LEVEL not in os.environ
    monkeypatch.setattr(dali, "build_pipeline", lambda spec: None)
    dali.Decoder(local_batch_size=1, threads=1, device=GPU)
    assert os.environ.pop(LOG_LEVEL) == "1"


def test_any_build_of_dali_is_found():
    level, text = describe_dali_wheels()
    assert level == "ok"
    assert text.startswith("nvidia-dali-cuda")
    assert describe_dali_wheels(["nvidia-dali-cuda130 2.4.0"]) == (
        "ok",
        "nvidia-dali-cuda130 2.4.0",
    )
    level, text = describe_dali_wheels(["nvidia-dali-cuda120 2.4.0", "nvidia-dali-cuda130 2.4.0"])
    assert level == "warning"
    assert "uninstall all of them, then install one" in text
    assert describe_dali_wheels([])[0] == "error"
