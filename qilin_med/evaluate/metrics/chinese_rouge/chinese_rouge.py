"""Mean ROUGE-1, ROUGE-2 and ROUGE-L of Chinese texts as a module of Hugging Face evaluate."""

import datasets
import evaluate

from qilin_med.evaluate.metrics.text import ROUGE, UNITS, score_text, text_scores

DESCRIPTION = "Means of ROUGE-1, ROUGE-2 and ROUGE-L F1 on characters and on jieba words (rouge-chinese), 0 to 100."
INPUTS = "predictions, references: lists of texts of the same length. An empty prediction scores 0."
NAMES = tuple(f"{name}_{unit}" for unit in UNITS for name in ROUGE)


class ChineseRouge(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="Lin 2004", inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scores = text_scores([score_text(*pair) for pair in zip(predictions, references, strict=True)])
        return {name: scores[name].value() for name in NAMES}
