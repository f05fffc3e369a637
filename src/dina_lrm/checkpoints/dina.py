"""Checkpoints on disk: our layout, and the choice between it and the published one (`published.py`).

    config.json                 model config, backbone fingerprint, versions, training step, file digests
    reward_head.safetensors     the head, and the logistic's eta3 and eta4 where there is one
    backbone_adapter/           PEFT adapter, when LoRA was trained
    backbone.safetensors        the kept blocks, when all of them were trained
    README.md                   model card

No pickle. Everything that is read is checked, names, shapes, digests and values, before a model sees it.
"""

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dina_lrm.checkpoints import published
from dina_lrm.checkpoints.contents import Checkpoint, parse_config, read_adapter, write_adapter
from dina_lrm.errors import CheckpointError, InvalidInputError
from dina_lrm.files import atomic_folder, file_digest, readable_json
from dina_lrm.pipelines.hub import download, is_hub_id
from dina_lrm.pipelines.source import BUNDLED, DENOISERS, bundled_folder, local_folder, read_json
from dina_lrm.pipelines.weights import listed, read_metadata, read_safetensors

FORMAT = "dina-lrm"
FORMAT_VERSION = 1
HEAD_FILE = "reward_head.safetensors"
BACKBONE_FILE = "backbone.safetensors"
ADAPTER_FOLDER = "backbone_adapter"
OWNED = ("config.json", "README.md", HEAD_FILE, BACKBONE_FILE, ADAPTER_FOLDER, *published.OWNED)
EDITABLE = ("backbone_id", "noise_levels", "calibrations", "max_text_tokens", "likelihood")
"""Settings of config.json that may be changed by hand: they say how to use the weights, not what they are."""
LAYOUTS = ("dina", "published")
A_REWARD = (
    f"A reward is a folder with config.json and {HEAD_FILE}, as `dina-lrm train` leaves it, "
    f"a hub id, or bundled"
)


def read_checkpoint(location: str | Path, revision: str | None = None) -> Checkpoint:
    """Read either layout from a folder, a hub id, or "bundled".

    Raises:
        CheckpointError: there is none, or a damaged one.
    """
    if str(location) == BUNDLED:
        folder = bundled_folder("reward")
    else:
        try:
            folder = local_folder(location) or download(str(location), ["*"], None, revision)
        except ValueError as error:
            raise CheckpointError(f"no reward checkpoint there: {error}") from error
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder.resolve()} is no reward: {_what_else(folder)}. {A_REWARD}")
    config = read_json(folder / "config.json")
    if config.get("format") == FORMAT:
        return replace(_read(folder, config), card=_added(folder / "README.md"))
    if "model" in config and "training" in config:
        return Checkpoint(**published.read(folder, config), card=_added(folder / "README.md"))
    raise CheckpointError(
        f'{folder.resolve()} is no reward: its config.json is neither ours ("format": "{FORMAT}") nor of the '
        f"published layout (sections model and training); its entries are {listed(config)}. {A_REWARD}"
    )


def _what_else(folder: Path) -> str:
    """What a folder without config.json is, as far as the files show that people mistake for a reward's."""
    last, parent = folder / "last", folder.resolve().parent
    if (last / "config.json").is_file():
        return (
            f"it is a training run that has not finished; resume it with the command that started it, or "
            f"take its last checkpoint, {last.resolve()}"
        )
    if (folder / "train_config.json").is_file():
        return "it is a training run that has not saved a checkpoint yet"
    if (folder / "manifest.json").is_file() and (folder / "pairs").is_dir():
        return "it holds latents that `dina-lrm prepare` made, to train and evaluate with"
    if any((folder / name).exists() for name in ("model_index.json", *DENOISERS)):
        return "it is a diffusers pipeline, whose place is pipeline=..., beside a reward"
    if (folder / "adapter_config.json").is_file():
        whole = f"; the reward it belongs to is {parent}" if (parent / "config.json").is_file() else ""
        return f"it is a LoRA adapter without a reward head{whole}"
    found = sorted(path.name for path in folder.iterdir())
    return f"there is no config.json among {listed(found)}" if found else "it is empty"


def write_checkpoint(folder: Path, checkpoint: Checkpoint, layout: str) -> None:
    """Write atomically; an existing checkpoint is replaced only once the new one is complete on disk."""
    if layout not in LAYOUTS:
        raise InvalidInputError(f'layout = {layout!r}: it must be "dina" or "published"')
    with atomic_folder(folder, OWNED) as aside:
        fill_checkpoint(aside, checkpoint, layout)


def fill_checkpoint(folder: Path, checkpoint: Checkpoint, layout: str = "dina") -> None:
    """Write into a new folder that is there."""
    if layout == "dina":
        _write(folder, checkpoint)
    else:
        published.write(folder, checkpoint)
    (folder / "README.md").write_text(model_card(checkpoint), encoding="utf-8")


_LAST_LINES = 'model.score("a prompt", "picture.png").scores\n```\n'
"""Where what `model_card` says by itself ends."""


