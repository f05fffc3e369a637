"""`dina-lrm train` under FSDP2 in gloo processes, started by torchrun.

accelerate turns to FSDP on accelerators only: with `cpu=True` its configuration is read and then ignored. The
one seam is here: once its state is made, the distribution is named FSDP, and from there on accelerate's own
code cuts the model, switches the optimizer's parameters and clips.

The margins of the last validation, computed with the weights in pieces, are left in OUTPUT/margins.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from dina_lrm.cli.main import run
from dina_lrm.training import trainer
from dina_lrm.training.validation import levels_label, validation_margins


def accelerator(**settings: Any) -> Accelerator:
    made = Accelerator(**settings)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    made.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    made.state.fsdp_plugin = plugin
    return made


def margins(*args: Any, **settings: Any) -> Any:
    found = validation_margins(*args, **settings)
    output = Path(sys.argv[sys.argv.index("--output") + 1])
    if PartialState().is_main_process:
        labelled = {levels_label(levels): values.tolist() for levels, values in found.by_levels.items()}
        (output / "margins.json").write_text(json.dumps(labelled))
    return found


if __name__ == "__main__":
    trainer.Accelerator, trainer.validation_margins = accelerator, margins
    run()
