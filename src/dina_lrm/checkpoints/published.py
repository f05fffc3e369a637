"""The layout of the published checkpoint (`liuhuohuo/DiNa-LRM-SD35M-12layers`), read and written.

    config.json                        sections model and training, among others
    checkpoint/backbone_lora/          PEFT adapter        if LoRA was trained
    checkpoint/rm_head.pt              state dict          if the backbone was LoRA-tuned or frozen
    checkpoint/full_model.pt           state dict          if every kept weight was trained

Weights may also lie beside config.json. Pickles are read with `weights_only=True`: plain tensors or nothing.

That layout forgets the logistic's eta3 and eta4 unless the whole model is saved. They are added here in a
file of their own, `checkpoint/logistic.safetensors`, which other readers do not look at. What else it cannot
say (calibration, default noise levels, ...) goes into a section `dina_lrm` of config.json.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dina_lrm.checkpoints.config import HeadConfig, LikelihoodConfig, RewardModelConfig
from dina_lrm.errors import CheckpointError, InvalidInputError
from dina_lrm.files import readable_json
from dina_lrm.pipelines.weights import listed, read_safetensors

if TYPE_CHECKING:
    from dina_lrm.checkpoints.contents import Checkpoint

OWNED = ("checkpoint", "rm_head.pt", "full_model.pt", "backbone_lora", "logistic.safetensors")
LIKELIHOODS = {
    "thurstone": "thurstone",
    "thurstone-constant": "thurstone_constant",
    "bt": "bradley_terry",
    "bt-margin": "bradley_terry_margin",
}
ARCHITECTURE = (
    "num_blocks",
    "image_taps",
    "text_taps",
    "tuning",
    "lora_rank",
    "lora_alpha",
    "adapts_last_text",
    "head",
    "logistic",
    "add_noise",
)
"""What both the model section and our own section state, and must agree on."""


def read(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `Checkpoint`."""
    from dina_lrm.checkpoints.contents import read_adapter

    where = folder / "config.json"
    weights = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder
    config = read_config(record, where, has_adapter=(weights / "backbone_lora").is_dir())
    fields: dict[str, Any] = {"config": config, "origin": str(weights)}
    own = record.get("dina_lrm")
    if isinstance(own, Mapping):
        fields |= {name: own[name] for name in ("trained", "training_step", "fingerprint") if name in own}
    if config.tuning == "full":
        state = load_state_dict(weights / "full_model.pt")
        parts = split(state, weights / "full_model.pt", config.logistic)
        return fields | {
            "backbone": parts["backbone."],
            "head": parts["reward_head."],
            "logistic": parts[""] or None,
        }
    fields["head"] = load_state_dict(weights / "rm_head.pt")
    if config.tuning == "lora":
        fields["adapter"] = read_adapter(weights / "backbone_lora", config)
    if config.logistic and (weights / "logistic.safetensors").is_file():
        fields["logistic"] = read_safetensors(weights / "logistic.safetensors")
    return fields


def read_config(record: Mapping[str, Any], where: Path, *, has_adapter: bool) -> RewardModelConfig:
    """Translate the model section; every entry the numbers depend on is required."""
    try:
        model, training = record["model"], record["training"]
        text_taps = tuple(model["text_head_idx"])
        # use_lora with freeze_backbone trains the head alone, unless an adapter was saved all the same.
        lora = model["use_lora"] and (has_adapter or not model["freeze_backbone"])
        tuning = "lora" if lora else "frozen" if model["freeze_backbone"] else "full"
        head = model["reward_head"]
        if head.get("out_dim", 1) != 1:
            raise InvalidInputError(f"reward_head.out_dim = {head['out_dim']}: only 1 is supported")
        last_text = bool(
            model["use_text_features"] and text_taps and max(text_taps) == model["num_transformer_layers"]
        )
        config = RewardModelConfig(
            backbone_id=model.get("backbone_model_id"),
            num_blocks=model["num_transformer_layers"],
            image_taps=tuple(model["visual_head_idx"]),
            text_taps=text_taps,
            tuning=tuning,
            lora_rank=model["lora_config"]["r"] if lora else 0,
            lora_alpha=float(model["lora_config"]["lora_alpha"]) if lora else 0.0,
            lora_last_text=last_text if lora else None,
            head=HeadConfig(
                width=None if head["width"] == -1 else head["width"],
                num_queries=head["num_queries"],
                num_attention_heads=head["num_attn_heads"],
                project_in=head["use_proj_in"],
                dropout=head["dropout"],
            ),
            logistic=bool(model["use_logistic"]),
            likelihood=LikelihoodConfig(kind=LIKELIHOODS[model["model_type"]]),  # type: ignore[arg-type]
            add_noise=bool(training.get("add_noise", True)),
        )
        own = record.get("dina_lrm")
        if own is None:
            return config
        ours = RewardModelConfig.from_dict(own["model"])
    except KeyError as error:
        raise CheckpointError(f"{where}: entry {error} is missing or not known") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    differing = [name for name in ARCHITECTURE if getattr(ours, name) != getattr(config, name)]
    if differing:
        raise CheckpointError(f"{where}: sections model and dina_lrm disagree about {differing}")
    return ours


