"""Make the demo: an invented world (data/demo) and a small base model that knows the world but not its medicine.

Three steps, each left out when its result is already there: the text, an untrained model (models/demo-init), and the
base model, trained by the pipeline's own first stage on general text (configs/demo_base.json; two to three minutes on
two cores).

    python scripts/make_demo.py
    python scripts/make_demo.py --seed 8 --restart     # another world; arguments not known here go to pretraining.py

Another world's files, the corpus built from them and its untrained model are moved aside, not deleted.
"""

import argparse
import os
import sys
from pathlib import Path

from demo.make import build_files, write_untrained_model, write_world
from qilin_med.console.progress import progress
from qilin_med.console.quiet import quiet_libraries
from qilin_med.errors import user_errors_end_with_one_line

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7, help="which world (default: 7)")
    parser.add_argument("--no-training", action="store_true", help="stop before the base model is trained")
    options, for_training = parser.parse_known_args()
    quiet_libraries()
    sys.stdout.reconfigure(line_buffering=True)  # in order with what the training below prints, also in a pipe
    with progress("making the demo's world"):
        files, about = build_files(options.seed)
        write_world(files, about, Path("data/demo"))
        write_untrained_model(files, options.seed, Path("models/demo-init"))
    if not options.no_training:
        script, config = str(REPOSITORY / "pretraining.py"), str(REPOSITORY / "configs/demo_base.json")
        command = [sys.executable, script, "--config", config, *for_training]
        os.execv(sys.executable, command)  # its own process would not hear of Ctrl-C in time to save a checkpoint


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
