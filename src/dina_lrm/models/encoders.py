"""From prompts and pictures to what a backbone reads, over the parts of a diffusers pipeline, and back.

    z0 = (VAE mean (or sample) - shift) * scale

shift and scale are the VAE config's `shift_factor` and `scaling_factor`, or, channel by channel, its
`latents_mean` and one over `latents_std` (Qwen-Image and Wan, and some SDXL models).

Departures from the paper's code: the VAE's mean is the default, so a picture has one latent; a missing part
is an error that names it, at the moment it is needed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dina_lrm.backbones.architecture import Architecture
from dina_lrm.backbones.families import backbone_of, read_architecture
from dina_lrm.backbones.sharing import apart
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.noise import seeded_noise
from dina_lrm.core.precision import without_autocast
from dina_lrm.errors import InvalidInputError, MissingComponentError
from dina_lrm.images import as_picture, fit, fitted_size, image_label, image_list
from dina_lrm.pipelines.libraries import diffusers_class, quiet_loading
from dina_lrm.pipelines.source import PipelineSource

PICTURES_PER_CALL = 8


class Encoders:
    """Text encoders and VAE of a pipeline, each loaded when first used.

    Parts of a live pipeline are used where they are, never moved or cast, and without the pipeline's adapters
    (`backbones/sharing.py`). Parts loaded here follow the
    device asked for; the VAE stays in float32, since it is small and its mean decides everything after it.

    Args:
        architecture: of the backbone that will read the latents: it limits their size.
        max_pixels: pictures with more are shrunk; None: only the backbone's position table limits them.
    """

    def __init__(
        self,
        source: PipelineSource,
        architecture: Architecture,
        *,
        max_text_tokens: int | None = None,
        max_pixels: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.source = source
        self.architecture = architecture
        self.max_pixels = max_pixels
        encoder = backbone_of(architecture).prompt_encoder
        self.text = encoder(source, architecture, max_text_tokens=max_text_tokens, dtype=dtype)
        self._vae: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_vae": None}  # loaded again where it is needed, as the text encoders are

    @property
    def latent_space(self) -> str | None:
        """Class and normalisation of the VAE; None without one."""
        return _latent_space(self.source.config("vae", "config.json")) if self.source.has("vae") else None

    def encode_prompts(
        self,
        prompts: Sequence[str],
        device: torch.device,
        *,
        on_notes: Callable[[list[str]], None] = lambda notes: None,
    ) -> Conditioning:
        """One row per prompt, in the encoders' own precision whatever `torch.autocast` the caller is in.

        Args:
            on_notes: called with what the encoders do not see of prompts that were not encoded before.
        """
        return self.text.encode(prompts, device, on_notes=on_notes)

    def prompt_notes(self, prompts: Sequence[str], device: torch.device) -> list[str]:
        """What the text encoders do not see of prompts (`PromptEncoder.notes`)."""
        return self.text.notes(prompts, device)

    def encode_images(
        self, images: Any, device: torch.device, *, seeds: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Latents (channel, height, width) per picture, shifted and scaled, each of its own size.

        In the VAE's own precision, whatever `torch.autocast` the caller is in.

        Args:
            seeds: None takes the mean of the VAE's posterior; otherwise one sample per picture from its seed.
        """
        vae = self._load_vae(device)
        limits = self._limits()
        pictures = []
        for index, image in enumerate(image_list(images)):
            name = image_label(image, index)
            pictures.append(fit(as_picture(image, name), **limits, name=name))
        self._check_frames(pictures, vae.config)
        latents: dict[int, Tensor] = {}
        for rows in _same_shape(pictures):
            batch = torch.stack([pictures[row] for row in rows]).to(vae.device, vae.dtype)
            wanted = torch.is_grad_enabled() and batch.requires_grad
            with torch.set_grad_enabled(wanted), without_autocast(batch.device.type):
                posterior = vae.encode(self._with_frames(batch * 2 - 1)).latent_dist
                encoded = posterior.mean
                if seeds is not None:
                    draws = seeded_noise(encoded.shape[1:], [seeds[row] for row in rows])[0]
                    encoded = encoded + posterior.std * draws.to(encoded)
                shift, scale = _shift_and_scale(vae.config, encoded)
                scaled = self._without_frames((encoded.float() - shift) * scale)
            latents |= dict(zip(rows, scaled.to(device), strict=True))
        return [latents[row] for row in range(len(pictures))]

    def picture_size(self, height: int, width: int, name: str = "image") -> tuple[int, int]:
        """Height and width at which a picture is encoded; the VAE need not be loaded.

        Raises:
            InvalidInputError: the picture is too small; `name` says which.
        """
        return fitted_size(height, width, **self._limits(), name=name)

    def _limits(self) -> dict[str, Any]:
        factor = pixels_per_latent(self._vae_config())
        side = self.architecture.max_latent_side
        return {
            "multiple": factor * self.architecture.picture_multiple,
            "max_side": None if side is None else factor * side,
            "max_pixels": self.max_pixels,
        }

    def _vae_config(self) -> Any:
        if self._vae is not None:
            return self._vae.config
        self._need_vae()
        return self.source.config("vae", "config.json")

    def _need_vae(self) -> None:
        if not self.source.has("vae"):
            raise MissingComponentError(
                f"pipeline {self.source.name} has no vae, so pictures cannot be encoded: "
                f"give a pipeline that has it, or use score_latents"
            )

    def decode_latents(self, latents: Tensor, device: torch.device) -> Tensor:
        """Clean latents (batch, channel, height, width) back to pictures (batch, 3, height, width) in [0, 1].

        Latents with a frame axis come back as (batch, 3, frame, height, width). Differentiable in latents
        that ask for a gradient.
        """
        vae = self._load_vae(device)
        wide = latents.to(vae.device, torch.float32)
        shift, scale = _shift_and_scale(vae.config, wide)
        frames = self._with_frames(wide / scale + shift).to(vae.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and latents.requires_grad):
            pictures = vae.decode(frames, return_dict=False)[0]
        if pictures.ndim == 5 and latents.ndim == 4:
            pictures = pictures.squeeze(2)
        return (pictures.float() / 2 + 0.5).clamp(0, 1).to(device)

    def _check_frames(self, pictures: list[Tensor], config: Any) -> None:
        for index, frames in enumerate(picture.shape[1] for picture in pictures if picture.ndim == 4):
            if self.architecture.max_latent_frames is None:
                raise InvalidInputError(
                    f"video {index} has {frames} frames: this backbone scores pictures only"
                )
            step = 2 ** sum(config["temperal_downsample"])
            if (frames - 1) % step:
                raise InvalidInputError(
                    f"video {index} has {frames} frames: this VAE takes one more than a multiple of {step}"
                )

    def _with_frames(self, batch: Tensor) -> Tensor:
        """A frame axis of length one, for the VAEs of video models."""
        return batch.unsqueeze(2) if batch.ndim == 4 and _is_video_vae(self._vae_config()) else batch

    def _without_frames(self, latents: Tensor) -> Tensor:
        keeps_frames = self.architecture.max_latent_frames is not None
        return latents if keeps_frames or latents.ndim == 4 else latents.squeeze(2)

    def _load_vae(self, device: torch.device) -> Any:
        if self._vae is None:
            self._need_vae()
            if self.source.live is not None:
                return apart(self.source.live.vae, "vae")
            kind = self.source.config("vae", "config.json").get("_class_name", "AutoencoderKL")
            with quiet_loading():
                vae = diffusers_class(kind).from_pretrained(
                    self.source.path("vae"), variant=self.source.variant
                )
            self._vae = vae.float().requires_grad_(False)
        return self._vae.to(device)


