"""Libraries' notes on optional parts that this pipeline does not use only hide what matters."""

import logging
import os
import sys
import warnings

_QUIET = {
    "HF_HUB_OFFLINE": "1",  # every model is a local folder; nothing is looked up or reported anywhere
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # qilin_med.console.progress draws the only bar
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TORCH_EXTENSIONS_DIR": f"{sys.prefix}/torch_extensions",  # of this environment, not one for all of the user's
}


def quiet_libraries() -> None:
    """Call before they are imported."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("bitsandbytes", "DeepSpeed", "accelerate", "torch.distributed", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed's import sets its level anew, and whatever saves a model imports it.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    warnings.filterwarnings("ignore")
