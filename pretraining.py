"""Stage 1: continued pre-training. All parameters, next token, on medical text (the paper's section 3.1).

Reads the experiment's `pretraining.data` (.txt, one sample a line; .jsonl with {"text"}) and the base model; writes
runs/<name>/pretraining/merged, a complete model folder.

    python pretraining.py --config configs/demo.json
"""

from qilin_med.job import Job
from qilin_med.training import run_stage, training_arguments


def build_trainer(job: Job):
    import torch

    from qilin_med.models import DTYPES, load_model
    from qilin_med.rows import open_rows
    from qilin_med.trainers import LanguageModelTrainer

    # DeepSpeed keeps fp32 master weights itself; without it the weights stay fp32 and only the arithmetic is bf16.
    settings = job.experiment.model
    dtype = DTYPES[settings.dtype] if job.section.deepspeed else torch.float32
    arguments = training_arguments(job)
    rows = open_rows(job.rows).dataset
    return LanguageModelTrainer(model=load_model(job.parent, settings, dtype), args=arguments, train_dataset=rows)


if __name__ == "__main__":
    run_stage("pretraining", build_trainer, __doc__)
