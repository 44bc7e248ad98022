"""Measure one contender in a process of its own, so that peaks of memory do not mix. Called by benchmark.py.

python measure.py JOB.json CONTENDER WARMUP RESULT.json
"""

import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from qilin_med.train.job import Job
from qilin_med.train.stage import quiet_libraries


def main() -> None:
    quiet_libraries()
    import torch
    from transformers import set_seed

    from benchmarks.contenders import CONTENDERS, Window, current_memory

    job_file, contender, warmup, result = sys.argv[1:]
    before = current_memory()  # everything is imported, no model is loaded
    window = Window(int(warmup))
    job = Job.load(Path(job_file))
    with tempfile.TemporaryDirectory(dir=job.rows.parent) as copied:
        # A copy, as libraries keep what they computed (a reference pass) beside the rows and would find it next time.
        rows = shutil.copytree(job.rows, Path(copied) / "rows")
        set_seed(job.experiment.seed)
        CONTENDERS[job.stage][contender](replace(job, rows=rows), window)
    measured = {
        "rates": {"wall": window.rate("seconds"), "cpu": window.rate("cpu_seconds")},
        "updates": len(window.times) - window.warmup,
        "items": window.timed_items,
        "seconds": window.seconds,
        "cpu_seconds": window.cpu_seconds,
        "reference_pass": window.reference,
        "memory": window.memory - before,
        "threads": torch.get_num_threads(),
    }
    Path(result).write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main()
