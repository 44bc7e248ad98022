"""Measure base and stages on the experiment's held-out sets; results go to runs/<name>/eval/<model>/heldout.json.

python scripts/evaluate.py --config configs/demo.json [--models base,sft] [key.path=value ...]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qilin_med.cli import experiment_parser, parse_experiment
from qilin_med.errors import UserError, user_errors_end_with_one_line


def main() -> None:
    parser = experiment_parser(__doc__)
    parser.add_argument("--models", help="comma-separated: base, pretraining, sft, dpo (default: all)")
    arguments, experiment = parse_experiment(parser)

    from qilin_med.training import quiet_libraries

    quiet_libraries()
    from qilin_med.evaluation import evaluate_model, model_folders, result_file
    from qilin_med.report import format_table

    folders = model_folders(experiment)
    wanted = arguments.models.split(",") if arguments.models else list(folders)
    if unknown := set(wanted) - set(folders):
        raise UserError(f"--models: unknown {', '.join(sorted(unknown))}; this experiment has {', '.join(folders)}")
    results = {}
    for name in wanted:
        if not folders[name].is_dir():
            raise UserError(f"{name}: {folders[name]} does not exist; run its stage first, or leave it out of --models")
        results[name] = evaluate_model(experiment, folders[name], result_file(experiment, name))
    print(format_table(results))


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
