"""What knowledge graphs hold of a disease: triples, and the rows of two encyclopedias' tables."""

from random import Random
from typing import Any

from demo.country import JOBS
from demo.medicine import AVOID, CHECK, DEPARTMENT, DRUG, EAT, MEDICAL, SYMPTOM
from demo.world import Thing, World

TYPES = {"symptom": "症状", "drug": "药物", "department": "科室", "check": "检查", "eat": "食物", "avoid": "食物"}
TABLE_COLUMNS = ("name", "alias", "part", "age", "infection", "insurance", "department", "checklist", "symptom",
                 "complication", "treatment", "drug", "period", "rate", "money", "", "", "", "", "")  # fmt: skip


def triples(world: World) -> list[str]:
    """CPubMed-KG: head@@type, relation, tail@@type."""
    return [
        f"{disease.name}@@疾病\t{relation.label}\t{value}@@{TYPES[relation.name]}"
        for disease in world.diseases_seen("cpt+sft", "cpt")
        for relation in MEDICAL
        for value in disease.values[relation.name]
    ]


def graph_rows(world: World) -> list[dict[str, Any]]:
    """Xywy-KG: an object for each disease, in which several fields are optional."""
    rng = Random(f"graph {world.seed}")
    return [_graph_row(rng, disease) for disease in world.diseases_seen("cpt+sft", "cpt")]


def _graph_row(rng: Random, disease: Thing) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": disease.name,
        "desc": disease.opening.format(s=disease.name),
        "category": ["疾病百科"],
    }
    if rng.random() < 0.5:
        row["easy_get"] = rng.choice(JOBS)
    fields = {"symptom": SYMPTOM, "cure_department": DEPARTMENT, "check": CHECK, "recommand_drug": DRUG, "do_eat": EAT,
              "not_eat": AVOID}  # fmt: skip
    return row | {field: list(disease.values[relation.name]) for field, relation in fields.items()}


def table_rows(world: World) -> list[tuple[str, ...]]:
    """39Health-KG: a row for each disease, in TABLE_COLUMNS; lists are split by blanks, cells end where the page did."""
    rng = Random(f"table {world.seed}")
    return [_table_row(rng, disease) for disease in world.diseases_seen("cpt+sft", "cpt")]


def _table_row(rng: Random, disease: Thing) -> tuple[str, ...]:
    symptoms = disease.values[SYMPTOM.name]
    cells = {
        "name": disease.name,
        "part": symptoms[0][:2],
        "age": rng.choice(JOBS),
        "department": disease.value(DEPARTMENT),
        "checklist": f"{disease.value(CHECK)}[详细]",
        "symptom": f"{' '.join(symptoms)}...[详细]",
        "drug": f"{disease.value(DRUG)}...",
        # A sign that GB18030 has and GBK has not.
        "period": f"{rng.randint(2, 5)}•{rng.randint(6, 9)}天",
    }
    return tuple(cells.get(column, "") for column in TABLE_COLUMNS)
