"""torchrun's error file, whose text its summary shows."""

import contextlib
import json
import os
import time


def write_error_file(text: str) -> None:
    """Write `text` to torchrun's error file, so that torchrun's summary contains it.

    The format is that of `torch.distributed.elastic.multiprocessing.errors.record`. An error that
    is already in the file stays. Without torchrun nothing is written.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or os.path.exists(path):
        return
    now = int(time.time())
    message = {
        "message": text,
        "extraInfo": {"timestamp": str(now)},
    }
    with contextlib.suppress(OSError), open(path, "w") as file:
        json.dump({"message": message}, file)
