"""Write runs/<name>/report.html and report.md, and a model card beside every merged checkpoint.

python scripts/report.py --config configs/demo.json [key.path=value ...]
"""

from qilin_med.config.experiment import experiment_parser, parse_experiment
from qilin_med.console.progress import progress
from qilin_med.errors import user_errors_end_with_one_line
from qilin_med.report.collect import collect_run
from qilin_med.report.pages import write_cards, write_report
from qilin_med.report.tables import held_out_table, markdown_table


def main() -> None:
    arguments, experiment = parse_experiment(experiment_parser(__doc__))
    with progress("writing the report"):
        run = collect_run(experiment)
        report = write_report(run, arguments.config, arguments.overrides)
    if run.held_out:
        print(f"\n{markdown_table(held_out_table(run.held_out))}\n")
    for line in write_cards(run):
        print(line)
    print(f"report: {report}")


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
