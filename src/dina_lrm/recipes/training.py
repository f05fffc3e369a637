"""A training run is a function: the published recipe, the bundled one, and the ablations of each.

Every function returns a complete `TrainConfig`; a variant is `dataclasses.replace` of its base, so the
difference between two runs can be read here. `recipe("sd35m-12-layers")` finds one by its command-line name.
"""

from dataclasses import replace
from typing import Literal, assert_never, get_args

from dina_lrm.errors import InvalidInputError
from dina_lrm.runs.config import OptimizerConfig
from dina_lrm.training.config import (
    DataConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    NoiseConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = ["RecipeName", "recipe", "recipe_names"]

RecipeName = Literal[
    "shapes",
    "shapes-frozen",
    "shapes-constant-variance",
    "shapes-clean",
    "shapes-bradley-terry",
    "shapes-quick",
    "bundled",
    "sd35m-12-layers",
    "sd35m-12-layers-frozen",
    "sd35m-12-layers-constant-variance",
    "sd35m-12-layers-clean",
    "sd35m-12-layers-logit-normal",
    "sd35l-19-layers",
    "flux-19-layers",
    "zimage-16-layers",
    "qwenimage-20-layers",
    "sdxl-down-mid",
    "sd15-down-mid",
    "wan-15-layers",
]


# --- the bundled pipeline: minutes on two CPU cores --------------------------------------------------------


def shapes() -> TrainConfig:
    """The bundled reward: LoRA on five of the bundled transformer's six blocks.

    Where it departs from the paper: a small model trained for a short time wants a rate far above 5e-5 and
    a decay; a fifth of the steps concatenate noise levels, without which a head that has only ever seen one
    level gains nothing from an ensemble. The last weights are kept: after the decay they are the best, and
    the best of several validations on 400 pairs is chosen by chance.
    """
    return TrainConfig(
        model=ModelConfig(pipeline="bundled", num_blocks=5, image_taps=(1, 3, 5), text_taps=(3, 5)),
        data=DataConfig(train="shapes"),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, schedule="cosine", warmup_steps=50, weight_decay=0.01, ema_decay=0.995
        ),
        validation=ValidationConfig(every=500, max_pairs=400, ensembles=((0.2, 0.5, 0.7), (0.1, 0.2, 0.3))),
        output="runs/shapes",
        num_steps=5000,
        batch_size=96,
        group_by_prompt=True,
        ensemble_fraction=0.2,
        checkpoint_every=200,
        keep="last",
    )


def shapes_frozen() -> TrainConfig:
    """Only the head is trained: what the generator's own features hold without adaptation."""
    base = shapes()
    return replace(base, model=replace(base.model, tuning="frozen"), output="runs/shapes-frozen")


def shapes_constant_variance() -> TrainConfig:
    """Ablation: one variance at every noise level."""
    base = shapes()
    loss = replace(base.loss, likelihood="thurstone_constant")
    return replace(base, loss=loss, output="runs/shapes-constant-variance")


def shapes_clean() -> TrainConfig:
    """Ablation: sigma = 0 always, constant variance; validation at clean latents only."""
    base = shapes_constant_variance()
    return replace(
        base,
        noise=NoiseConfig(distribution="constant", level=0.0),
        validation=replace(base.validation, noise_levels=(0.0,), ensembles=()),
        ensemble_fraction=0.0,
        output="runs/shapes-clean",
    )


def shapes_bradley_terry() -> TrainConfig:
    """Baseline: logistic likelihood, no variance, trained by log-likelihood."""
    base = shapes()
    loss = LossConfig(likelihood="bradley_terry", loss="log_likelihood")
    return replace(base, loss=loss, output="runs/shapes-bradley-terry")


def shapes_quick() -> TrainConfig:
    """A minute of training on a few hundred prompts: the curve of the demo."""
    base = shapes()
    return replace(
        base,
        data=replace(base.data, train_prompts=600, validation_prompts=100),
        validation=replace(
            base.validation, every=50, noise_levels=(0.2, 0.4, 0.7), ensembles=(), max_pairs=200
        ),
        output="runs/shapes-quick",
        num_steps=400,
        time_budget_seconds=60.0,
        ensemble_fraction=0.0,
        checkpoint_every=400,
    )


