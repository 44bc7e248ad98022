"""Convert Baichuan-7B as published into a native Llama folder: python scripts/convert_baichuan.py SRC DST"""

import argparse
from pathlib import Path

from qilin_med.console.progress import progress
from qilin_med.errors import user_errors_end_with_one_line


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert Baichuan-7B as published into a native Llama folder.")
    published = "published folder: config.json, weights, tokenizer.model"
    parser.add_argument("source", type=Path, metavar="SRC", help=published)
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write")
    arguments = parser.parse_args()
    with progress("converting"):
        from qilin_med.convert.baichuan import convert_baichuan
        from qilin_med.prompt.template import QILIN_TEMPLATE

        made = convert_baichuan(arguments.source, arguments.target, QILIN_TEMPLATE)
    parameters, shards = f"{made['parameters']:,} parameters ({made['dtype']})", f"{made['shards']} shard(s)"
    print(f"done: {parameters} in {shards}, with tokenizer and chat template, in {arguments.target}")


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
