"""Show records of a built corpus as the model will see them, the trained part marked."""

from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from qilin_med.artifact import read_manifest
from qilin_med.config.corpus import CorpusSettings
from qilin_med.config.experiment import StageName
from qilin_med.data.build import MARKER
from qilin_med.data.render import from_row
from qilin_med.data.shards import Row, read_lines
from qilin_med.errors import UserError
from qilin_med.model.load import load_tokenizer
from qilin_med.prompt.template import IGNORED, ChatTemplate, encode_texts
from qilin_med.records import Document, Preference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OPEN, CLOSE = "⟦", "⟧"  # around what the loss is taken on
WHOLE = 100_000  # tokens: nothing is cut here


def show_records(settings: CorpusSettings, count: int) -> None:
    """Print the first records of each source of a built corpus. UserError: it has not been built."""
    folder = Path(settings.output_dir)
    if not (folder / MARKER).is_file():
        raise UserError(f"{folder}: not built yet; run this command without --inspect first")
    tokenizer = load_tokenizer(Path(settings.tokenizer), "own")
    template = ChatTemplate(tokenizer)
    print(f"Trained parts stand between {OPEN} and {CLOSE}; <...> are tokens of the template.")
    for source in read_manifest(folder, MARKER)["sources"]:
        print(f"\n===== {source['stage']}: {source['name']}, {source['train']} train and {source['dev']} dev records")
        files = [file for split in ("train", "dev") for file in sorted((folder / source["stage"]).glob(f"{split}-*"))]
        rows = (row for file in files for row in read_rows(file) if row["source"] == source["name"])
        for row in islice(rows, count):
            print(f"\n--- {row['id']} from {row['place']}")
            for name, ids, labels in encodings(source["stage"], row, tokenizer, template):
                parts = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
                texts = ((trained, tokenizer.decode([id_ for id_, _ in pairs])) for trained, pairs in parts)
                print(name + "".join(f"{OPEN}{text}{CLOSE}" if trained else text for trained, text in texts))


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of a file of a set."""
    if file.suffix != ".parquet":
        yield from read_lines(file)
        return
    for batch in pq.ParquetFile(file).iter_batches():
        yield from ({name: value for name, value in row.items() if value is not None} for row in batch.to_pylist())


def encodings(
    stage: StageName, row: Row, tokenizer: "PreTrainedTokenizerFast", template: ChatTemplate
) -> Iterator[tuple[str, list[int], list[Any]]]:
    """(name, token ids, labels) of the token rows that a record gives: one, or two named ones for a preference pair."""
    record = from_row(stage, row)
    if isinstance(record, Document):
        [ids] = encode_texts(tokenizer, [record.text])
        yield "", [*ids, tokenizer.eos_token_id], [0] * (len(ids) + 1)
    elif isinstance(record, Preference):
        pair = template.encode_preference(record, WHOLE, WHOLE)
        for name, answer in (("[chosen] ", pair.chosen_ids), ("[rejected] ", pair.rejected_ids)):
            yield name, pair.prompt_ids + answer, [IGNORED] * len(pair.prompt_ids) + answer
    else:
        for encoded in template.encode_chat(record, WHOLE, WHOLE):
            yield "", encoded.input_ids, encoded.labels
