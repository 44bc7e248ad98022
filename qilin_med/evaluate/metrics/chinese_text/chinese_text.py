"""BLEU and ROUGE of Chinese texts as a module of Hugging Face evaluate: load(path, "bleu"), load(path, "rouge") or both."""

import datasets
import evaluate

from qilin_med.evaluate.metrics.text import score_text, text_scores

DESCRIPTION = (
    "Corpus BLEU-1 and -4, means of ROUGE-1, -2 and -L, 0 to 100: on characters (_char), on jieba words (_word), and as"
    " CMExam's and Qilin-Med's scripts compute them (_published)."
)
INPUTS = "predictions, references: lists of texts of the same length. An empty prediction scores 0."


class ChineseText(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="Papineni et al. 2002; Lin 2004",
            inputs_description=INPUTS,
            features=features,
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scores = text_scores([score_text(*pair) for pair in zip(predictions, references, strict=True)])
        wanted = self.config_name if self.config_name in ("bleu", "rouge") else ""
        return {name: score.value() for name, score in scores.items() if name.startswith(wanted)}
