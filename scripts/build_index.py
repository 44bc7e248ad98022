"""Index the corpus of an experiment for retrieval, or measure how well its retriever finds.

    python scripts/build_index.py --config configs/demo.json
    python scripts/build_index.py --config configs/demo.json --restart retrieval.chunk_tokens=128
    python scripts/build_index.py --config configs/demo.json --evaluate pairs.jsonl

The second moves an index of other files or settings aside. The third indexes the answers of a file of questions and
answers (Huatuo-26M's layout; --kind names another one of data/README.md) apart from the corpus, asks the questions, and
tells recall@1, 5, 10 and MRR@10 of each question's own answer. An interrupted build continues when it is run again.
"""

from pathlib import Path

from qilin_med.artifact import read_manifest
from qilin_med.config.experiment import KINDS, experiment_parser, parse_experiment
from qilin_med.console.progress import progress
from qilin_med.console.quiet import quiet_libraries
from qilin_med.errors import user_errors_end_with_one_line
from qilin_med.retrieve.index import build
from qilin_med.retrieve.recall import evaluate_retrieval


def main() -> None:
    parser = experiment_parser(__doc__)
    parser.add_argument("--restart", action="store_true", help="move an index of other files or settings aside")
    parser.add_argument("--evaluate", type=Path, metavar="FILE", help="measure retrieval on a file of pairs, and stop")
    parser.add_argument("--kind", choices=KINDS, default="huatuo", help="format of FILE (default huatuo)")
    arguments, experiment = parse_experiment(parser)
    quiet_libraries()
    if arguments.evaluate:
        with progress("measuring retrieval"):
            recall = evaluate_retrieval(experiment, arguments.evaluate, arguments.kind)
        shares = ", ".join(f"R@{cut} {share:.1%}" for cut, share in recall.recall.items())
        without = f" ({recall.without_answer} without a usable answer left out)" if recall.without_answer else ""
        print(f"{recall.pairs} pairs{without}: {shares}, MRR@10 {recall.mrr:.3f}; {recall.questions_per_second:.0f}"
              " questions/s")  # fmt: skip
        return
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
