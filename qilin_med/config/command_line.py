"""The command line that every command on an experiment shares: --config FILE and key.path=value overrides."""

import argparse

from qilin_med.config.experiment import Experiment, load_experiment


def experiment_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="experiment file, for example configs/demo.json")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override keys of the experiment file")
    return parser


def parse_experiment(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Experiment]:
    """The arguments and the validated experiment. Overrides may stand on either side of flags."""
    arguments = parser.parse_intermixed_args()
    return arguments, load_experiment(arguments.config, arguments.overrides)
