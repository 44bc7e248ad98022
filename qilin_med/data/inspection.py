"""Show records of a built corpus as the model will see them, the trained part marked."""

from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path

from qilin_med.artifact import read_manifest
from qilin_med.config.corpus import CorpusSettings
from qilin_med.data.build import MARKER
from qilin_med.data.read.files import open_parts
from qilin_med.data.read.tables import ROW_SUFFIXES, read_rows
from qilin_med.data.render import from_row
from qilin_med.errors import UserError
from qilin_med.model.load import load_tokenizer
from qilin_med.prompt.template import IGNORED, ChatTemplate, EncodedPreference, encode_texts
from qilin_med.records import Document, Preference, Skipped, TrainingRecord

OPEN, CLOSE = "⟦", "⟧"  # around what the loss is taken on
WHOLE = 100_000  # tokens: nothing is cut here


def show_records(settings: CorpusSettings, count: int) -> None:
    """Print the first records of each source of a built corpus. UserError: it has not been built."""
    folder = Path(settings.output_dir)
    if not (folder / MARKER).is_file():
        raise UserError(f"{folder}: not built yet; run this command without --inspect first")
    template = ChatTemplate(load_tokenizer(Path(settings.tokenizer), "own"))
    print(f"Trained parts stand between {OPEN} and {CLOSE}; <...> are tokens of the template.")
    for source in read_manifest(folder, MARKER)["sources"]:
        print(f"\n===== {source['stage']}: {source['name']}, {source['train']} train and {source['dev']} dev records")
        files = [file for split in ("train", "dev") for file in sorted((folder / source["stage"]).glob(f"{split}-*"))]
        rows = (row.value for file in files for part in open_parts(file, ROW_SUFFIXES) for row in read_rows(part))
        for row in islice((row for row in rows if row["source"] == source["name"]), count):
            print(f"\n--- {row['id']} from {row['place']}")
            for name, ids, labels in encode(from_row(source["stage"], row), template):
                parts = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
                texts = ((trained, template.tokenizer.decode([id_ for id_, _ in pairs])) for trained, pairs in parts)
                print(name + "".join(f"{OPEN}{text}{CLOSE}" if trained else text for trained, text in texts))


def encode(record: TrainingRecord, template: ChatTemplate) -> Iterator[tuple[str, list[int], list[int]]]:
    """(name, token ids, labels) of the token rows that a record gives; the two of a preference pair have names."""
    if isinstance(record, Document):
        [ids] = encode_texts(template.tokenizer, [record.text])
        yield "", [*ids, template.tokenizer.eos_token_id], [0] * (len(ids) + 1)
        return
    encode_all = template.encode_preferences if isinstance(record, Preference) else template.encode_chats
    [encoded] = encode_all([record], WHOLE, WHOLE)
    if isinstance(encoded, Skipped):
        yield f"[skipped in training: {encoded.reason}]", [], []
    elif isinstance(encoded, EncodedPreference):
        for name, answer in (("[chosen] ", encoded.chosen_ids), ("[rejected] ", encoded.rejected_ids)):
            yield name, encoded.prompt_ids + answer, [IGNORED] * len(encoded.prompt_ids) + answer
    else:
        yield from (("", row.input_ids, row.labels) for row in encoded)
