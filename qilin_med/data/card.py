"""What a build says of itself: manifest.json, and README.md with tables in the layout of the paper's Tables 1 to 3."""

from collections import Counter
from pathlib import Path
from typing import Any

import orjson

from qilin_med.config.corpus import CorpusSettings, RawSource
from qilin_med.config.experiment import STAGES, StageName
from qilin_med.config.paper import CORPUS
from qilin_med.data.decontaminate import ITEMS
from qilin_med.data.deduplicate import Workspace
from qilin_med.data.intake import CLEAN, EVALUATION_REASON, NEAR_MISSES, SKIPPED, Counts, Task
from qilin_med.data.output import Written
from qilin_med.data.shards import read_lines, write_lines

TYPES = {
    "text": "plain text", "huatuo": "QA", "exam": "QA", "cpubmed_kg": "knowledge graph", "xywy_kg": "knowledge graph",
    "39health_kg": "knowledge graph",
}  # fmt: skip
TITLES: dict[StageName, str] = {
    "pretraining": "Table 1: continued pre-training",
    "sft": "Table 2: supervised fine-tuning",
    "dpo": "Table 3: preference optimisation",
}


def describe(
    settings: CorpusSettings, tasks: tuple[Task, ...], evaluation: dict[str, list[Path]], work: Workspace,
    inputs: dict[str, Any],
) -> tuple[dict[str, Any], str]:  # fmt: skip
    """(manifest, README) of a build whose shards are all written."""
    sources = [
        _describe_source(source, [shard for shard, task in enumerate(tasks) if task.source == index], work)
        for index, source in enumerate(settings.sources)
    ]
    near_misses = _gather_near_misses(work, len(tasks))
    held_out = _describe_evaluation(settings, work, sources, near_misses)
    manifest = {
        "name": settings.name,
        "inputs": inputs,
        "sources": sources,
        "totals": {stage: _total(sources, stage) for stage in STAGES if any(s["stage"] == stage for s in sources)},
        "evaluation": held_out,
    }
    return manifest, _readme(settings, manifest)


def _describe_source(source: RawSource, shards: list[int], work: Workspace) -> dict[str, Any]:
    counts = Counts.sum(_json(work.path(CLEAN, shard, "counts.json")) for shard in shards)
    written = Written.sum(_json(work.path("written", shard, "json")) for shard in shards)
    assert counts.kept == written.before, source.name
    return {
        "stage": source.stage, "name": source.name, "kind": source.kind, "licence": source.licence,
        "rows": counts.rows, "rows_used": counts.used, "rows_skipped": _sorted(counts.skipped),
        "records": counts.records, "changed": _sorted(counts.changed), "dropped": _sorted(counts.dropped),
        "kept": counts.kept, "duplicates": _sorted(written.dropped), "cut": written.cut,
        "train": written.train, "dev": written.dev, "several_turns": written.several_turns,
        "tokens": written.tokens, "bytes": written.bytes,
    }  # fmt: skip


def _total(sources: list[dict[str, Any]], stage: StageName) -> dict[str, int]:
    mine = [source for source in sources if source["stage"] == stage]
    names = ("rows", "records", "kept", "train", "dev", "tokens", "bytes")
    return {name: sum(source[name] for source in mine) for name in names}


def _describe_evaluation(
    settings: CorpusSettings, work: Workspace, sources: list[dict[str, Any]], near_misses: Counter
) -> list[dict[str, Any]]:
    items: dict[str, list[dict[str, Any]]] = {file.name: [] for file in settings.decontamination.files}
    for item in read_lines(work.root / "evaluation" / ITEMS):
        items[item["file"]].append(item)
    removed: Counter = Counter()
    for source in sources:
        removed.update(
            {
                r.removeprefix(EVALUATION_REASON): n
                for r, n in source["dropped"].items()
                if r.startswith(EVALUATION_REASON)
            }
        )
    # A listed file is kept out of all three sets, and so is fit for development; no other file is.
    return [
        {
            "name": file.name, "questions": len(items[file.name]), "kept_out": True, "shared": _shared(file.name, items),
            "records_removed": removed[file.name], "near_misses": near_misses[file.name],
        }
        for file in settings.decontamination.files
    ]  # fmt: skip


def _shared(name: str, items: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, int]]:
    """Questions that another evaluation file has as well: one that shares many is no clean development set for it."""
    shared = {}
    for other in items.keys() - {name}:
        stems, keys = (len(_all(items[name], field) & _all(items[other], field)) for field in ("stem", "keys"))
        if stems:
            shared[other] = {"stems": stems, "with the same options": keys}
    return dict(sorted(shared.items()))


def _all(items: list[dict[str, Any]], field: str) -> set[str]:
    return {value for item in items for value in ([item[field]] if isinstance(item[field], str) else item[field])} - {
        ""
    }


def _gather_near_misses(work: Workspace, shards: int) -> Counter:
    """Publish the near misses in one file, the nearest first; returns how many each evaluation file has."""
    rows = [row for shard in range(shards) for row in read_lines(work.path(NEAR_MISSES, shard, "jsonl"))]
    rows.sort(key=lambda row: (-row["coverage"], row["id"], row["place"]))
    write_lines(work.root / "out" / f"{NEAR_MISSES}.jsonl", rows)
    return Counter(row["file"] for row in rows)


