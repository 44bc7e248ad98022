"""Print the settings in which an experiment differs from the paper's.

python scripts/paper_diff.py configs/demo.json [key.path=value ...]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qilin_med.config import load_experiment
from qilin_med.errors import user_errors_end_with_one_line
from qilin_med.report.document import markdown_table
from qilin_med.report.tables import difference_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="experiment file")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    arguments = parser.parse_args()
    table = difference_table(load_experiment(arguments.config, arguments.overrides).model_dump(mode="json"))
    print(markdown_table(table) if table.rows else "no setting differs from the paper's")


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