def bundled() -> TrainConfig:
    """Your own pairs over the bundled pipeline: LoRA, a few minutes on two CPU cores.

    Small batches, since there may be few pairs, and a rate under that of `shapes`, which has many. The best
    validation is kept: a few hundred pairs are soon learned by heart.
    """
    base = shapes()
    return replace(
        base,
        data=DataConfig(train=None),
        optimizer=replace(base.optimizer, learning_rate=5e-4, warmup_steps=20, ema_decay=0.98),
        validation=replace(base.validation, every=50, noise_levels=(0.1, 0.2, 0.4, 0.7), max_pairs=500),
        output="runs/bundled",
        num_steps=300,
        batch_size=16,
        group_by_prompt=False,
        checkpoint_every=50,
        keep="best",
    )


# --- Stable Diffusion 3.5 Medium ---------------------------------------------------------------------------


def sd35m_12_layers() -> TrainConfig:
    """The published model: half of SD3.5-Medium, LoRA r = 64, one epoch of HPDv3 (about 0.8M pairs).

    From the paper and the published config: 12 of 24 blocks, taps 4, 8, 12 on both streams, rank 64 and alpha
    128, 4 queries and 8 heads at the backbone's width, AdamW at 5e-5, EMA 0.995, sigma uniform, v(sigma) = 2
    sigma^2 + 0.05, fidelity loss, scoring at 0.4 or at 0.2, 0.5, 0.7 together, 4 pairs on each of 8 GPUs,
    hence 25,000 steps of 32 pairs for the epoch, gradients clipped at 1. Its 1,000 steps of warm-up are
    without effect there, since its schedule is constant; here warm-up multiplies every schedule, so there is
    none. Not published, chosen here: which pairs validate, and how often."""
    return TrainConfig(
        model=ModelConfig(
            pipeline="stabilityai/stable-diffusion-3.5-medium",
            num_blocks=12,
            image_taps=(4, 8, 12),
            text_taps=(4, 8, 12),
            tuning="lora",
            lora_rank=64,
            lora_alpha=128.0,
        ),
        data=DataConfig(train=None),
        optimizer=OptimizerConfig(learning_rate=5e-5, schedule="constant", warmup_steps=0, ema_decay=0.995),
        validation=ValidationConfig(every=500, noise_levels=(0.3, 0.4, 0.5), max_pairs=1000, batch_size=8),
        output="runs/sd35m-12-layers",
        num_steps=25_000,
        batch_size=32,
        precision="bfloat16",
    )


def sd35m_12_layers_frozen() -> TrainConfig:
    """The paper's frozen-backbone ablation."""
    base = sd35m_12_layers()
    return replace(base, model=replace(base.model, tuning="frozen"), output="runs/sd35m-12-layers-frozen")


def sd35m_12_layers_constant_variance() -> TrainConfig:
    """The paper's fixed-variance ablation."""
    base = sd35m_12_layers()
    loss = replace(base.loss, likelihood="thurstone_constant")
    return replace(base, loss=loss, output="runs/sd35m-12-layers-constant-variance")


def sd35m_12_layers_clean() -> TrainConfig:
    """The paper's sigma = 0 ablation, with fixed variance."""
    base = sd35m_12_layers_constant_variance()
    return replace(
        base,
        noise=NoiseConfig(distribution="constant", level=0.0),
        validation=replace(base.validation, noise_levels=(0.0,), ensembles=()),
        output="runs/sd35m-12-layers-clean",
    )


def sd35m_12_layers_logit_normal() -> TrainConfig:
    """sigma from the distribution that the generator was trained with, instead of uniform."""
    base = sd35m_12_layers()
    return replace(
        base,
        noise=replace(base.noise, distribution="logit_normal"),
        output="runs/sd35m-12-layers-logit-normal",
    )


# --- other generators --------------------------------------------------------------------------------------
#
# Data, optimiser, noise and validation are those of sd35m-12-layers; blocks are computed again in the
# backward pass, to save memory. None of these has been trained yet.


def _other_generator(name: str, model: ModelConfig) -> TrainConfig:
    return replace(sd35m_12_layers(), model=model, output=f"runs/{name}", gradient_checkpointing=True)


def sd35l_19_layers() -> TrainConfig:
    """Half of Stable Diffusion 3.5 Large, taps at its thirds. Chosen here by analogy with Medium."""
    model = replace(
        sd35m_12_layers().model,
        pipeline="stabilityai/stable-diffusion-3.5-large",
        num_blocks=19,
        image_taps=(6, 13, 19),
        text_taps=(6, 13, 19),
    )
    return _other_generator("sd35l-19-layers", model)


