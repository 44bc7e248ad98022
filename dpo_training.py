"""Stage 3: direct preference optimisation. LoRA against the frozen SFT model (the paper's section 3.3).

The reference is the model itself with its adapter off; its log-probabilities are computed once and cached beside the
rows. Reads the experiment's `dpo.data` (question/response_chosen/response_rejected, conversations/chosen/rejected or
prompt/chosen/rejected rows) and the model of stage 2; writes runs/<name>/dpo/adapter and runs/<name>/dpo/merged.

    python dpo_training.py --config configs/demo.json
"""

from qilin_med.train.job import Job
from qilin_med.train.stage import run_stage, training_arguments


def build_trainer(job: Job):
    from transformers import set_seed
    from trl import DPOConfig

    from qilin_med.model.load import load_for_training, load_tokenizer, lora_config
    from qilin_med.train.trainers import PreferenceTrainer

    # Truncation is ours (token limits per question and answer), and so is dropout (the paper trains with 0.05).
    arguments = training_arguments(job, DPOConfig, beta=job.section.beta, max_length=None, disable_dropout=False)
    model = load_for_training(job.parent, job.experiment.model, job.section)
    set_seed(job.experiment.seed)  # TRL draws the adapter: the same on every rank
    return PreferenceTrainer(
        job,
        model,
        args=arguments,
        processing_class=load_tokenizer(job.parent, job.experiment.model.template),
        peft_config=lora_config(job.section.lora),
    )


if __name__ == "__main__":
    run_stage("dpo", build_trainer, __doc__)
