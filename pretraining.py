"""Stage 1: continued pre-training. All parameters, next token, on medical text (the paper's section 3.1).

Reads the experiment's `pretraining.data` (.txt, one sample a line; .jsonl with {"text"}) and the base model; writes
runs/<name>/pretraining/merged, a complete model folder. With `pretraining.lora` an adapter trains in place of all
parameters.

    python pretraining.py --config configs/demo.json
"""

from qilin_med.train.job import Job
from qilin_med.train.stage import run_stage, training_arguments


def build_trainer(job: Job):
    from qilin_med.model.load import add_adapter, load_for_training
    from qilin_med.train.trainers import LanguageModelTrainer

    arguments = training_arguments(job)
    model = load_for_training(job.parent, job.experiment.model, job.section)
    if job.section.lora:
        model = add_adapter(model, job.section, job.experiment.seed)
    return LanguageModelTrainer(job, model, arguments)


if __name__ == "__main__":
    run_stage("pretraining", build_trainer, __doc__)
