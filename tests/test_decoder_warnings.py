"""What the decoder prints is one line with the name of the file; nothing else is lost."""

import ctypes
import os
import subprocess
import sys
import warnings
from pathlib import Path

from image_files import encode, picture, train_loader, write_split

from resnet_dist.logs import decoder_warnings

ROOT = Path(__file__).parents[1]


def spoiled(data):
    """With the end marker after half of the picture."""
    return data[: len(data) // 2] + data[-2:]


C_LIBRARY = ctypes.CDLL(None)


def c_stderr():
    """The stream that the C library's variable `stderr` holds now."""
    variable = ctypes.c_void_p.in_dll(C_LIBRARY, "stderr")
    return ctypes.c_void_p(variable.value)


def print_in_c(text, library=C_LIBRARY):
    """As a library in C prints; ctypes.PyDLL keeps Python's lock meanwhile."""
    library.fputs(text.encode(), c_stderr())


def test_images_that_the_decoder_warns_about_are_named_once(tmp_path, capfd):
    files = [encode(picture(120, 160, number)) for number in range(24)]
    files[5] = spoiled(files[5])
    files[17] = spoiled(files[17])
    index = write_split(str(tmp_path), files)
    with decoder_warnings.collected(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = train_loader(index, tmp_path, global_batch_size=8)
        for _ in loader.batches(0, 12):
            print_in_c("something else\n")
        loader.close()
    said = capfd.readouterr().err
    assert "Corrupt JPEG" not in said, said
    assert said.count("something else\n") == 12
    texts = [str(warning.message) for warning in caught]
    of_decoder = [text for text in texts if "Corrupt JPEG" in text]
    assert len(of_decoder) == 2, of_decoder
    for name in ("0005.jpg", "0017.jpg"):
        naming = [text for text in of_decoder if name in text]
        assert len(naming) == 1, of_decoder

    print_in_c("after it\n")
    assert capfd.readouterr().err == "after it\n"


def test_a_flood_with_pythons_lock_held_passes(capfd):
    with decoder_warnings.collected():
        source = decoder_warnings.current_warnings()
        line = "x" * 99 + "\n"
        for _ in range(5):
            print_in_c(line * 1000, ctypes.PyDLL(None))
        print_in_c("Corrupt JPEG data: bad Huffman code\nno line end")
        assert source.take_all() == ["Corrupt JPEG data: bad Huffman code"]
        # Nobody reads these: the reading process drops them when its pipe is full.
        for _ in range(5):
            print_in_c("Corrupt JPEG data: premature end of data segment\n" * 1000)
        os.write(2, b"direct\n")
    said = capfd.readouterr().err
    assert said.count(line) == 5_000
    assert "no line end" in said
    assert "direct\n" in said
    assert "Corrupt" not in said
    assert "\0" not in said


def test_a_late_mark_is_no_warning():
    notes_pipe, notes_end = os.pipe()
    mark = decoder_warnings._MARK + b"1\n"
    os.write(notes_end, b"Corrupt JPEG data: early\n" + mark)
    os.close(notes_end)
    source = decoder_warnings.DecoderWarnings(-1, notes_pipe)
    assert source.take() == ["Corrupt JPEG data: early"]
    os.close(notes_pipe)


def test_the_last_words_of_a_crash_arrive():
    program = (
        "import ctypes, os\n"
        "from resnet_dist.logs import decoder_warnings\n"
        "with decoder_warnings.collected():\n"
        "    libc = ctypes.CDLL(None)\n"
        "    stream = ctypes.c_void_p(ctypes.c_void_p.in_dll(libc, 'stderr').value)\n"
        "    libc.fputs(b'terminate called\\nand more', stream)\n"
        "    os.abort()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=environment, timeout=100
    )
    assert done.returncode < 0
    assert done.stderr.decode() == "terminate called\nand more"
