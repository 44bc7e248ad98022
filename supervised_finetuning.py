"""Stage 2: supervised fine-tuning. LoRA on instructions and dialogues, loss on the answers only (section 3.2).

Reads the experiment's `sft.data` (ChiMed, ShareGPT, messages or instruction/input/output rows) and the model of stage 1;
writes runs/<name>/sft/adapter and runs/<name>/sft/merged, a complete model folder.

    python supervised_finetuning.py --config configs/demo.json
"""

from qilin_med.train.job import Job
from qilin_med.train.stage import run_stage, training_arguments


def build_trainer(job: Job):
    from qilin_med.model.load import add_adapter, load_for_training
    from qilin_med.train.trainers import LanguageModelTrainer

    arguments = training_arguments(job)
    model = add_adapter(
        load_for_training(job.parent, job.experiment.model, job.section), job.section, job.experiment.seed
    )
    return LanguageModelTrainer(job, model, arguments)


if __name__ == "__main__":
    run_stage("sft", build_trainer, __doc__)
