"""What the task files beside this one call; lm-evaluation-harness loads it by its path, from any working folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qilin_med.metrics.text import corpus_bleu  # noqa: F401
from qilin_med.tasks.questions import *  # noqa: F403
from qilin_med.tasks.scoring import *  # noqa: F403
from qilin_med.tasks.wording import *  # noqa: F403