def write(folder: Path, checkpoint: "Checkpoint") -> None:
    """Write config.json and checkpoint/ into an empty folder."""
    from safetensors.torch import save_file

    from dina_lrm.checkpoints.contents import write_adapter

    config, weights = checkpoint.config, folder / "checkpoint"
    weights.mkdir()
    (folder / "config.json").write_text(readable_json(published_config(checkpoint)))
    if config.tuning == "full":
        assert checkpoint.backbone is not None
        state = {f"backbone.{name}": value for name, value in checkpoint.backbone.items()}
        state |= {f"reward_head.{name}": value for name, value in checkpoint.head.items()}
        torch.save(state | (checkpoint.logistic or {}), weights / "full_model.pt")
        return
    torch.save(dict(checkpoint.head), weights / "rm_head.pt")
    if checkpoint.adapter is not None:
        write_adapter(weights / "backbone_lora", config, checkpoint.adapter)
    if checkpoint.logistic is not None:
        save_file(checkpoint.logistic, weights / "logistic.safetensors")


def published_config(checkpoint: "Checkpoint") -> dict[str, Any]:
    """The sections that other readers use, and our own beside them."""
    config = checkpoint.config
    reads_last_text = bool(config.text_taps) and config.text_taps[-1] == config.num_blocks
    if config.tuning == "lora" and config.adapts_last_text and not reads_last_text:
        raise InvalidInputError(
            "the published layout cannot express LoRA on the last block's text without a tap there"
        )
    model = {
        "model_type": next(name for name, kind in LIKELIHOODS.items() if kind == config.likelihood.kind),
        "backbone_model_id": config.backbone_id,
        "num_transformer_layers": config.num_blocks,
        "freeze_backbone": config.tuning == "frozen",
        "use_ema": False,
        "ema_decay": 0.995,
        "use_lora": config.tuning == "lora",
        "use_text_features": config.adapts_last_text if config.tuning == "lora" else True,
        "lora_config": {
            "r": config.lora_rank,
            "lora_alpha": int(config.lora_alpha) if config.lora_alpha.is_integer() else config.lora_alpha,
            "init_lora_weights": "gaussian",
        },
        "use_logistic": config.logistic,
        "visual_head_idx": list(config.image_taps),
        "text_head_idx": list(config.text_taps),
        "use_t_embed": True,
        "reward_head": {
            "use_proj_in": config.head.project_in,
            "width": -1 if config.head.width is None else config.head.width,
            "out_dim": 1,
            "num_queries": config.head.num_queries,
            "num_attn_heads": config.head.num_attention_heads,
            "dropout": config.head.dropout,
        },
    }
    return {
        "model": model,
        "training": {"mixed_precision": "no", "use_vae": False, "add_noise": config.add_noise},
        "dina_lrm": {
            "model": config.to_dict(),
            "trained": checkpoint.trained,
            "training_step": checkpoint.training_step,
            "fingerprint": None if checkpoint.fingerprint is None else dict(checkpoint.fingerprint),
        },
    }


def load_state_dict(file: Path) -> dict[str, Tensor]:
    """A .pt file of plain tensors; anything else in it, or damage, is a CheckpointError."""
    if not file.is_file():
        raise CheckpointError(f"missing file {file}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, KeyError, ...
        raise CheckpointError(
            f"{file} is truncated or not a state dict of plain tensors ({error})"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file} does not hold a state dict of plain tensors")
    return dict(state)


def split(state: Mapping[str, Tensor], file: Path, logistic: bool) -> dict[str, dict[str, Tensor]]:
    """full_model.pt by prefix: backbone, head, and the two scalars of the logistic."""
    parts: dict[str, dict[str, Tensor]] = {"backbone.": {}, "reward_head.": {}, "": {}}
    strange = []
    for name, tensor in state.items():
        prefix = next((prefix for prefix in ("backbone.", "reward_head.") if name.startswith(prefix)), "")
        if prefix == "" and not (logistic and name in ("eta3", "eta4")):
            strange.append(name)
        parts[prefix][name.removeprefix(prefix)] = tensor
    if strange:
        raise CheckpointError(f"{file} holds tensors that do not belong to this model: {listed(strange)}")
    if logistic and len(parts[""]) != 2:
        raise CheckpointError(f"{file} lacks eta3 or eta4, which use_logistic needs")
    return parts
