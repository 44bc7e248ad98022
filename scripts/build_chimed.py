"""Build the training sets of ChiMed from raw published files.

    python scripts/build_chimed.py configs/chimed.json
    python scripts/build_chimed.py configs/chimed.json --allow-missing output_dir=data/processed-small
    python scripts/build_chimed.py configs/chimed.json --inspect

Run it again after an interruption: finished tasks are kept. data/README.md describes the formats and where the files
are published.
"""

import argparse

from qilin_med.config.corpus import load_corpus_settings
from qilin_med.console.progress import progress
from qilin_med.data.build import build
from qilin_med.errors import user_errors_end_with_one_line

OUTCOMES = {
    "built": "built {}; its README.md has the tables",
    "built before": "{}: built from the same files and settings already",
    "submitted": "submitted; the last job publishes {}. Run the same command again to see whether it is there",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="corpus file, for example configs/chimed.json")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override keys of the corpus file")
    parser.add_argument("--allow-missing", action="store_true", help="build without the paths that do not exist")
    parser.add_argument("--restart", action="store_true", help="move another build in output_dir aside")
    inspect = "show N records of each source (default 3) and stop"
    parser.add_argument("--inspect", type=int, nargs="?", const=3, metavar="N", help=inspect)
    arguments = parser.parse_intermixed_args()
    settings = load_corpus_settings(arguments.config, arguments.overrides)
    if arguments.inspect:
        from qilin_med.data.inspection import show_records

        show_records(settings, arguments.inspect)
        return
    with progress("building the corpus"):
        outcome = build(settings, arguments.allow_missing, arguments.restart)
    print(OUTCOMES[outcome].format(settings.output_dir))


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
