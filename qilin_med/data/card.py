"""What a build says of itself: manifest.json, and README.md with tables in the layout of the paper's Tables 1 to 3."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import orjson
from jinja2 import Environment, StrictUndefined

from qilin_med.config.corpus import CorpusSettings, RawSource
from qilin_med.config.experiment import STAGES, StageName
from qilin_med.config.paper import CORPUS
from qilin_med.data.curate import EVALUATION_REASON, Task
from qilin_med.data.decontaminate import ITEMS
from qilin_med.data.shards import Row, Workspace, read_json_lines, write_json_lines

TYPES = {
    "text": "plain text", "huatuo": "QA", "exam": "QA", "cpubmed_kg": "knowledge graph", "xywy_kg": "knowledge graph",
    "39health_kg": "knowledge graph",
}  # fmt: skip
TITLES: dict[StageName, str] = {
    "pretraining": "Table 1: continued pre-training",
    "sft": "Table 2: supervised fine-tuning",
    "dpo": "Table 3: preference optimisation",
}
SHOWN = 20  # near misses in README.md
SUMMED = ("rows", "records", "kept", "train", "dev", "tokens", "bytes")


def describe(settings: CorpusSettings, tasks: tuple[Task, ...], work: Workspace, out: Path) -> dict[str, Any]:
    """The manifest's account of a build whose shards are all written; writes `out`/README.md and near_misses.jsonl."""
    shards = defaultdict(list)
    for shard, task in enumerate(tasks):
        shards[task.source].append(shard)
    sources = []
    for index, source in enumerate(settings.sources):
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for path in (work.path(step, shard, "counts.json") for step in ("clean", "written") for shard in shards[index]):
            for kind, found in orjson.loads(path.read_bytes()).items():
                counts[kind].update(found)
        sources.append({"stage": source.stage, "name": source.name, "kind": source.kind, "licence": source.licence,
                        **describe_counts(counts)})  # fmt: skip
    near_misses = [
        row for shard in range(len(tasks)) for row in read_json_lines(work.path("near_misses", shard, "jsonl"))
    ]
    near_misses.sort(key=lambda row: (-row["evaluation"]["similarity"], row["id"], row["place"]))
    write_json_lines(out / "near_misses.jsonl", near_misses)
    totals = {}
    for stage in STAGES:
        if mine := [source for source in sources if source["stage"] == stage]:
            totals[stage] = {name: sum(source[name] for source in mine) for name in SUMMED}
    evaluation = describe_evaluation(settings, work, sources, near_misses)
    manifest = {"name": settings.name, "sources": sources, "totals": totals, "evaluation": evaluation}
    by_question = {row["evaluation"]["item"]: row["evaluation"] | {"id": row["id"]} for row in reversed(near_misses)}
    text = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(trim_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
    page = environment.from_string(text).render(
        manifest,
        sources=[
            {**source, **type_and_paper(asked, source), "leaked": _leaked(source).total()}
            for asked, source in zip(settings.sources, sources, strict=True)
        ],
        near_misses=sorted(by_question.values(), key=lambda hit: -hit["similarity"])[:SHOWN],
        format=settings.format,
        titles=TITLES,
        licences={source.name: source.licence for source in settings.sources},
    )
    (out / "README.md").write_text(page, encoding="utf-8")
    return manifest


def describe_counts(counts: dict[str, Counter[str]]) -> dict[str, Any]:
    """What the tasks of one source counted; nothing may be missing."""
    rows, records, written = counts["rows"], counts["records"], counts["written"]
    skipped, rejected, duplicates = counts["skipped"], counts["rejected"], counts["duplicates"]
    assert rows["read"] == rows["used"] + skipped.total(), counts
    assert records["read"] == records["kept"] + rejected.total(), counts
    assert records["kept"] == written["train"] + written["dev"] + duplicates.total(), counts

    def by_reason(counter: Counter[str]) -> dict[str, int]:
        return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))

    return {
        "rows": rows["read"], "rows_used": rows["used"], "rows_skipped": by_reason(skipped),
        "records": records["read"], "changed": by_reason(counts["changed"]), "rejected": by_reason(rejected),
        "kept": records["kept"], "duplicates": by_reason(duplicates),
        **{name: written[name] for name in ("cut", "train", "dev", "several_turns", "tokens", "bytes")},
    }  # fmt: skip


def describe_evaluation(
    settings: CorpusSettings, work: Workspace, sources: list[dict[str, Any]], near_misses: list[Row]
) -> list[dict[str, Any]]:
    """What became of each evaluation file. `shared`: questions that another file has too; with many of them, one is no
    clean development set for the other."""
    questions = {file.name: 0 for file in settings.decontamination.files}
    stems, keys = ({name: set() for name in questions} for _ in range(2))
    for item in read_json_lines(work.root / "evaluation" / ITEMS):
        questions[item["file"]] += 1
        stems[item["file"]] |= {item["stem"]} - {""}
        keys[item["file"]].add((item["stem"], *sorted(item["options"])))
    removed = sum(map(_leaked, sources), Counter())
    nearly = Counter(row["evaluation"]["file"] for row in near_misses)
    # A listed file is kept out of all three sets, and so is fit for development; no other file is.
    return [
        {
            "name": name, "questions": count, "kept_out": True,
            "shared": {
                other: {"stems": len(both), "with the same options": len(keys[name] & keys[other])}
                for other in sorted(questions.keys() - {name})
                if (both := stems[name] & stems[other])
            },
            "records_removed": removed[name], "near_misses": nearly[name],
        }
        for name, count in questions.items()
    ]  # fmt: skip


def heavy_losses(sources: list[dict[str, Any]]) -> list[str]:
    """A line for each source that gives no record, or loses more than half of its rows in reading or of its records in
    cleaning (those that `share` leaves out are not lost)."""
    lines = []
    for source in sources:
        rejected = {reason: count for reason, count in source["rejected"].items() if reason != "not drawn"}
        skipped, lost = sum(source["rows_skipped"].values()), sum(rejected.values())
        if not source["kept"] or skipped * 2 > source["rows"] or lost * 2 > source["records"]:
            worst = max(
                {**source["rows_skipped"], **rejected}.items(), key=lambda item: item[1], default=("no rows", 0)
            )
            lines.append(
                f"{source['stage']}/{source['name']}: {source['kept']} records from {source['rows']} rows, {skipped} rows"
                f" skipped and {lost} records rejected, most for: {worst[0]} ({worst[1]})"
            )
    return lines


def _leaked(source: dict[str, Any]) -> Counter[str]:
    """Records of a source that repeat evaluation questions, by evaluation file."""
    prefix, reasons = EVALUATION_REASON, source["rejected"].items()
    return Counter({reason.removeprefix(prefix): n for reason, n in reasons if reason.startswith(prefix)})


def type_and_paper(asked: RawSource, source: dict[str, Any]) -> dict[str, Any]:
    """The type of a data set and its figures as the paper prints them, "-" where it has none."""
    if source["stage"] == "pretraining":
        type_ = TYPES.get(source["kind"], "dialogue")
    elif source["stage"] == "dpo":
        type_ = "pairs"
    else:
        mostly = source["several_turns"] * 2 > source["train"] + source["dev"]
        type_ = "multi" if (mostly if asked.multi_turn is None else asked.multi_turn) else "single"
    type_, paper = CORPUS[source["stage"]].get(source["name"], (type_, ("-", "-", "-")))
    return {"type": type_, "paper": paper}
