"""The bundled generator: an ordinary `StableDiffusion3Pipeline`, and a batched way to sample it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor

from dina_lrm.core.precision import faster_precision, matrix_precision
from dina_lrm.shapes.networks import MAX_TOKENS

NUM_INFERENCE_STEPS = 28
GUIDANCE_SCALE = 4.0
"""The bundled pipeline's recommended sampler settings; the number of steps is the pipeline class's own
default."""


def bundled_pipeline_folder() -> Path:
    """Where the package holds the bundled pipeline."""
    return Path(str(files("dina_lrm.shapes"))) / "weights" / "pipeline"


def load_pipeline(
    folder: str | Path | None = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> StableDiffusion3Pipeline:
    """Load the bundled pipeline, or another one of its kind from `folder`, without progress bars."""
    with _quiet_loading():
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            folder or bundled_pipeline_folder(), dtype=dtype, local_files_only=True
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bars and no advice from diffusers and transformers while a small local folder is read."""
    from transformers.utils import logging as transformers_logging

    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bar in zip((diffusers_logging, transformers_logging), levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()


@contextmanager
def _faster_denoiser(pipeline: StableDiffusion3Pipeline) -> Iterator[None]:
    """Matrix products of the denoiser in bfloat16 where that is faster; what goes in and comes out keeps its
    precision.

    Autocasting the whole pipeline would leave the latents in bfloat16 after every step of the scheduler.
    """
    transformer: Any = pipeline.transformer
    forward, device = transformer.forward, transformer.device.type

    def faster(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        with matrix_precision(faster_precision(device), device):
            velocity = forward(*args, **kwargs)[0]
        return (velocity.to(transformer.dtype),)

    transformer.forward = faster
    try:
        yield
    finally:
        del transformer.forward  # the instance's, which hid the class's


def generate(
    pipeline: StableDiffusion3Pipeline,
    captions: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int = NUM_INFERENCE_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    batch_size: int = 32,
) -> list[Image.Image]:
    """One picture per caption; picture i starts from noise that depends on `seeds[i]` alone.

    The denoiser computes in bfloat16 between float32 steps, on CPUs without such instructions in float32: the
    pictures of two machines may differ by rounding.

    Args:
        num_inference_steps: denoising steps, at least 1.
        guidance_scale: classifier-free guidance; at 1 or below the empty prompt is not computed.
        batch_size: pictures per call of the transformer; does not change the pictures beyond rounding.
    """
    if len(captions) != len(seeds):
        raise ValueError(f"one seed for each caption: got {len(captions)} captions and {len(seeds)} seeds")
    images: list[Image.Image] = []
    for start in range(0, len(captions), batch_size):
        rows = slice(start, start + batch_size)
        with _faster_denoiser(pipeline):
            output: Any = pipeline(
                prompt=list(captions[rows]),
                generator=[torch.Generator().manual_seed(int(seed)) for seed in seeds[rows]],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                max_sequence_length=MAX_TOKENS,
            )
        images.extend(output.images)
    return images
