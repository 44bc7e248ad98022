"""What an experiment's stages need: memory, time, disk, before anything is downloaded or bought.

python scripts/plan.py --config configs/qilin_med_7b.json --gpus 8 --gpu a100-80g [key.path=value ...]
python scripts/plan.py --config configs/qilin_med_7b.json --gpus 4 --gpu 3090-24g --stage dpo \\
    --model-config configs/architectures/baichuan-7b.json --rows dpo=6000

How it is planned, and how well that agrees with what is measured: docs/scaling.md.
"""

import argparse
from pathlib import Path

from qilin_med.config.experiment import STAGES, Experiment, count, experiment_parser, parse_experiment
from qilin_med.errors import UserError, user_errors_end_with_one_line
from qilin_med.plan.data import find_amount, stated_amount
from qilin_med.plan.duration import Rates
from qilin_med.plan.machines import GPUS, Machines, local_machine
from qilin_med.plan.plan import plan_stage
from qilin_med.plan.tables import format_plan, format_total


def main() -> None:
    arguments, experiment = parse_experiment(parser())
    stages = arguments.stage or [stage for stage in STAGES if getattr(experiment, stage)]
    rows, tokens = amounts(arguments.rows), amounts(arguments.tokens)
    machines, device = machines_of(arguments, experiment)
    rates = Rates(arguments.efficiency, arguments.disk_gbs * 1e9, arguments.mfu)
    plans = []
    for stage in stages:
        if stage in rows or stage in tokens:
            amount = stated_amount(experiment, stage, rows.get(stage), tokens.get(stage))
        else:
            amount = find_amount(experiment, stage)
        model_config = arguments.model_config or Path(experiment.model.path)
        plans.append(plan_stage(experiment, stage, model_config, machines, amount))
        print(format_plan(plans[-1], device, rates), end="\n\n", flush=True)
    if len(plans) > 1 and (total := format_total(plans, rates)):
        print(total)


def parser() -> argparse.ArgumentParser:
    parser = experiment_parser(__doc__)
    parser.add_argument("--gpus", type=count, help="GPUs of a machine (default: launch.processes, or 8)")
    parser.add_argument("--gpu", choices=GPUS, default="a100-80g", help="which GPU (default: %(default)s)")
    parser.add_argument("--nodes", type=count, default=1, help="machines (default: %(default)s)")
    for name, default, what in (
        ("efficiency", Rates.efficiency, "share of a GPU's peak that kernels reach while they compute"),
        ("disk-gbs", Rates.disk / 1e9, "GB/s at which checkpoints are written"),
        ("network-gbs", 25.0, "GB/s between machines, each way, of all cards of a machine together"),
    ):
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"{what} (default: %(default)s)")
    mfu = "model FLOPs utilisation of whole runs, known from elsewhere: replaces the estimate"
    parser.add_argument("--mfu", type=positive, help=mfu)
    parser.add_argument("--stage", action="append", choices=STAGES, help="only this stage (may be repeated)")
    parser.add_argument("--model-config", type=Path, help="a model's config.json, where its folder is not there yet")
    for what in ("rows", "tokens"):
        parser.add_argument(f"--{what}", nargs="+", default=[], metavar="STAGE=NUMBER", help=f"{what} of the data")
    return parser


def positive(text: str) -> float:
    number = float(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return number


def amounts(values: list[str]) -> dict[str, float]:
    found = {}
    for value in values:
        stage, _, number = value.partition("=")
        try:
            found[STAGES[STAGES.index(stage)]] = positive(number)
        except (ValueError, argparse.ArgumentTypeError):
            raise UserError(f"'{value}': expected STAGE=NUMBER, for example pretraining=2.122e9") from None
    return found


def machines_of(arguments: argparse.Namespace, experiment: Experiment) -> tuple[Machines, str]:
    """The machines to plan for, and what a rank runs on."""
    if experiment.launch.device == "cpu":
        return local_machine(experiment), "CPU process"
    processes, gpu = experiment.launch.processes, GPUS[arguments.gpu]
    gpus = arguments.gpus or (8 if processes == "auto" else processes)
    network = arguments.network_gbs * 1e9 if arguments.nodes > 1 else gpu.bandwidth
    if gpu.note:
        print(f"{gpu.name}: {gpu.note}", end="\n\n")
    peak, bandwidth = gpu.peak(experiment.model.dtype), min(gpu.bandwidth, network)
    return Machines(arguments.nodes, gpus, gpu.memory, peak, bandwidth), gpu.name


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
