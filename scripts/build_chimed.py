"""Build the training sets of ChiMed from raw published files.

    python scripts/build_chimed.py configs/chimed.json
    python scripts/build_chimed.py configs/chimed.json --allow-missing output_dir=data/processed-small
    python scripts/build_chimed.py configs/chimed.json --inspect
    python scripts/build_chimed.py configs/chimed.json --preview CMExam -n 5

Run it again after an interruption: finished tasks are kept. data/README.md describes the formats and where the files
are published.
"""

import argparse
from pathlib import Path

from qilin_med.artifact import read_manifest
from qilin_med.config.corpus import load_corpus_settings
from qilin_med.config.experiment import count
from qilin_med.console.progress import progress
from qilin_med.console.quiet import quiet_libraries
from qilin_med.data.build import MARKER, build
from qilin_med.data.card import heavy_losses
from qilin_med.errors import UserError, user_errors_end_with_one_line

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
    parser.add_argument("--inspect", type=count, nargs="?", const=3, metavar="N", help=inspect)
    preview = "show random records of one source of the corpus file, before any build, and stop"
    parser.add_argument("--preview", metavar="SOURCE", help=preview)
    parser.add_argument("-n", type=count, default=20, help="records that --preview shows (default 20)")
    strict = "end with an error if a source gives no record, or loses more than half of its rows or records"
    parser.add_argument("--strict", action="store_true", help=strict)
    arguments = parser.parse_intermixed_args()
    quiet_libraries()
    settings = load_corpus_settings(arguments.config, arguments.overrides)
    if arguments.inspect:
        from qilin_med.data.inspection import show_records

        show_records(settings, arguments.inspect)
        return
    if arguments.preview:
        from qilin_med.data.inspection import preview_source

        preview_source(settings, arguments.preview, arguments.n)
        return
    with progress("building the corpus"):
        outcome = build(settings, arguments.allow_missing, arguments.restart)
    print(OUTCOMES[outcome].format(settings.output_dir))
    losses = [] if outcome == "submitted" else heavy_losses(read_manifest(Path(settings.output_dir), MARKER)["sources"])
    for loss in losses:
        print(f"{loss}; look at it: --preview")
    if losses and arguments.strict:
        raise UserError(f"--strict: {'; '.join(losses)}")


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
