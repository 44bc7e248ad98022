"""Stage 1: continued pre-training. All parameters, next token, on medical text (the paper's section 3.1).

Reads the experiment's `pretraining.data` (texts: .txt, one sample a line, or tables with a text column) and the base
model; writes runs/<name>/pretraining/merged, a complete model folder. With `pretraining.lora` an adapter trains in place
of all parameters.

    python pretraining.py --config configs/demo.json
    torchrun --nproc_per_node 8 pretraining.py --config configs/qilin_med_7b.json     # or srun, or deepspeed
"""

from pathlib import Path

from qilin_med.train.job import Job
from qilin_med.train.stage import stage_script, training_arguments


def main() -> None:
    with stage_script("pretraining", __doc__) as stage:
        # Documents are joined, each ended by EOS, and cut into blocks of equal length; nothing is dropped.
        job = stage.prepare()
        # Every rank trains on its part of each step's blocks, next token at every position of every document.
        checkpoint = stage.train(job, build_trainer)
        # The text that was read has ends of documents, but no turns of a conversation.
        stage.publish(job, checkpoint, trained_model(job, checkpoint), ends_turns=False)


def build_trainer(job: Job):
    from qilin_med.model.load import add_adapter, load_for_training
    from qilin_med.train.trainers import LanguageModelTrainer

    arguments = training_arguments(job)
    # Parameters that train are held in fp32, by DeepSpeed or by ourselves.
    model = load_for_training(job.parent, job.experiment.model, job.section)
    if job.section.lora:
        model = add_adapter(model, job.section, job.experiment.seed)
    return LanguageModelTrainer(job, model, args=arguments)


def trained_model(job: Job, checkpoint: Path):
    """The last checkpoint holds all parameters; with LoRA it holds the adapter alone, which goes into the base model."""
    from qilin_med.model.load import DTYPES, load_checkpoint, merge_adapter

    if job.section.lora:
        return merge_adapter(job.parent, checkpoint)
    return load_checkpoint(checkpoint, DTYPES[job.experiment.model.dtype])


if __name__ == "__main__":
    main()
