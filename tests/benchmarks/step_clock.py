"""Run a training program and note when its optimizer steps: `python step_clock.py TIMES.json 8 32 -m module [ARGS]`.

The same clock for every contender of `training_speed.py`: a hook behind each optimizer step, whatever the trainer
around it prints. On a GPU it waits for the device at the first and the last step of the measured window, and nowhere
else, so that it does not slow down what it measures.
"""

from __future__ import annotations

import json
import resource
import runpy
import sys
import time
from pathlib import Path

TIMES: list[float] = []  # by the wall clock
CPU_TIMES: list[float] = []  # of this process, over all threads


def main() -> None:
    started = time.perf_counter()
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    output, first, last, *command = sys.argv[1:]
    marks = {int(first), int(last)}
    # open_clip's trainer turns TF32 on by itself; everybody gets it, so that a GPU does the same arithmetic for all.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

    def note(*_: object) -> None:
        if torch.cuda.is_available() and len(TIMES) + 1 in marks:
            torch.cuda.synchronize()
        TIMES.append(time.perf_counter())
        CPU_TIMES.append(time.process_time())

    register_optimizer_step_post_hook(note)
    try:
        run(command)
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB, as Linux counts
        start_up = TIMES[0] - started if TIMES else None
        found = {"steps": TIMES, "cpu": CPU_TIMES, "start_up": start_up, "peak_mib": peak}
        Path(output).write_text(json.dumps(found))


def run(command: list[str]) -> None:
    """Run `-m module ARGS` or `script.py ARGS` as if python itself had been given it."""
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
