"""What the task files beside this one call; lm-evaluation-harness loads it by its path, from any working folder."""

from functools import partial

from qilin_med.evaluate.metrics.text import corpus_bleu  # noqa: F401
from qilin_med.evaluate.tasks.questions import *  # noqa: F403
from qilin_med.evaluate.tasks.questions import load_questions
from qilin_med.evaluate.tasks.scoring import *  # noqa: F403

# One for each way to answer.
load_letters, load_options = partial(load_questions, "letters"), partial(load_questions, "options")
load_generate, load_text = partial(load_questions, "generate"), partial(load_questions, "text")
