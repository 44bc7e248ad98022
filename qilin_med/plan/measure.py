"""What a step of a stage costs in memory and operations: measured on fake tensors (fake_run.py) once, then remembered.

Both are linear in the decoder layers and, at a fixed length, in the rows. So passes of two and three layers with two
numbers of rows tell those of the whole model at any batch size (tests/test_planner.py holds them against all layers).
"""

import json
import os
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

from qilin_med.artifact import digest, versions, write_json
from qilin_med.console.progress import progress
from qilin_med.errors import UserError, in_one_line

Costs = dict[str, list[float]]
"""{name: [what does not depend on rows, what each row adds]}; `fake_run.costs_of` says which."""


class Unmeasured(UserError):
    """The model cannot be run on fake tensors, so that nothing is known about its costs."""


def read_config(path: Path) -> str:
    """Contents of a model's config.json, or of that in a folder; UserError if it is not there or no JSON object."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file} does not exist; get the model, or name its config.json with --model-config (those of"
            " Baichuan-7B and others lie in configs/architectures)"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable config.json ({error})") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{file}: names no model_type; expected a Hugging Face configuration")
    return json.dumps(config, sort_keys=True)


@cache
def measure(request: str) -> Costs:
    """`request`: the JSON that `fake_run.measure` takes. UserError: adapters on layers that are not there; `Unmeasured`."""
    sources = [Path(__file__).with_name("fake_run.py"), Path(__file__).parents[1] / "model" / "losses.py"]
    key = digest([request, versions(), *(path.read_text(encoding="utf-8") for path in sources)])
    file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qilin_med" / "plan" / f"{key}.json"
    with suppress(OSError, ValueError):
        return json.loads(file.read_text(encoding="utf-8"))
    try:
        with progress("measuring the model on fake tensors"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries talk of what is deprecated in each other
            from qilin_med.plan import fake_run

            costs = fake_run.measure(json.loads(request))
    except UserError:
        raise
    except Exception as error:  # whatever a model's code may raise: the plan is a service, no condition for training
        model = json.loads(json.loads(request)["config"])["model_type"]
        raise Unmeasured(f"a model of type '{model}' cannot be measured ({in_one_line(error)})") from error
    with suppress(OSError):  # a home that cannot be written to costs the next plan a few seconds
        write_json(file, costs)
    return costs
