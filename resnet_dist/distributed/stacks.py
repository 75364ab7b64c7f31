"""Where the main thread is, for the messages of the watchdog."""

import os
import sys
import threading
import traceback

# Number of calls of the main thread that a rank publishes, starting with the innermost.
_STACK_DEPTH = 8


def stack_of_main_thread() -> str:
    """The calls of the main thread, starting with the innermost."""
    frames = sys._current_frames()
    main_thread = threading.main_thread()
    identity = main_thread.ident or 0
    innermost = frames.get(identity)
    calls = []
    for frame, line in traceback.walk_stack(innermost):
        code = frame.f_code
        file = os.path.basename(code.co_filename)
        calls.append(f"{file}:{line} {code.co_name}")
        if len(calls) == _STACK_DEPTH:
            break
    return " < ".join(calls)
