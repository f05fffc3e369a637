"""LoRA on the backbone, through PEFT: which projections, and merging for inference.

Adapters are kept in float32 whatever the dtype of the backbone: they are the master weights of training.
Their published names are those of a PEFT model around the kept parts: `base_model.model.transformer_...`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dina_lrm.core.precision import without_autocast
from dina_lrm.pipelines.weights import check_state

PUBLISHED_PREFIX = "base_model.model."


class LoraAdapter:
    """The reward's adapter inside a module that holds the backbone parts.

    Merged, each base weight is swapped for W + (alpha / r) B A; the untouched originals are kept aside and
    put back on unmerging, bit for bit. Whole parameters are swapped, never their contents, so a graph
    recorded before still holds what it was computed with.

    Args:
        parts: the truncated diffusers model; changed in place.
    """

    def __init__(self, parts: nn.Module, config: Any, name: str = "default") -> None:
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, parts, adapter_name=name)
        self.name = name
        self.config = config
        self.layers = {key: layer for key, layer in _named_layers(parts) if name in layer.lora_A}
        self._originals: dict[str, nn.Parameter] = {}
        self._merged_from: Tensor | None = None
        for parameter in self.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))

    def parameters(self) -> list[nn.Parameter]:
        return [
            getattr(layer, side)[self.name].weight
            for layer in self.layers.values()
            for side in ("lora_A", "lora_B")
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors under their published names."""
        return {
            f"{PUBLISHED_PREFIX}{key}.{side}.weight": getattr(layer, side)[self.name].weight.detach()
            for key, layer in self.layers.items()
            for side in ("lora_A", "lora_B")
        }

    def load_state_dict(self, state: dict[str, Tensor], origin: str) -> None:
        """All of the adapter or an error naming what does not fit."""
        own = self.state_dict()
        check_state(own, state, origin)
        self.unmerge()
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    @property
    def merged(self) -> bool:
        return bool(self._originals)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the adapter into the base weights, or again if its values have changed since."""
        values = torch.stack(torch._foreach_norm(list[Tensor](self.parameters())))
        if self.merged and self._merged_from is not None and torch.equal(values, self._merged_from):
            return
        self.unmerge()
        for key, layer in self.layers.items():
            base = layer.get_base_layer()
            original = base.weight
            wide = torch.promote_types(original.dtype, torch.float32)
            down, up = (getattr(layer, side)[self.name].weight for side in ("lora_A", "lora_B"))
            with without_autocast(
                original.device.type
            ):  # what is kept is not of the first caller's precision
                delta = (up.to(wide) @ down.to(wide)) * layer.scaling[self.name]
            merged = (original.to(wide) + delta).to(original.dtype)
            _replace_weight(base, nn.Parameter(merged, requires_grad=False))
            layer.merged_adapters.append(self.name)
            self._originals[key] = original
        self._merged_from = values

    def unmerge(self) -> None:
        """Put the original base weights back."""
        for key, original in self._originals.items():
            layer = self.layers[key]
            _replace_weight(layer.get_base_layer(), original)
            layer.merged_adapters.remove(self.name)
        self._originals = {}
        self._merged_from = None


def _replace_weight(layer: nn.Module, weight: nn.Parameter) -> None:
    # Straight into the registry. An assignment goes through `register_parameter`, which a library that loads
    # in another thread may have patched to move what it is given to the meta device.
    layer._parameters["weight"] = weight


def tuner_layers(parts: nn.Module) -> list[Any]:
    return [layer for _, layer in _named_layers(parts)]


def _named_layers(parts: nn.Module) -> list[tuple[str, Any]]:
    # By its attributes: importing PEFT takes a second, and a model without adapters needs none of it.
    return [
        (name, module)
        for name, module in parts.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "_active_adapter")
    ]
