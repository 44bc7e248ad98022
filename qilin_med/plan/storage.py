"""Disk and host memory that a stage needs."""

from qilin_med.plan.memory import Training, gradient_bytes, share, weights_bytes


def checkpoint_bytes(training: Training) -> float:
    """One training checkpoint: what trains (weights, and DeepSpeed's own copy of them), and the optimizer's states."""
    t = training
    if not t.engine.deepspeed:
        return t.trainable * (t.trained_bytes + 8)
    optimizer = 12 if t.engine.zero or t.compute_bytes == 2 else 8
    return t.trainable * (2 * t.trained_bytes + optimizer)


def merged_bytes(training: Training) -> float:
    """The published model, and the adapter beside it."""
    t = training
    return t.architecture.parameters * t.compute_bytes + (t.trainable * t.trained_bytes if t.lora else 0)


def disk_bytes(training: Training, keep: int) -> float:
    """Checkpoints kept and one more, as the oldest goes only when the newest is complete; then the merged model."""
    return (keep + 1) * checkpoint_bytes(training) + merged_bytes(training)


def host_bytes(training: Training) -> float:
    """Memory of one machine beside its GPUs: each rank loads the model, then keeps what is offloaded."""
    t = training
    loading = t.local_ranks * t.architecture.parameters * (t.compute_bytes if t.lora else t.trained_bytes)
    return max(loading, offloaded_bytes(t), merging_bytes(t))


def offloaded_bytes(training: Training) -> float:
    """One machine's part of what DeepSpeed keeps in host memory: fp32 weights, moments and gradients (4 + 8 + 4)."""
    t, engine = training, training.engine
    if not engine.offload_optimizer:
        return 0
    optimizer = t.trainable * 16 / t.ranks * t.local_ranks
    # ZeRO-1 and 2 write updated weights through a buffer; parameters that are offloaded stay.
    weights = weights_bytes(t) if engine.offload_parameters else t.trainable * gradient_bytes(t)
    return optimizer + weights / share(t, True) * t.local_ranks


def merging_bytes(training: Training) -> float:
    """Merging is done in fp32, by one process."""
    t = training
    return t.architecture.parameters * 4 if t.lora else t.architecture.parameters * t.compute_bytes
