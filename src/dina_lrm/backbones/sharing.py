"""Modules of our own over weights that stay where they are, in a network that belongs to somebody else.

A reward reads the network of a live pipeline without a second copy of its weights. Only the weights are
shared. A LoRA layer, the adapters active in it, hooks, training mode and gradient flags are state of a
module, and the pipeline changes it whenever it likes: `unload_lora_weights` takes layers out,
`delete_adapters` activates whichever adapter is left, another thread samples meanwhile. So each side has
modules of its own: the pipeline never sees the reward's adapter, the reward never sees the pipeline's, and
nothing is switched back and forth. What both sides do see is the values of the weights, which are therefore
watched.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dina_lrm.backbones.architecture import Architecture, truncated
from dina_lrm.backbones.fingerprint import NUM_VALUES, differing, is_plain, sampled_values
from dina_lrm.errors import InvalidInputError
from dina_lrm.pipelines.weights import listed


class SharedWeights:
    """The kept parts of a live network: its weights, and neither its adapters nor its hooks and modes.

    Attributes:
        network: whose weights they are.
        parts: our modules over them, in eval mode.
        originals: the network's module for each of ours.

    Raises:
        InvalidInputError: the weights are not in place, or hold fused adapters.
    """

    def __init__(self, network: nn.Module, architecture: Architecture, num_blocks: int) -> None:
        view = truncated(network, architecture, num_blocks)
        vars(view).pop("forward", None)  # only its parts are called
        problem = why_not_shared(view)
        if problem is not None:
            raise InvalidInputError(f"the pipeline's network cannot be shared: {problem}")
        self.network = network
        self.parts, self.originals = twin(view, hooks=False)
        self.originals[self.parts] = network
        self._entries = [
            (ours, theirs, kind, name)
            for ours, theirs in self.originals.items()
            for kind in ("_parameters", "_buffers")
            for name, tensor in getattr(ours, kind).items()
            if tensor is not None
        ]
        self._places: list[Any] = []
        self._recorded = sampled_values(self.parts)
        self._take()

    def follow(self) -> None:
        """Take over weights that were moved or cast; called before every use.

        Raises:
            InvalidInputError: they have other values than when they were taken.
        """
        if self._places == [_place(tensor) for tensor in self._theirs()]:
            if not torch.equal(_joined(self._views), self._values):
                self._refuse(differing(self._recorded, self.parts, rounding=None))
            return
        self._take()
        changed = differing(self._recorded, self.parts)
        if changed:
            self._places = []  # so that the next use refuses too
        self._refuse(changed)

    def _theirs(self) -> list[Tensor]:
        return [getattr(theirs, kind)[name] for _, theirs, kind, name in self._entries]

    @torch.no_grad()
    def _take(self) -> None:
        """Refer to the network's tensors as they are now."""
        tensors = self._theirs()
        for (ours, _, kind, name), tensor in zip(self._entries, tensors, strict=True):
            getattr(ours, kind)[name] = _constant(tensor)
        for name, parameter in self.parts.named_parameters():
            if ".lora_" in name:  # the reward's own adapter follows: nobody else can move it
                parameter.data = parameter.data.to(tensors[0].device)
        self._places = [_place(tensor) for tensor in tensors]
        self._views = [
            _few(tensor) for tensor in tensors if isinstance(tensor, nn.Parameter) and is_plain(tensor)
        ]
        self._values = _joined(self._views)

    def _refuse(self, changed: list[str]) -> None:
        if changed:
            raise InvalidInputError(
                f"the base weights of the shared network have changed since the reward took them "
                f"({listed(changed)}): by a LoRA fused into them (unfuse_lora() takes it out), by training, "
                f"or by loading others. A reward that is to outlive that must be loaded by itself"
            )


def apart(module: Any, name: str) -> Any:
    """An encoder of a live pipeline for one use: modules of our own over its weights, as they are now.

    An offloaded one is used where it is, since its weights come and go with its own calls.

    Raises:
        InvalidInputError: it is offloaded and has a LoRA, which the reward was not trained with.
    """
    if why_not_shared(module) is None:
        return twin(module, hooks=True)[0]
    adapted = {
        adapter
        for part in module.modules()
        if hasattr(part, "get_base_layer") and not part.disable_adapters
        for adapter in part.active_adapters
    }
    if adapted:
        raise InvalidInputError(
            f"the pipeline's {name} has a LoRA ({listed(adapted)}) that cannot be left out, because "
            f"{why_not_shared(module)}: the reward was trained without it. Unload it, or stop offloading"
        )
    return module


def twin(module: nn.Module, *, hooks: bool) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """The same modules again in eval mode, with the same tensors as constants, and the original of each.

    Without adapters and compiled calls.

    Args:
        hooks: keep them, where they belong to the model and not to its user.
    """
    made: dict[nn.Module, nn.Module] = {}

    def again(theirs: nn.Module) -> nn.Module:
        theirs = bare(theirs)
        if theirs in made:
            return made[theirs]
        ours = made[theirs] = copy.copy(theirs)
        for name in ("forward", "_compiled_call_impl"):  # bound to the original
            ours.__dict__.pop(name, None)
        for name, empty in vars(nn.Module()).items():
            if "hooks" in name:  # registries of its own in any case
                ours.__dict__[name] = copy.copy(vars(theirs)[name]) if hooks else empty
        ours._parameters = {name: _constant(value) for name, value in theirs._parameters.items()}
        ours._buffers = dict(theirs._buffers)
        ours._non_persistent_buffers_set = set(theirs._non_persistent_buffers_set)
        ours._modules = {
            name: None if child is None else again(child) for name, child in theirs._modules.items()
        }
        ours.training = False
        return ours

    root = again(module)
    return root, {ours: theirs for theirs, ours in made.items()}


def bare(module: Any) -> nn.Module:
    """The layer inside what PEFT and `torch.compile` put around it."""
    module = getattr(module, "_orig_mod", module)
    if hasattr(module, "get_base_layer"):
        module = module.get_base_layer()
    return getattr(module, "original_module", module)


def why_not_shared(module: nn.Module) -> str | None:
    """What keeps others from reading a module's weights in place, or None."""
    part: Any
    for name, part in module.named_modules():
        forward = vars(part).get("forward")
        if forward is not None and getattr(forward, "__func__", None) is not type(part).forward:
            return (
                f"the forward pass of {name or type(part).__name__} has been replaced, as offloading, "
                f"layerwise casting and caching do it, and its weights may not be in place"
            )
        if getattr(part, "merged_adapters", None):
            return f"{name} has adapters fused into its weights ({listed(part.merged_adapters)}): unfuse them"
    if any(tensor.device.type == "meta" for tensor in module.parameters()):
        return "it is offloaded to the meta device: load it fully"
    return None


def _constant(tensor: Any) -> Any:
    """The tensor itself; one that is trained as a constant over the same memory."""
    if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
        return nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor


def _place(tensor: Tensor) -> tuple[int, int, bool]:
    return id(tensor), tensor.data_ptr() if is_plain(tensor) else 0, tensor.requires_grad


def _few(tensor: Tensor) -> Tensor:
    """A view of a few numbers of a weight, in the order of its memory."""
    step = max(1, tensor.numel() // NUM_VALUES)
    return tensor.detach().as_strided((min(NUM_VALUES, tensor.numel()),), (step,))


def _joined(views: list[Tensor]) -> Tensor:
    return torch.cat(views) if views else torch.empty(0)
