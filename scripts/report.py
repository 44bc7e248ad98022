"""Write runs/<name>/report.md and print its table.

python scripts/report.py --config configs/demo.json [key.path=value ...]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qilin_med.config import load_experiment
from qilin_med.errors import user_errors_end_with_one_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_intermixed_args()
    experiment = load_experiment(arguments.config, arguments.overrides)

    from qilin_med.training import quiet_libraries

    quiet_libraries()
    from qilin_med.evaluation import read_results
    from qilin_med.report import format_table, write_report

    path = write_report(experiment, arguments.config, arguments.overrides)
    print(f"\n{format_table(read_results(experiment))}\n\nreport: {path}")


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
