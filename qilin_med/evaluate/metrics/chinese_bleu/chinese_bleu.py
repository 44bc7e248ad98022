"""Corpus BLEU-1 and BLEU-4 of Chinese texts as a module of Hugging Face evaluate."""

import datasets
import evaluate

from qilin_med.evaluate.metrics.text import BLEU_ORDERS, UNITS, score_text, text_scores

DESCRIPTION = "Corpus BLEU-1 and BLEU-4 on characters and on jieba words (sacrebleu, no smoothing), 0 to 100."
INPUTS = "predictions, references: lists of texts of the same length. An empty prediction scores 0."
NAMES = tuple(f"bleu{order}_{unit}" for unit in UNITS for order in BLEU_ORDERS)


class ChineseBleu(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="Papineni et al. 2002", inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scores = text_scores([score_text(*pair) for pair in zip(predictions, references, strict=True)])
        return {name: scores[name].value() for name in NAMES}
