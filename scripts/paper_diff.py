"""Print the settings in which an experiment differs from the paper's.

python scripts/paper_diff.py configs/demo.json [--gpus 8] [key.path=value ...]
"""

import argparse

from qilin_med.config.experiment import STAGES, count, load_experiment
from qilin_med.errors import user_errors_end_with_one_line
from qilin_med.report.tables import difference_table, markdown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="experiment file")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    parser.add_argument("--gpus", type=count, help="GPUs that train, over all nodes (default: launch.processes)")
    arguments = parser.parse_intermixed_args()
    settings = load_experiment(arguments.config, arguments.overrides).model_dump(mode="json")
    table = difference_table(settings, dict.fromkeys(STAGES, arguments.gpus) if arguments.gpus else {})
    print(markdown_table(table) if table else "no setting differs from the paper's")


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
