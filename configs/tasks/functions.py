"""What the task files beside this one call; lm-evaluation-harness loads it by its path, from any working folder."""

from qilin_med.evaluate.metrics.text import corpus_bleu  # noqa: F401
from qilin_med.evaluate.tasks.questions import *  # noqa: F403
from qilin_med.evaluate.tasks.scoring import *  # noqa: F403