def flux_19_layers() -> TrainConfig:
    """FLUX.1 [dev]. Published: its 19 double blocks, taps 8, 12, 16, 19. Chosen here: LoRA as for SD3.5-M."""
    model = replace(
        sd35m_12_layers().model,
        pipeline="black-forest-labs/FLUX.1-dev",
        num_blocks=19,
        image_taps=(8, 12, 16, 19),
        text_taps=(8, 12, 16, 19),
        guidance=3.5,
    )
    return _other_generator("flux-19-layers", model)


def zimage_16_layers() -> TrainConfig:
    """Z-Image. Published: 16 layers, taps 4, 8, 12, 16, LoRA r = 32, head width 1536. Chosen here: alpha."""
    model = ModelConfig(
        pipeline="Tongyi-MAI/Z-Image-Turbo",
        num_blocks=16,
        image_taps=(4, 8, 12, 16),
        text_taps=(4, 8, 12, 16),
        lora_rank=32,
        lora_alpha=64.0,
        head=HeadConfig(width=1536),
    )
    return _other_generator("zimage-16-layers", model)


def qwenimage_20_layers() -> TrainConfig:
    """Qwen-Image, a third of its 60 blocks. Chosen here, after Z-Image."""
    model = replace(
        zimage_16_layers().model,
        pipeline="Qwen/Qwen-Image",
        num_blocks=20,
        image_taps=(5, 10, 15, 20),
        text_taps=(5, 10, 15, 20),
    )
    return _other_generator("qwenimage-20-layers", model)


def sdxl_down_mid() -> TrainConfig:
    """SDXL without its decoder: three down blocks and the mid block. Chosen here."""
    model = replace(
        sd35m_12_layers().model,
        pipeline="stabilityai/stable-diffusion-xl-base-1.0",
        num_blocks=4,
        image_taps=(2, 3, 4),
        text_taps=(0,),
    )
    return _other_generator("sdxl-down-mid", model)


def sd15_down_mid() -> TrainConfig:
    """Stable Diffusion 1.5 without its decoder: four down blocks and the mid block. Chosen here."""
    model = replace(
        sdxl_down_mid().model,
        pipeline="stable-diffusion-v1-5/stable-diffusion-v1-5",
        num_blocks=5,
        image_taps=(3, 4, 5),
    )
    return _other_generator("sd15-down-mid", model)


def wan_15_layers() -> TrainConfig:
    """Half of Wan 2.1 1.3B, on pictures as videos of one frame or on videos. Chosen here."""
    model = replace(
        sd35m_12_layers().model,
        pipeline="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        num_blocks=15,
        image_taps=(5, 10, 15),
        text_taps=(0,),
    )
    return _other_generator("wan-15-layers", model)


# --- look-up -----------------------------------------------------------------------------------------------


def recipe_names() -> tuple[str, ...]:
    """All recipes, by the names of the command line."""
    return get_args(RecipeName)


def recipe(name: str) -> TrainConfig:
    """The recipe of that name; an unknown one is an error that lists the known.

    >>> recipe("sd35m-12-layers").model.lora_rank
    64
    """
    if name not in get_args(RecipeName):
        raise InvalidInputError(f"unknown recipe {name!r}; known: {', '.join(recipe_names())}")
    known: RecipeName = name  # pyright: ignore[reportAssignmentType]  # checked in the line above
    match known:
        case "shapes":
            return shapes()
        case "shapes-frozen":
            return shapes_frozen()
        case "shapes-constant-variance":
            return shapes_constant_variance()
        case "shapes-clean":
            return shapes_clean()
        case "shapes-bradley-terry":
            return shapes_bradley_terry()
        case "shapes-quick":
            return shapes_quick()
        case "bundled":
            return bundled()
        case "sd35m-12-layers":
            return sd35m_12_layers()
        case "sd35m-12-layers-frozen":
            return sd35m_12_layers_frozen()
        case "sd35m-12-layers-constant-variance":
            return sd35m_12_layers_constant_variance()
        case "sd35m-12-layers-clean":
            return sd35m_12_layers_clean()
        case "sd35m-12-layers-logit-normal":
            return sd35m_12_layers_logit_normal()
        case "sd35l-19-layers":
            return sd35l_19_layers()
        case "flux-19-layers":
            return flux_19_layers()
        case "zimage-16-layers":
            return zimage_16_layers()
        case "qwenimage-20-layers":
            return qwenimage_20_layers()
        case "sdxl-down-mid":
            return sdxl_down_mid()
        case "sd15-down-mid":
            return sd15_down_mid()
        case "wan-15-layers":
            return wan_15_layers()
        case _:
            assert_never(known)
