"""Show records of a built corpus as the model will see them, the trained part marked."""

from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qilin_med.artifact import read_manifest
from qilin_med.config.corpus import CorpusSettings
from qilin_med.config.experiment import StageName
from qilin_med.data.output import read_rows
from qilin_med.data.render import from_row
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
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{folder}: not built yet; run this command without --inspect first")
    tokenizer = load_tokenizer(Path(settings.tokenizer), "own")
    template = ChatTemplate(tokenizer)
    print(f"Trained parts stand between {OPEN} and {CLOSE}; <...> are tokens of the template.")
    for source in read_manifest(folder, "manifest.json")["sources"]:
        print(f"\n===== {source['stage']}: {source['name']}, {source['train']} train and {source['dev']} dev records")
        for row in islice(_rows_of(folder / source["stage"], source["name"]), count):
            print(f"\n--- {row['id']} from {row['place']}")
            for text in render_row(source["stage"], row, tokenizer, template):
                print(text)


def _rows_of(folder: Path, source: str) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.glob("train-*")) + sorted(folder.glob("dev-*")):
        yield from (row for row in read_rows(file) if row["source"] == source)


def render_row(
    stage: StageName, row: dict[str, Any], tokenizer: "PreTrainedTokenizerFast", template: ChatTemplate
) -> Iterator[str]:
    """The token rows that a record gives, decoded: one, or two for a preference pair."""
    record = from_row(stage, row)
    if isinstance(record, Document):
        [ids] = encode_texts(tokenizer, [record.text])
        yield _decoded(tokenizer, [*ids, tokenizer.eos_token_id], [0] * (len(ids) + 1))
    elif isinstance(record, Preference):
        pair = template.encode_preference(record, WHOLE, WHOLE)
        for name, answer in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            ids = pair.prompt_ids + answer
            yield f"[{name}] " + _decoded(tokenizer, ids, [IGNORED] * len(pair.prompt_ids) + answer)
    else:
        for encoded in template.encode_chat(record, WHOLE, WHOLE):
            yield _decoded(tokenizer, encoded.input_ids, encoded.labels)


def _decoded(tokenizer: "PreTrainedTokenizerFast", ids: list[int], labels: list[int]) -> str:
    parts = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    texts = ((trained, tokenizer.decode([id_ for id_, _ in pairs])) for trained, pairs in parts)
    return "".join(f"{OPEN}{text}{CLOSE}" if trained else text for trained, text in texts)
