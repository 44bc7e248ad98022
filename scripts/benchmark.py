"""Compare our way with other ways to do the same, on this machine, side by side in one run.

python scripts/benchmark.py train --help     # the three stages' training
python scripts/benchmark.py corpus --help    # build and rows of a growing corpus
python scripts/benchmark.py dedup --help     # near-deduplication alone
python scripts/benchmark.py decontamination --help  # leaked evaluation questions
python scripts/benchmark.py evaluate --help  # questions per second
python scripts/benchmark.py retrieval --help # recall of each retriever
"""

import argparse
import sys
from importlib import import_module

from qilin_med.errors import user_errors_end_with_one_line

BENCHMARKS = {"train": "training", "corpus": "corpus", "dedup": "dedup", "decontamination": "decontamination",
              "evaluate": "evaluation", "retrieval": "retrieval"}  # fmt: skip


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("what", choices=BENCHMARKS, help="what to measure")
    benchmark = import_module("benchmarks." + BENCHMARKS[parser.parse_args(sys.argv[1:2]).what])
    parser = argparse.ArgumentParser(prog=" ".join(sys.argv[:2]), description=benchmark.__doc__, formatter_class=plain)
    benchmark.add_arguments(parser)
    benchmark.run(parser.parse_intermixed_args(sys.argv[2:]))


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
