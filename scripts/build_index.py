"""Index the corpus of an experiment for retrieval.

    python scripts/build_index.py --config configs/demo.json
    python scripts/build_index.py --config configs/demo.json --restart retrieval.chunk_tokens=128

The second moves an index of other files or settings aside. An interrupted build continues when it is run again. How well
each retriever finds is measured by scripts/benchmark.py retrieval.
"""

from qilin_med.artifact import read_manifest
from qilin_med.config.experiment import experiment_parser, parse_experiment
from qilin_med.console.progress import progress
from qilin_med.console.quiet import quiet_libraries
from qilin_med.errors import user_errors_end_with_one_line
from qilin_med.retrieve.index import build


def main() -> None:
    parser = experiment_parser(__doc__)
    parser.add_argument("--restart", action="store_true", help="move an index of other files or settings aside")
    arguments, experiment = parse_experiment(parser)
    quiet_libraries()
    with progress("building the index"):
        is_new = build(experiment, arguments.restart)
    folder = experiment.index_folder()
    if not is_new:
        print(f"{folder}: built from the same files and settings already")
        return
    manifest = read_manifest(folder)
    print(f"built {folder}: {manifest['chunks']} chunks of {manifest['documents']['indexed']} documents")
    for file, count in manifest["left_out_documents"].items():
        chunks = manifest["left_out_chunks"][file]
        print(f"left out: {count} documents ({chunks} chunks) that repeat questions of {file}")
    for reason, count in manifest["skipped"].items():
        print(f"skipped: {count} rows, {reason}")


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