def encoders_for(
    source: PipelineSource, architecture: Architecture, max_text_tokens: int | None, dtype: torch.dtype
) -> Encoders | None:
    """Encoders, or None for a pipeline that holds only a transformer and a scheduler."""
    if not any(source.has(part) for part in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")):
        return None
    return Encoders(source, architecture, max_text_tokens=max_text_tokens, dtype=dtype)


def pipeline_encoders(
    pipeline: Any, *, max_pixels: int | None = None, max_text_tokens: int | None = None, dtype: torch.dtype
) -> Encoders:
    """VAE and text encoders of a pipeline without its diffusion network, each loaded when first used.

    Args:
        pipeline: "bundled", a folder, a hub id or a live pipeline; its network's config.json says which
            family it is.
        max_pixels: pictures with more are shrunk.
        dtype: of the text encoders.
    """
    source = PipelineSource(pipeline)
    architecture = read_architecture(source.network_config())
    return Encoders(source, architecture, max_text_tokens=max_text_tokens, max_pixels=max_pixels, dtype=dtype)


def pixels_per_latent(config: Any) -> int:
    """Spatial factor of a VAE, from its config."""
    if _is_video_vae(config):
        return 2 ** len(config["temperal_downsample"]) * (config.get("patch_size") or 1)
    return 2 ** (len(config["block_out_channels"]) - 1)


def _latent_space(config: Any) -> str:
    """A VAE's class and normalisation: latents of another space have other values, whatever their shape."""
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "latent_channels", "z_dim")
    stated = [f"{name}={config[name]}" for name in names if config.get(name) is not None]
    return " ".join([str(config.get("_class_name", "AutoencoderKL")), *stated])


def _is_video_vae(config: Any) -> bool:
    return "temperal_downsample" in config  # sic, in diffusers


def _shift_and_scale(config: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """As in z0 = (z - shift) * scale, one entry a channel or one for all."""

    def entry(name: str, default: float) -> Tensor:
        value = config.get(name)
        # The dtype is said, because the default one changes while another thread loads half precision.
        column = torch.tensor(default if value is None else value, dtype=torch.float32, device=latents.device)
        return column.reshape(-1, *[1] * (latents.ndim - 2))

    shift = entry("latents_mean", 0.0) + entry("shift_factor", 0.0)
    return shift, entry("scaling_factor", 1.0) / entry("latents_std", 1.0)


def _same_shape(pictures: list[Tensor]) -> list[list[int]]:
    """Indices of pictures of equal size, in batches small enough for the VAE."""
    groups: dict[torch.Size, list[int]] = {}
    for index, picture in enumerate(pictures):
        groups.setdefault(picture.shape, []).append(index)
    return [
        rows[i : i + PICTURES_PER_CALL]
        for rows in groups.values()
        for i in range(0, len(rows), PICTURES_PER_CALL)
    ]
