"""What the package would do with a generator, from its configs alone: `dina-lrm doctor --pipeline ID`."""

from collections.abc import Iterator

import torch

from dina_lrm.build import reward_model
from dina_lrm.config import ModelConfig
from dina_lrm.evaluation.cost import TEXT_TOKENS, score_flops, weight_bytes
from dina_lrm.models.architecture import Architecture
from dina_lrm.models.encoders import pixels_per_latent
from dina_lrm.models.families import backbone_of, read_architecture
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.models.source import PipelineSource
from dina_lrm.recipes import recipe, recipe_names

RESOLUTIONS = (512, 1024)
ENSEMBLES = (1, 3)
DEFAULT_RANK = 32


def plan(pipeline: str) -> Iterator[tuple[str, str]]:
    """(what, what about it), line by line; whatever is wrong with the pipeline is raised."""
    source = PipelineSource(pipeline)
    architecture = read_architecture(source.network_config())
    backbone, total = backbone_of(architecture), len(architecture.block_names)
    yield "network", f"{architecture.diffusers_class}, read by the {backbone.family} backbone, {total} blocks"
    prompts = backbone.prompt_encoder(source, architecture, max_text_tokens=None, dtype=torch.float32)
    extra = tuple(name for name in prompts.optional_encoders if source.has(name))
    yield "components", _components(source, prompts.encoders + extra)
    name, config = _recipe(pipeline)
    model = _on_meta(architecture, config)
    if source.has("vae"):
        model.backbone.pixels_per_latent = pixels_per_latent(source.config("vae", "config.json"))
    kept, head = model.config, model.head
    tuning = f"LoRA rank {kept.lora_rank}" if kept.tuning == "lora" else f"{kept.tuning} backbone"
    yield (
        "reward",
        f"{name}: first {kept.num_blocks} of {total} blocks, image taps {list(kept.image_taps)}, "
        f"text taps {list(kept.text_taps)}, {tuning}, head width {head.width}"
        + ("" if kept.guidance is None else f", guidance {kept.guidance:g}"),
    )
    counts = model.num_parameters()
    with torch.device("meta"):
        whole = sum(p.numel() for p in architecture.build().parameters())
    yield (
        "parameters",
        f"backbone {_count(counts['backbone'])} of {_count(whole)}, head {_count(counts['head'])}, "
        f"LoRA {_count(counts['lora'])}",
    )
    yield "weights", f"{_size(weight_bytes(model))} (backbone in bfloat16; head and LoRA in float32)"
    tokens, side = TEXT_TOKENS[backbone.family], model.backbone.pixels_per_latent
    largest = side * (architecture.max_latent_side or max(RESOLUTIONS))
    sizes = [pixels for pixels in RESOLUTIONS if pixels <= largest] or [largest]
    for pixels in sizes:
        costs = [score_flops(model, pixels, pixels, num_levels=levels).total for levels in ENSEMBLES]
        listed = ", ".join(f"{cost / 1e12:#.3g}" for cost in costs)
        yield (
            f"score at {pixels} px" + (", its largest" if pixels == largest else ""),
            f"{listed} TFLOP at K = {', '.join(map(str, ENSEMBLES))} noise levels; latents "
            f"{architecture.latent_channels} x {pixels // side} x {pixels // side}, {tokens} text tokens",
        )


def _recipe(pipeline: str) -> tuple[str, ModelConfig | None]:
    """The first recipe for this generator, if there is one."""
    for name in recipe_names():
        if recipe(name).model.pipeline == pipeline:
            return f"recipe {name}", recipe(name).model
    return "no recipe names this pipeline, so the defaults", None


def _on_meta(architecture: Architecture, config: ModelConfig | None) -> RewardModel:
    shapes = {"device": "meta", "dtype": torch.bfloat16}
    if config is None:
        return RewardModel.initialize(architecture, lora_rank=DEFAULT_RANK, **shapes)
    return reward_model(config, pipeline=architecture, **shapes)


def _components(source: PipelineSource, encoders: tuple[str, ...]) -> str:
    """What is there, and what can be scored with it."""
    wanted = [source.denoiser, "scheduler", "vae", *encoders]
    missing = [name for name in wanted if not source.has(name)]
    if not missing:
        return f"{', '.join(wanted)}: latents, pictures and prompts can be scored"
    present = [name for name in wanted if name not in missing]
    lost = [] if source.has("vae") else ["pictures"]
    lost += ["prompts"] if set(encoders) & set(missing) else []
    return f"{', '.join(present)}; missing {', '.join(missing)}" + (
        f", so {' and '.join(lost)} cannot be scored, latents can" if lost else ""
    )


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"
