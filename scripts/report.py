"""Write runs/<name>/report.md and print its table.

python scripts/report.py --config configs/demo.json [key.path=value ...]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qilin_med.cli import experiment_parser, parse_experiment
from qilin_med.errors import user_errors_end_with_one_line


def main() -> None:
    arguments, experiment = parse_experiment(experiment_parser(__doc__))

    from qilin_med.training import quiet_libraries

    quiet_libraries()
    from qilin_med.report import format_table, write_report
    from qilin_med.results import read_results

    path = write_report(experiment, arguments.config, arguments.overrides)
    print(f"\n{format_table(read_results(experiment))}\n\nreport: {path}")


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
