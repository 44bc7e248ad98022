"""Several runs in one report: paired tests against the first on the same questions, mean and spread over seeds.

python scripts/compare.py runs/demo runs/demo_without_sft
python scripts/compare.py runs/seed7 runs/seed8 runs/seed9 --out runs/seeds

A run is named by its folder, or by its experiment file.
"""

import argparse
from pathlib import Path

from qilin_med.console.progress import progress
from qilin_med.errors import user_errors_end_with_one_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run folder or an experiment file; the first is the reference"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"), help="folder (default: runs/comparison)")
    arguments = parser.parse_args()
    with progress("comparing the runs"):
        from qilin_med.report.compare import open_runs, write_comparison

        report = write_comparison(open_runs(arguments.runs), arguments.out)
    print(f"comparison: {report}")


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
