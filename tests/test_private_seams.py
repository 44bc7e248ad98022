"""The few places where a library's private code is replaced or called (CONTRIBUTING.md lists them with the reasons).

A new version that changes one of these methods fails here. Read what changed, adapt ours, then take over the new fingerprint.
"""

import hashlib
import inspect
from datetime import timedelta

import pytest
from deepspeed.comm.torch import build_shm_op
from lm_eval.models.huggingface import HFLM
from torch.distributed import distributed_c10d
from transformers import Trainer
from trl import DPOTrainer

SEAMS = {
    Trainer._save_checkpoint: "a9111e30faa9",
    Trainer._load_optimizer_and_scheduler: "741032f57d6f",
    DPOTrainer._prepare_dataset: "35e349e8e826",
    build_shm_op: "2bf3cff9e3d1",  # loads the operator that is among deepspeed.ops.__compatible_ops__
    HFLM._encode_pair: "374ff6fd67d4",
    HFLM._loglikelihood_tokens: "994529f70fd2",
    HFLM._model_generate: "c080f2baae10",
}


@pytest.mark.parametrize("method", SEAMS, ids=lambda method: method.__qualname__)
def test_a_private_method_is_still_the_one_that_we_know(method):
    assert hashlib.sha256(inspect.getsource(method).encode()).hexdigest()[:12] == SEAMS[method]


def test_groups_take_the_default_time_limit_that_ranks_set(monkeypatch):
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, timedelta(seconds=7))
    for backend in ("gloo", "nccl"):
        assert distributed_c10d._get_default_timeout(backend) == timedelta(seconds=7)
