"""Stage 3: direct preference optimisation. LoRA against the frozen SFT model (the paper's section 3.3).

The reference is the model itself with its adapter off; its log-probabilities are computed once and cached beside the
rows. Reads the experiment's `dpo.data` (question/response_chosen/response_rejected, conversations/chosen/rejected or
prompt/chosen/rejected rows) and the model of stage 2; writes runs/<name>/dpo/adapter and runs/<name>/dpo/merged.

    python dpo_training.py --config configs/demo.json
    torchrun --nproc_per_node 2 dpo_training.py --config configs/demo.json     # or srun, or deepspeed
"""

from qilin_med.train.stage import stage_script, training_arguments


def main() -> None:
    with stage_script("dpo", __doc__) as dpo:
        # A pair: one prompt, and the ids of the chosen and of the rejected answer.
        job = dpo.prepare()
        # Before the first step every pair is scored once by the SFT model. The first step must show a loss of ln 2, for
        # policy and reference are still the same there.
        checkpoint = dpo.train(job, build_trainer)
        dpo.publish(job, checkpoint, policy(job, checkpoint), ends_turns=True)


def build_trainer(job):
    from transformers import set_seed
    from trl import DPOConfig

    from qilin_med.model.load import load_for_training, load_tokenizer, lora_config
    from qilin_med.train.trainers import PreferenceTrainer

    # Truncation is ours (token limits per question and answer), and so is dropout (the paper trains with 0.05).
    arguments = training_arguments(job, DPOConfig, beta=job.section.beta, max_length=None, disable_dropout=False)
    sft_model = load_for_training(job.parent, job.experiment.model, job.section)
    set_seed(job.experiment.seed)  # TRL draws the adapter: the same on every rank
    return PreferenceTrainer(
        job,
        sft_model,
        args=arguments,
        processing_class=load_tokenizer(job.parent, job.experiment.model.template),
        peft_config=lora_config(job.section.lora),
    )


def policy(job, checkpoint):
    """The SFT model with the trained adapter merged in; the reference was the same model without it."""
    from qilin_med.model.load import merge_adapter

    return merge_adapter(job.parent, checkpoint)


if __name__ == "__main__":
    main()