def model_card(checkpoint: Checkpoint) -> str:
    """README.md of a checkpoint: what it is, what it needs, and whatever the trainer measured."""
    config = checkpoint.config
    step = "" if checkpoint.training_step is None else f", training step {checkpoint.training_step}"
    taps = f"image taps {list(config.image_taps)}, text taps {list(config.text_taps)}"
    tuning = f"LoRA rank {config.lora_rank}" if config.tuning == "lora" else f"{config.tuning} backbone"
    return "\n".join(
        [
            "---",
            "library_name: dina-lrm",
            "tags: [reward-model, diffusion, preference]",
            *([f"base_model: {config.backbone_id}"] if is_hub_id(config.backbone_id) else []),
            "---",
            "# DiNa-LRM reward model",
            "",
            "Scores human preference on noisy diffusion latents (arXiv:2602.11146).",
            "",
            f"- backbone `{config.backbone_id}`, first {config.num_blocks} blocks, {taps}, {tuning}{step}",
            f"- trained: {'yes' if checkpoint.trained else '**no, random weights**'}",
            f"- default noise levels {list(config.noise_levels)}, likelihood {config.likelihood.kind}",
            "",
            "```python",
            "import dina_lrm",
            "",
            f'model = dina_lrm.RewardModel.from_pretrained("this/folder", pipeline="{config.backbone_id}")',
            _LAST_LINES,
            *([checkpoint.card.strip(), ""] if checkpoint.card else []),
        ]
    )


def _added(file: Path) -> str | None:
    """What a card of ours says beyond that; None where there is no such card, or nothing was added."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").partition(_LAST_LINES)[2].strip() or None
    except FileNotFoundError:
        return None


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    from safetensors.torch import save_file

    head = dict(checkpoint.head) | {
        f"logistic.{name}": value for name, value in (checkpoint.logistic or {}).items()
    }
    metadata = {"model": json.dumps(checkpoint.config.to_dict())}
    save_file({name: tensor.contiguous() for name, tensor in head.items()}, folder / HEAD_FILE, metadata)
    if checkpoint.adapter is not None:
        write_adapter(folder / ADAPTER_FOLDER, checkpoint.config, checkpoint.adapter)
    if checkpoint.backbone is not None:
        save_file(
            {name: tensor.contiguous() for name, tensor in checkpoint.backbone.items()},
            folder / BACKBONE_FILE,
        )
    digests = {
        str(file.relative_to(folder)): file_digest(file) for file in sorted(folder.rglob("*.safetensors"))
    }
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": checkpoint.config.to_dict(),
        "trained": checkpoint.trained,
        "training_step": checkpoint.training_step,
        "backbone": None if checkpoint.fingerprint is None else dict(checkpoint.fingerprint),
        "versions": library_versions(),
        "files": digests,
    }
    (folder / "config.json").write_text(readable_json(record))


def _read(folder: Path, record: Mapping[str, Any]) -> Checkpoint:
    where = folder / "config.json"
    if record.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format_version {record.get('format_version')!r}; "
            f"this version of dina-lrm reads {FORMAT_VERSION}"
        )
    expected = {"model", "trained", "files"}
    if (
        not expected <= set(record)
        or not isinstance(record["files"], Mapping)
        or not isinstance(record["trained"], bool)
    ):
        raise CheckpointError(
            f"{where} is damaged: entries {sorted(expected)} must be present and well formed"
        )
    config = parse_config(record["model"], where)
    needed = [HEAD_FILE]
    needed += [f"{ADAPTER_FOLDER}/adapter_model.safetensors"] if config.tuning == "lora" else []
    needed += [BACKBONE_FILE] if config.tuning == "full" else []
    for name in needed:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}, which tuning = {config.tuning!r} needs")
        if name not in record["files"]:
            raise CheckpointError(f"{where} records no digest for {name}")
    head = read_safetensors(
        folder / HEAD_FILE
    )  # a file that does not parse is reported as such, before any digest
    adapter = read_adapter(folder / ADAPTER_FOLDER, config) if config.tuning == "lora" else None
    backbone = read_safetensors(folder / BACKBONE_FILE) if config.tuning == "full" else None
    for name in needed:
        if file_digest(folder / name) != record["files"][name]:
            raise CheckpointError(
                f"{folder / name} is not the file that was saved: its digest differs from config.json"
            )
    stored = json.loads(read_metadata(folder / HEAD_FILE).get("model", "{}"))
    differing = [
        name for name in record["model"] if name not in EDITABLE and record["model"][name] != stored.get(name)
    ]
    if differing:
        raise CheckpointError(
            f"{where} was changed after saving: {differing} differ from the record in {HEAD_FILE}"
        )
    logistic = {
        name: head.pop(f"logistic.{name}")
        for name in ("eta3", "eta4")
        if config.logistic and f"logistic.{name}" in head
    }
    if config.logistic and len(logistic) != 2:
        raise CheckpointError(f"{folder / HEAD_FILE} lacks logistic.eta3 or logistic.eta4")
    return Checkpoint(
        config=config,
        head=head,
        logistic=logistic or None,
        adapter=adapter,
        backbone=backbone,
        trained=record["trained"],
        training_step=record.get("training_step"),
        fingerprint=record.get("backbone"),
        origin=str(folder),
        versions=record.get("versions") or {},
    )


def library_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    versions = {}
    for name in ("dina-lrm", "torch", "diffusers", "transformers", "peft", "safetensors"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions
