"""Show records of a built corpus, or of one source before any build, as the model will see them, the trained part marked."""

import random
from collections import Counter
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from qilin_med.artifact import read_manifest
from qilin_med.config.corpus import CorpusSettings, RawSource
from qilin_med.config.experiment import STAGES
from qilin_med.console.progress import counted, progress
from qilin_med.data.build import MARKER
from qilin_med.data.curate import Account, Task, read_clean
from qilin_med.data.read.files import open_parts
from qilin_med.data.read.readers import READERS, raw_files, read_file
from qilin_med.data.read.tables import ROW_SUFFIXES, read_rows
from qilin_med.data.render import from_row
from qilin_med.data.shards import batched
from qilin_med.errors import UserError
from qilin_med.model.load import load_tokenizer
from qilin_med.prompt.template import IGNORED, ChatTemplate, EncodedPreference, encode_texts
from qilin_med.records import Document, Preference, Skipped, TrainingRecord

OPEN, CLOSE = "⟦", "⟧"  # around what the loss is taken on
WHOLE = 100_000  # tokens: nothing is cut here
# What a preview looks at: so many files of a source, and of each so many records, of so many characters.
FILES, RECORDS, BEGINNING = 5, 2000, 1 << 22
MARKS = f"Trained parts stand between {OPEN} and {CLOSE}; <...> are tokens of the template."


def show_records(settings: CorpusSettings, count: int) -> None:
    """Print the first records of each source of a built corpus. UserError: it has not been built."""
    folder = Path(settings.output_dir)
    if not (folder / MARKER).is_file():
        raise UserError(f"{folder}: not built yet; run this command without --inspect first")
    files = [
        file for stage in STAGES for split in ("train", "dev") for file in sorted((folder / stage).glob(f"{split}-*"))
    ]
    files_of: dict[tuple[str, str], list[Path]] = {}  # a file holds rows of one source
    with progress("looking through the sets", len(files), "files") as advance:
        for file in counted(files, advance):
            first = next(rows_of(file))
            files_of.setdefault((file.parent.name, first["source"]), []).append(file)
    template = ChatTemplate(load_tokenizer(Path(settings.tokenizer), "own"))
    print(MARKS)
    for source in read_manifest(folder, MARKER)["sources"]:
        print(f"\n===== {source['stage']}: {source['name']}, {source['train']} train and {source['dev']} dev records")
        found = files_of.get((source["stage"], source["name"]), [])
        for row in islice((row for file in found for row in rows_of(file)), count):
            print_record(f"{row['id']} from {row['place']}", from_row(source["stage"], row), template)


def preview_source(settings: CorpusSettings, name: str, count: int) -> None:
    """Print random records (the same in every call) from the beginnings of a source's files, and why others are none.
    UserError: there is no such source, or its paths are missing."""
    numbers = [n for n, source in enumerate(settings.sources) if name in (source.name, f"{source.stage}/{source.name}")]
    if not numbers:
        known = ", ".join(f"{source.stage}/{source.name}" for source in settings.sources)
        raise UserError(f"no source is named '{name}'; the corpus file has: {known}")
    template = ChatTemplate(load_tokenizer(Path(settings.tokenizer), "own"))
    print(MARKS)
    bounded = [
        source.model_copy(update={"limit": min(source.limit or RECORDS, RECORDS)}) for source in settings.sources
    ]
    settings = settings.model_copy(update={"sources": bounded})
    for number in numbers:
        source = settings.sources[number]
        files, account, drawn = raw_files(source), Account(), random.Random(0)
        looked_at = sorted(drawn.sample(files, min(FILES, len(files))))
        beginnings = (
            batched(
                read_clean(settings, Task(number, file), None, account), BEGINNING, lambda entry: len(str(entry[1]))
            )
            for file in looked_at
        )
        found = [entry for records in beginnings for entry in next(records, [])]
        rows, reasons = account.counts["rows"], account.counts["rejected"]
        print(f"\n===== {source.stage}: {source.name}: the first rows of {len(looked_at)} of {len(files)} files:"
              f" {rows['read']} rows, {len(found)} records")  # fmt: skip
        for about, _, record in drawn.sample(found, min(count, len(found))):
            print_record(about["place"], record, template)
        if rows["read"] > rows["used"]:  # with the details, which a build does not count by
            reasons += _reasons(source, looked_at)
        for reason, times in reasons.most_common(10):
            print(f"\nno record: {times} times: {reason}")


def _reasons(source: RawSource, files: list[Path]) -> Counter[str]:
    reader = READERS[source.kind]
    found = (islice(read_file(file, reader, source), RECORDS) for file in files)
    return Counter(record.reason for pairs in found for _, record in pairs if isinstance(record, Skipped))


def print_record(title: str, record: TrainingRecord, template: ChatTemplate) -> None:
    print(f"\n--- {title}")
    for name, ids, labels in encode(record, template):
        parts = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
        texts = ((trained, template.tokenizer.decode([id_ for id_, _ in pairs])) for trained, pairs in parts)
        print(name + "".join(f"{OPEN}{text}{CLOSE}" if trained else text for trained, text in texts))


def rows_of(file: Path) -> Iterator[Any]:
    return (row.value for part in open_parts(file, ROW_SUFFIXES) for row in read_rows(part))


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
