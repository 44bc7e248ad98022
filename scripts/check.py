"""Look before you launch: check everything that an experiment's run will need, in under a minute, and launch nothing.

python scripts/check.py --config configs/qilin_med_7b.json [key.path=value ...]
python scripts/check.py --config configs/qilin_med_7b.json --gpus 4 --gpu 3090-24g

One table tells records, optimizer steps, memory, disk and hours of every stage, and the questions of the evaluation; every
problem of any stage is named on a line of its own, with exit code 2. `bash run_all.sh` begins with it, and with --dry-run
ends there. Amounts of large data are estimated from the first records of each file.
"""

import json

from qilin_med.config.experiment import STAGES, count, experiment_parser, parse_experiment
from qilin_med.errors import user_errors_end_with_one_line
from qilin_med.plan.machines import GPUS


def main() -> None:
    parser = experiment_parser(__doc__)
    parser.add_argument("--gpus", type=count, help="GPUs of a machine to plan for (default: those here, else"
                        " launch.processes, or 8)")  # fmt: skip
    parser.add_argument("--gpu", choices=GPUS, help="which GPU to plan for (default: those here, else a100-80g)")
    parser.add_argument("--made-first", action="append", default=[], metavar="PATH",
                        help="a file or folder that is made before the stages, so that it may be missing now")  # fmt: skip
    alone = "check this stage alone, and print the resolved experiment file"
    parser.add_argument("--stage", choices=STAGES, help=alone)
    for flag in ("--force", "--restart"):
        parser.add_argument(flag, action="store_true", help="a stage script's, without effect here")
    parser.add_argument("--dry-run", action="store_true", help="changes nothing: this command launches nothing anyway")
    arguments, experiment = parse_experiment(parser)

    from qilin_med.console.quiet import quiet_libraries

    quiet_libraries()

    from qilin_med.check.report import print_report
    from qilin_med.check.stages import Check

    if arguments.stage:
        print(json.dumps(experiment.model_dump(mode="json"), ensure_ascii=False, indent=2))
    machine = {"gpus": arguments.gpus, "gpu": arguments.gpu}
    print_report(Check(experiment, arguments.stage, **machine, made_first=arguments.made_first))


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
