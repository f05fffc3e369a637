"""What a checkpoint holds, whatever its layout."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dina_lrm.checkpoints.config import RewardModelConfig
from dina_lrm.errors import CheckpointError, InvalidInputError
from dina_lrm.pipelines.source import read_json
from dina_lrm.pipelines.weights import read_safetensors


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The contents of a checkpoint, whatever its layout: state dicts under our module names."""

    config: RewardModelConfig
    head: dict[str, Tensor]
    logistic: dict[str, Tensor] | None = None
    """eta3 and eta4; None in published LoRA and head-only checkpoints, which do not store them."""
    adapter: dict[str, Tensor] | None = None
    """LoRA tensors under their PEFT names."""
    backbone: dict[str, Tensor] | None = None
    """All kept blocks, for tuning = "full"."""
    trained: bool = True
    training_step: int | None = None
    fingerprint: Mapping[str, Any] | None = None
    """Architecture of the base transformer and a few values of each kept weight (`backbones/fingerprint.py`);
    None where the layout has no place."""
    origin: str = ""
    """Where it was read from, for messages."""
    versions: Mapping[str, str] = field(default_factory=dict)
    card: str | None = None
    """Markdown that README.md adds to what `model_card` says by itself: data, recipe, measured figures."""


def write_adapter(folder: Path, config: RewardModelConfig, adapter: Mapping[str, Tensor]) -> None:
    """A PEFT adapter folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    peft_config = config.lora_config()
    peft_config.inference_mode = True
    peft_config.save_pretrained(str(folder))
    save_file(
        {name: tensor.contiguous() for name, tensor in adapter.items()}, folder / "adapter_model.safetensors"
    )


def read_adapter(folder: Path, config: RewardModelConfig) -> dict[str, Tensor]:
    """Tensors of a PEFT adapter folder, whose settings must be those the model config states."""
    settings = read_json(folder / "adapter_config.json")
    stated = {"r": config.lora_rank, "lora_alpha": config.lora_alpha}
    differing = {
        name: (settings.get(name), value) for name, value in stated.items() if settings.get(name) != value
    }
    if differing:
        raise CheckpointError(f"{folder}/adapter_config.json and config.json disagree: {differing}")
    extras = (
        "use_dora",
        "use_rslora",
        "lora_bias",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "use_qalora",
    )
    used = [name for name in extras if settings.get(name)]
    if used or settings.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(
            f"{folder}: only plain LoRA can be loaded, this adapter uses {used or settings['peft_type']}"
        )
    return read_safetensors(folder / "adapter_model.safetensors")


def parse_config(values: Any, where: Path) -> RewardModelConfig:
    try:
        return RewardModelConfig.from_dict(values)
    except InvalidInputError as error:
        raise CheckpointError(f"{where}: {error}") from error
