"""How a run is spread over processes by accelerate: DDP, or FSDP2, which cuts the weights into pieces.

Under FSDP2 the average of the weights and the best weights are kept as pieces too; checkpoints are gathered
whole in the main process, so they neither show nor fix how many processes there were.
"""

import os

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, is_torch_xla_available
from torch import nn

from dina_lrm.errors import InvalidInputError

__all__ = ["check_distribution", "drop_gathered", "is_first_process", "on_cpu", "treat_as_forward"]


def is_first_process() -> bool:
    """Whether this is the one of a launcher's processes that reports; true of a process on its own."""
    return os.environ.get("RANK", "0") == "0"


def on_cpu(cpu: bool) -> bool:
    """Whether a run is to be told to accelerate as one on the CPU: where that is asked for, and where a
    launcher started several processes on a machine without an accelerator. Accelerate would take those for
    as many runs of their own, each of them writing into the same folder."""
    launched = os.environ.get("LOCAL_RANK") is not None
    return cpu or (launched and not torch.accelerator.is_available() and not is_torch_xla_available())


def check_distribution(
    kind: DistributedType, plugin: FullyShardedDataParallelPlugin | None, model: nn.Module, *, compile: bool
) -> None:
    """Raise InvalidInputError for a configuration of accelerate that a run cannot work under.

    Args:
        plugin: accelerate's settings of FSDP, where it is configured.
        compile: is the model to be compiled?
    """
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise InvalidInputError(
            f"accelerate was configured for {kind.value}, whose engine keeps weights and optimizer to "
            "itself, out of reach of the average of the weights and of our checkpoints: "
            "use FSDP with fsdp_version: 2, or DDP"
        )
    if kind != DistributedType.FSDP:
        return
    assert plugin is not None
    problem = None
    if plugin.fsdp_version != 2:
        problem = f"fsdp_version: {plugin.fsdp_version} is not supported, use fsdp_version: 2"
    elif plugin.cpu_ram_efficient_loading:
        problem = "every process reads the weights itself, set fsdp_cpu_ram_efficient_loading: false"
    elif plugin.activation_checkpointing:
        problem = "set fsdp_activation_checkpointing: false, and gradient_checkpointing in the recipe"
    elif compile:
        problem = "compile is not supported with it, set compile = false"
    elif scalars := [name for name, parameter in model.named_parameters() if parameter.ndim == 0]:
        problem = f"a single number cannot be cut, and this model has {', '.join(scalars)}: use DDP"
    if problem:
        raise InvalidInputError(f"accelerate was configured for FSDP: {problem}")


def treat_as_forward(module: nn.Module, method: str) -> None:
    """Under FSDP2, gather the weights of `module` for this method too, as is done for its `forward`."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    register_fsdp_forward_method(module, method)


def drop_gathered(module: nn.Module) -> None:
    """Under FSDP2, free the whole weights that a forward pass without a backward pass has left behind.

    The next forward would use them, although the pieces may have changed since.
    """
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
