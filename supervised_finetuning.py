"""Stage 2: supervised fine-tuning. LoRA on instructions and dialogues, loss on the answers only (section 3.2).

Reads the experiment's `sft.data` (ChiMed, ShareGPT, messages or instruction/input/output rows) and the model of stage 1;
writes runs/<name>/sft/adapter and runs/<name>/sft/merged, a complete model folder.

    python supervised_finetuning.py --config configs/demo.json
    torchrun --nproc_per_node 2 supervised_finetuning.py --config configs/demo.json     # or srun, or deepspeed
"""

from qilin_med.train.stage import stage_script, training_arguments


def main() -> None:
    with stage_script("sft", __doc__) as sft:
        # Conversations become ids through the chat template. Questions are cut to max_source_length tokens and answers to
        # max_target_length; labels are -100 outside the answers, so that only they are learnt.
        job = sft.prepare()
        # The frozen weights are those of stage 1; each step is a random draw of whole conversations.
        last = sft.train(job, build_trainer)
        # From here on the model ends its turns by itself.
        sft.publish(job, last, with_adapter(job, last), ends_turns=True)


def build_trainer(job):
    """A low-rank adapter on every linear layer but the output head, its start drawn from the experiment's seed."""
    from qilin_med.model import load
    from qilin_med.train import trainers

    settings = training_arguments(job)
    frozen = load.load_for_training(job.parent, job.experiment.model, job.section)
    adapted = load.add_adapter(frozen, job.section, job.experiment.seed)
    return trainers.LanguageModelTrainer(job, adapted, args=settings)


def with_adapter(job, folder):
    """Parent and adapter as one model, in fp32, rounded once: a merge in bf16 changes 1-2% of the predicted tokens."""
    from qilin_med.model import load

    return load.merge_adapter(job.parent, adapter=folder)


if __name__ == "__main__":
    main()
