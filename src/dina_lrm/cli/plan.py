"""What the package would do with a generator, from its configs alone: `dina-lrm doctor --pipeline ID`."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from dina_lrm.backbones.architecture import Architecture
from dina_lrm.backbones.families import backbone_of, read_architecture
from dina_lrm.backbones.prompts import tokenizer_of
from dina_lrm.build.training import reward_model
from dina_lrm.core.noise import NoiseSchedule
from dina_lrm.errors import CheckpointError
from dina_lrm.evaluation.cost import FULL_SIZE, limited_text_tokens, score_flops, weight_bytes
from dina_lrm.models.encoders import pixels_per_latent
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.pipelines.source import BUNDLED, PipelineSource
from dina_lrm.recipes.training import recipe, recipe_names

RESOLUTIONS = (512, 1024)
ENSEMBLES = (1, 3)
DEFAULT_RANK = 32
WITHOUT_WEIGHTS = ("sample_size", "axes_lens")
"""Entries of a config that no weight depends on: they do not make another architecture."""


@dataclass(frozen=True, kw_only=True)
class Components:
    """Which parts a pipeline has, and what can be scored with them."""

    present: tuple[str, ...]
    missing: tuple[str, ...]
    latents: bool
    pictures: bool
    prompts: bool


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs of one score of a square picture."""

    pixels: int
    num_levels: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A reward over a generator, before anything of it is loaded."""

    pipeline: str
    family: str
    network: str
    total_blocks: int
    latent_channels: int
    pixels_per_latent: int
    max_pixels: int | None
    """Longest side of a picture; None: no limit."""
    components: Components
    recipe: str | None
    """None: the defaults of `RewardModel.initialize`."""
    recipe_pipeline: str | None
    """The generator that the recipe was written for."""
    num_blocks: int
    image_taps: tuple[int, ...]
    text_taps: tuple[int, ...]
    tuning: str
    lora_rank: int
    guidance: float | None
    head_width: int
    network_parameters: int
    """Parameters of the whole transformer or UNet, of which `backbone_parameters` are kept."""
    backbone_parameters: int
    head_parameters: int
    lora_parameters: int
    weight_bytes: int
    text_tokens: int
    costs: tuple[Cost, ...]

    def lines(self) -> Iterator[tuple[str, str, bool | None]]:
        """(what, about it, good or bad) for people."""
        yield (
            "network",
            f"{self.network} of {self.total_blocks} blocks, read by the {self.family} backbone; "
            f"{self.latent_channels} latent channels, {self.pixels_per_latent} pixels per latent",
            True,
        )
        have = self.components
        present = [part for part in have.present if not part.startswith("tokenizer")]
        missing = f"; missing: {', '.join(have.missing)}" if have.missing else ""
        yield "components", ", ".join(present) + missing, None
        inputs = {"latents": have.latents, "pictures": have.pictures, "prompts": have.prompts}
        can = ", ".join(name for name, works in inputs.items() if works) or "nothing"
        cannot = " or ".join(name for name, works in inputs.items() if not works)
        yield "can take", can + (f", not {cannot}" if cannot else ""), have.latents
        if self.recipe is None:
            fitting = f"none fits: defaults with LoRA rank {self.lora_rank}"
        elif self.recipe_pipeline == self.pipeline:
            fitting = self.recipe
        else:
            fitting = f"{self.recipe}, written for {self.recipe_pipeline}, which has the same architecture"
        yield "recipe", fitting, None
        yield (
            "reward",
            f"first {self.num_blocks} of {self.total_blocks} blocks; image taps {_listed(self.image_taps)}; "
            f"text taps {_listed(self.text_taps)}; "
            + (f"LoRA rank {self.lora_rank}" if self.tuning == "lora" else f"{self.tuning} backbone")
            + f"; head width {self.head_width}"
            + ("" if self.guidance is None else f"; guidance {self.guidance:g}"),
            None,
        )
        yield (
            "parameters",
            f"{_count(self.backbone_parameters)} of {_count(self.network_parameters)} kept, "
            f"head {_count(self.head_parameters)}, LoRA {_count(self.lora_parameters)}",
            None,
        )
        yield "weights", f"{_size(self.weight_bytes)} in bfloat16, head and LoRA in float32", None
        for pixels in dict.fromkeys(cost.pixels for cost in self.costs):
            stated = ", ".join(
                f"{_flops(cost.flops)} with {cost.num_levels} noise level{'s' if cost.num_levels > 1 else ''}"
                for cost in self.costs
                if cost.pixels == pixels
            )
            largest = ", the largest picture" if pixels == self.max_pixels else ""
            yield f"score at {pixels} px", f"{stated}; {self.text_tokens} text tokens{largest}", None

    def to_dict(self) -> dict[str, object]:
        """For --json."""
        return asdict(self)


def make_plan(pipeline: str) -> Plan:
    """Whatever is wrong with the pipeline is raised."""
    source = PipelineSource(pipeline)
    architecture = read_architecture(source.network_config())
    components = _components(source, architecture)
    if "scheduler" in components.present:
        NoiseSchedule.from_config(
            source.config("scheduler", "scheduler_config.json")
        )  # an unknown one is refused
    name = recipe_for(pipeline, architecture)
    if name is None:
        model = RewardModel.initialize(
            architecture, lora_rank=DEFAULT_RANK, device="meta", dtype=torch.bfloat16
        )
    else:
        model = reward_model(recipe(name).model, pipeline=architecture, device="meta", dtype=torch.bfloat16)
    backbone, config, counts = model.backbone, model.config, model.num_parameters()
    if "vae" in components.present:
        backbone.pixels_per_latent = pixels_per_latent(source.config("vae", "config.json"))
    with torch.device("meta"):
        whole = architecture.build()
    limit = architecture.max_latent_side
    largest = None if limit is None else limit * backbone.pixels_per_latent
    sizes = RESOLUTIONS
    if largest is not None:
        sizes = tuple(pixels for pixels in RESOLUTIONS if pixels <= largest) or (largest,)
    tokens = limited_text_tokens(backbone.family, _token_limits(source))
    return Plan(
        pipeline=pipeline,
        family=backbone.family,
        network=architecture.diffusers_class,
        total_blocks=len(architecture.block_names),
        latent_channels=architecture.latent_channels,
        pixels_per_latent=backbone.pixels_per_latent,
        max_pixels=largest,
        components=components,
        recipe=name,
        recipe_pipeline=None if name is None else recipe(name).model.pipeline,
        num_blocks=config.num_blocks,
        image_taps=config.image_taps,
        text_taps=config.text_taps,
        tuning=config.tuning,
        lora_rank=config.lora_rank,
        guidance=config.guidance,
        head_width=model.head.width,
        network_parameters=sum(parameter.numel() for parameter in whole.parameters()),
        backbone_parameters=counts["backbone"],
        head_parameters=counts["head"],
        lora_parameters=counts["lora"],
        weight_bytes=weight_bytes(model),
        text_tokens=tokens,
        costs=tuple(
            Cost(
                pixels=pixels,
                num_levels=levels,
                flops=score_flops(model, pixels, pixels, num_levels=levels, text_tokens=tokens).total,
            )
            for pixels in sizes
            for levels in ENSEMBLES
        ),
    )


def recipe_for(pipeline: str, architecture: Architecture) -> str | None:
    """The first recipe written for this generator, or for one of the same architecture."""
    generators = {name: recipe(name).model.pipeline for name in recipe_names()}
    for name, generator in generators.items():
        if generator == pipeline:
            return name
    for name, generator in generators.items():
        if _same(architecture, _shapes_of(generator)):
            return name
    return None


def _components(source: PipelineSource, architecture: Architecture) -> Components:
    encoder = backbone_of(architecture).prompt_encoder(
        source, architecture, max_text_tokens=None, dtype=torch.float32
    )
    optional = [name for name in encoder.optional_encoders if source.has(name) or source.declares(name)]
    text = [part for name in (*encoder.encoders, *optional) for part in (name, tokenizer_of(name))]
    wanted = [source.denoiser, "scheduler", "vae", *text]
    missing = [part for part in wanted if not source.has(part)]
    latents = "scheduler" not in missing
    return Components(
        present=tuple(part for part in wanted if part not in missing),
        missing=tuple(missing),
        latents=latents,
        pictures=latents and "vae" not in missing,
        prompts=latents and not set(text) & set(missing),
    )


def _shapes_of(generator: str) -> Architecture:
    if generator == BUNDLED:
        return read_architecture(PipelineSource(BUNDLED).network_config())
    return FULL_SIZE[generator]


def _same(one: Architecture, other: Architecture) -> bool:
    a, b = one.to_dict(), other.to_dict()
    return type(one) is type(other) and all(a[name] == b[name] for name in a if name not in WITHOUT_WEIGHTS)


def _token_limits(source: PipelineSource) -> dict[str, int]:
    """Longest inputs of a pipeline's tokenizers, where they state them."""
    limits = {}
    for tokenizer in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if source.has(tokenizer):
            try:
                stated = source.config(tokenizer, "tokenizer_config.json").get("model_max_length")
            except CheckpointError:  # an older layout without that file
                continue
            if stated is not None:
                limits[tokenizer] = int(stated)
    return limits


def _listed(taps: Sequence[int]) -> str:
    return ", ".join(map(str, taps)) or "none"


def _flops(number: int) -> str:
    return f"{number / 1e12:#.3g} TFLOP" if number >= 1e12 else f"{number / 1e9:#.3g} GFLOP"


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _count(number: int) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.2f}B"
    return f"{number / 1e6:.1f}M" if number >= 1e5 else f"{number / 1e3:.1f}K"
