"""One exam asked in several ways: how far the scores are apart, and how many answers the way of asking decides.

Why: scores of the same model differ by more between protocols than between models (Alzahrani et al. 2024), and answers change
when options are only shuffled (Pezeshkpour and Hruschka 2023; Zheng et al. 2024 on the liking for a place).
"""

import re
from collections import Counter
from itertools import product
from typing import Any

from qilin_med.artifact import write_json
from qilin_med.config.experiment import ProtocolSettings, TaskSettings
from qilin_med.console.progress import progress
from qilin_med.evaluate.harness import ModelUnderTest, run_task
from qilin_med.evaluate.metrics.statistics import mean_score
from qilin_med.evaluate.results import PROTOCOLS, read_samples
from qilin_med.evaluate.tasks.scoring import Sample, calibration, favourite


def protocols_of(name: str, settings: ProtocolSettings) -> dict[str, TaskSettings]:
    """The questions of an entry of evaluation.protocols asked in each way, by the name of the way."""
    orders = [{"rotate": places} for places in settings.rotate] + [{"shuffle": seed} for seed in settings.shuffle]
    factors = [
        [(answers, {"answers": answers}) for answers in settings.answers],
        [("chat" if chat else "plain", {"chat": chat}) for chat in settings.chat],
        [(f"{shots} examples", {"shots": shots}) for shots in settings.shots],
        [(prompt, {"prompt": template}) for prompt, template in settings.prompts.items()] or [("", {})],
        [(" ".join(map(str, *order.items())) if order != {"rotate": 0} else "", order) for order in orders],
    ]
    firsts, ways = tuple(values[0] for values in factors), []
    for way in product(*factors):
        changed = sum(value is not first for value, first in zip(way, firsts, strict=True))
        if settings.combine == "all" or changed <= 1:
            ways.append(way)
    task = {"task": settings.questions.task or name}
    return {
        ", ".join(filter(None, (word for word, _ in way))): settings.questions.model_copy(
            update={key: value for _, values in way for key, value in values.items()} | task
        )
        for way in ways
    }


def run_protocols(model: ModelUnderTest, name: str, settings: ProtocolSettings) -> dict[str, Any]:
    """Ask in every way, and write what they say together to runs/<run>/eval/<model>/protocols/<name>.json (`summarise`).
    Each way is a result of its own below the folder of that name. {} on all ranks but the first."""
    asked = {}
    for way, questions in protocols_of(name, settings).items():
        folder = f"{PROTOCOLS}/{folder_name(name)}/{folder_name(way)}"
        with progress(f"{name}: {way}"):
            if run_task(model, folder, questions):
                asked[way] = {sample["id"]: sample for sample in read_samples(model.results / folder)}
    if not asked:
        return {}
    summary = summarise_protocols(asked)
    write_json(model.results / PROTOCOLS / f"{folder_name(name)}.json", summary)
    return summary


def folder_name(way: str) -> str:
    """A way's name with nothing in it that a path or a shell would read otherwise."""
    return re.sub(r"[^\w.]+", "_", way)


def summarise_protocols(asked: dict[str, dict[str, Sample]]) -> dict[str, Any]:
    """`asked`: by way and id of the question. All figures are of the questions with a known answer that every way asked.

    {"questions", "ways": {way: {"accuracy" with its interval, "unparsed", "flips": share of answers that are not those of the
    first way, "ece", "bins", "favourite"}}, "spread": of accuracies from lowest to highest, "flips": share of questions whose
    answer is not the same in every way, "places": {letter: how often it is right, how often it is chosen}}
    """
    shared = sorted(set.intersection(*(set(samples) for samples in asked.values())))
    shared = [key for key in shared if all(samples[key]["gold"] for samples in asked.values())]
    if not shared:
        return {"questions": 0, "ways": {}}
    ways: dict[str, dict[str, Any]] = {}
    chosen = {way: [chosen_options(samples[key]) for key in shared] for way, samples in asked.items()}
    first = next(iter(chosen.values()))
    for way, samples in asked.items():
        rows = [samples[key] for key in shared]
        ways[way] = {
            "accuracy": mean_score([sample["score"]["accuracy"] for sample in rows]).with_interval(),
            "unparsed": sum(not sample["answer"] for sample in rows),
            "flips": sum(a != b for a, b in zip(chosen[way], first, strict=True)) / len(shared),
            "favourite": favourite(rows),
            **calibration(rows),
        }
    values = [way["accuracy"]["value"] for way in ways.values()]
    return {
        "questions": len(shared),
        "ways": ways,
        "spread": max(values) - min(values),
        "flips": sum(len(set(answers)) > 1 for answers in zip(*chosen.values(), strict=True)) / len(shared),
        "places": places([samples[key] for samples in asked.values() for key in shared]),
    }


def chosen_options(sample: Sample) -> tuple[int, ...]:
    """The chosen options by their places in the file, whatever order they were shown in; () where none could be read."""
    return tuple(sorted(sample["order"][letter] for letter in sample["answer"]))


def places(samples: list[Sample]) -> dict[str, dict[str, float]]:
    """How often each letter is right and is chosen, among questions with one right letter: a model without a liking for a
    place chooses each as often as it is right, where options were rotated through all places."""
    single = [sample for sample in samples if len(sample["gold"]) == 1]
    right, chosen = (Counter(sample[key] for sample in single) for key in ("gold", "answer"))
    return {
        letter: {"right": right[letter] / len(single), "chosen": chosen[letter] / len(single)}
        for letter in sorted({*right, *chosen} - {""})
    }