def _json(path: Path) -> dict[str, Any]:
    return orjson.loads(path.read_bytes())


def _sorted(counter: Counter) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


# -------------------------------------------------------------------------------------------------------- readme


def _readme(settings: CorpusSettings, manifest: dict[str, Any]) -> str:
    stages = list(manifest["totals"])
    lines = [*_front_matter(settings, stages), f"# {settings.name}", "", "Training data for Qilin-Med, built from public"
             " files by `scripts/build_chimed.py`. For research; no patient care. The licences of the sources go on"
             " holding (below).", ""]  # fmt: skip
    for stage in stages:
        lines += _table(stage, [s for s in manifest["sources"] if s["stage"] == stage])
    lines += ["Samples are train and dev together; tokens are those of all texts by the tokenizer in the corpus file,"
              " without template; MB are 10^6 bytes of UTF-8 text. The paper's figures are as printed (arXiv:2310.09089,"
              " Tables 1 to 3).", ""]  # fmt: skip
    lines += ["## From rows to samples", "", "| set | source | rows | skipped | records | dropped by rules"
              " | evaluation questions | duplicates | train | dev |", "|---|---|" + "---:|" * 8]  # fmt: skip
    lines += [_flow(source) for source in manifest["sources"]]
    lines += ["", f"Every row that is not in a set lies in `{SKIPPED}/` with its reason, every changed one in `changed/`"
              " with its text before. `manifest.json` has the counts by reason.", ""]  # fmt: skip
    lines += [
        "## Kept out",
        "",
        "| evaluation file | questions | also in | records removed | near misses |",
        "|---|---:|---|---:|---:|",
    ]
    lines += [f"| {e['name']} | {e['questions']} | {_listed(e['shared'])} | {e['records_removed']} | {e['near_misses']} |"
              for e in manifest["evaluation"]]  # fmt: skip
    lines += ["", "These files are fit for development and tests. Any other exam file among the sources has been trained"
              f" on and is not. Near misses, kept but suspicious, lie in `{NEAR_MISSES}.jsonl`.", ""]  # fmt: skip
    lines += ["## Licences", "", "| source | licence |", "|---|---|"]
    lines += [f"| {name} | {licence} |" for name, licence in {s.name: s.licence for s in settings.sources}.items()]
    return "\n".join([*lines, ""])


def _listed(shared: dict[str, dict[str, int]]) -> str:
    return (
        "; ".join(f"{name}: {', '.join(f'{n} {what}' for what, n in s.items())}" for name, s in shared.items()) or "-"
    )


def _front_matter(settings: CorpusSettings, stages: list[StageName]) -> list[str]:
    """The Hub's metadata: a configuration for each set."""
    suffix = settings.format
    lines = [
        "---",
        f"pretty_name: {settings.name}",
        "language: [zh, en]",
        "license: other",
        "tags: [medical]",
        "configs:",
    ]
    for stage in stages:
        lines += [f"- config_name: {stage}", "  data_files:", "  - split: train", f"    path: {stage}/train-*.{suffix}",
                  "  - split: validation", f"    path: {stage}/dev-*.{suffix}"]  # fmt: skip
    return [*lines, "---", ""]


def _table(stage: StageName, sources: list[dict[str, Any]]) -> list[str]:
    lines = [f"## {TITLES[stage]}", "", "| type | dataset | samples | tokens | MB | paper: samples | tokens | MB |",
             "|---|---|" + "---:|" * 6]  # fmt: skip
    for source in sources:
        type_, paper = CORPUS[stage].get(source["name"], (_type_of(source), ("-", "-", "-")))
        ours = (f"{source['train'] + source['dev']:,}", f"{source['tokens']:,}", f"{source['bytes'] / 1e6:,.1f}")
        lines.append(f"| {' | '.join((type_, source['name'], *ours, *paper))} |")
    total = _total(sources, stage)
    samples, megabytes = total["train"] + total["dev"], total["bytes"] / 1e6
    return [*lines, f"| | total | {samples:,} | {total['tokens']:,} | {megabytes:,.1f} | | | |", ""]


def _type_of(source: dict[str, Any]) -> str:
    if source["stage"] == "pretraining":
        return TYPES.get(source["kind"], "dialogue")
    if source["stage"] == "dpo":
        return "pairs"
    return "multi" if source["several_turns"] * 2 > source["train"] + source["dev"] else "single"


def _flow(source: dict[str, Any]) -> str:
    leaked = sum(count for reason, count in source["dropped"].items() if reason.startswith(EVALUATION_REASON))
    figures = (
        source["rows"], sum(source["rows_skipped"].values()), source["records"],
        sum(source["dropped"].values()) - leaked, leaked, sum(source["duplicates"].values()), source["train"],
        source["dev"],
    )  # fmt: skip
    return f"| {source['stage']} | {source['name']} | {' | '.join(f'{figure:,}' for figure in figures)} |"
