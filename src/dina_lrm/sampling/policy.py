"""The generator that is aligned: a live pipeline's denoiser with a LoRA adapter of its own.

The adapter is called "policy". The reference that a run is held to is the same network with the adapter
switched off, so it costs no memory; a reward attached to the pipeline (`RewardModel.attach`) switches it off
too while it scores.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from dina_lrm.backbones.backbone import FLOW_MATCH, Backbone
from dina_lrm.backbones.families import backbone_of, read_architecture
from dina_lrm.backbones.lora import tuner_layers
from dina_lrm.backbones.packing import unpack
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.flow import Prediction
from dina_lrm.core.noise import NoiseSchedule, seeded_generator
from dina_lrm.core.precision import float32_masters, matrix_precision
from dina_lrm.errors import InvalidInputError, warn_of_prompts
from dina_lrm.models.encoders import Encoders, pixels_per_latent
from dina_lrm.pipelines.source import PipelineSource

__all__ = ["ADAPTER", "Grid", "Policy"]

ADAPTER = "policy"
FAMILIES = ("sd3", "flux", "unet")
"""Whose denoisers are called here: SD3 and SD3.5, FLUX.1, SD 1.5 and SDXL."""
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Grid:
    """The levels that a sampler passes through, from noise to clean.

    Attributes:
        sigmas: (step + 1,), the last one 0 or nearly.
        timesteps: (step,), what the network is told.
    """

    def __init__(self, sigmas: Tensor, timesteps: Tensor) -> None:
        self.sigmas, self.timesteps = sigmas, timesteps

    def __len__(self) -> int:
        return len(self.timesteps)


class Policy:
    """A pipeline's denoiser, called as the pipeline calls it, on unpacked latents.

    Args:
        pipeline: a live diffusers pipeline of a family in `FAMILIES`. Its denoiser is frozen.
        lora_rank: of the adapter; 0 adds none, for sampling only.
        lora_alpha: scale; twice the rank unless given.
        guidance: what a guidance-distilled denoiser (FLUX.1 [dev]) is told.
        gradient_checkpointing: compute blocks again in the backward pass.
        seed: of the adapter's first weights.

    Raises:
        InvalidInputError: not live, of another family; with a new adapter also: weights that are quantised, a
            LoRA that is active, or a "policy" adapter already.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        guidance: float | None = None,
        max_text_tokens: int | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        source = PipelineSource(pipeline)
        if source.network is None:
            raise InvalidInputError(
                "a policy is a live diffusers pipeline, not a folder or hub id: load it first"
            )
        architecture = read_architecture(source.network_config())
        kind = backbone_of(architecture)
        if kind.family not in FAMILIES:
            raise InvalidInputError(
                f"sampling and alignment know the families {', '.join(FAMILIES)}; this is {kind.family}"
            )
        scheduler = source.config("scheduler", "scheduler_config.json")
        self.pipeline = pipeline
        self.network: Any = source.network
        self.scheduler_config = scheduler
        self.encoders = Encoders(source, architecture, max_text_tokens=max_text_tokens)
        self.backbone: Backbone = kind(
            architecture,
            self.network,
            scheduler,
            image_taps=(0,),
            text_taps=(),
            num_blocks=1,
            guidance=architecture.default_guidance if guidance is None else guidance,
            pixels_per_latent=pixels_per_latent(source.config("vae", "config.json"))
            if source.has("vae")
            else 8,
        )
        flow = self.schedule.process == "rectified_flow"
        self.kind: Prediction = (
            "flow_prediction" if flow else scheduler.get("prediction_type", "epsilon")  # type: ignore[assignment]
        )
        self.network.requires_grad_(False).eval()
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        if lora_rank:
            self._add_adapter(lora_rank, 2.0 * lora_rank if lora_alpha is None else lora_alpha, seed)
        self._empty: Conditioning | None = None

    def _add_adapter(self, rank: int, alpha: float, seed: int) -> None:
        from peft import LoraConfig

        if ADAPTER in (getattr(self.network, "peft_config", None) or {}):
            raise InvalidInputError(
                f"the pipeline has an adapter {ADAPTER!r} already: load the pipeline anew"
            )
        self._check_bare()
        config = LoraConfig(
            r=rank,
            lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
            target_modules=list(self.backbone.lora_targets),
            init_lora_weights="gaussian",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            torch.set_rng_state(seeded_generator(seed).get_state())  # which reads more than 32 bits
            self.network.add_adapter(config, adapter_name=ADAPTER)
        self.network.enable_adapters()  # whatever `disable_lora` has switched off before
        float32_masters(self.parameters().values())

    def _check_bare(self) -> None:
        """The new adapter takes the place of active ones, and adapted layers have plain weights."""
        active, fused = set[str](), set[str]()
        for layer in tuner_layers(self.network):
            fused |= set(layer.merged_adapters)
            if not layer.disable_adapters:
                active |= set(layer.active_adapters) & set(layer.lora_A)
        if fused:
            raise InvalidInputError(
                f"the pipeline has a LoRA fused into its weights that can still be taken out "
                f"({', '.join(sorted(fused))}), and layers in that state ignore a new adapter: call "
                f"pipeline.unload_lora_weights() after fuse_lora() to start from the fused weights, or "
                f"unfuse_lora() and unload_lora_weights() to start without"
            )
        if active:
            raise InvalidInputError(
                f"the pipeline has an active LoRA ({', '.join(sorted(active))}), which the policy's adapter "
                f"would replace: start and reference would be the bare generator. Call fuse_lora() and "
                f"unload_lora_weights() on the pipeline to start from its pictures, or unload_lora_weights() "
                f"alone to start without"
            )
        for name, module in self.network.named_modules():
            weight = module.weight.data if isinstance(getattr(module, "weight", None), nn.Parameter) else None
            # torchao and quanto keep their numbers in a tensor type of their own, bitsandbytes in integers.
            if weight is not None and (type(weight) is not Tensor or weight.dtype not in _PLAIN):
                raise InvalidInputError(
                    f"the pipeline's denoiser has quantised weights ({type(module.weight).__name__} of "
                    f"{weight.dtype} in {name}): the adapter's size and the reference are measured against "
                    f"float32, bfloat16 or float16 ones, load the pipeline without quantization"
                )

    # ------------------------------------------------------------------------------------- the adapter

    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's weights by name, float32."""
        marker = f".{ADAPTER}."
        return {name: value for name, value in self.network.named_parameters() if marker in name}

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The network without the adapter, as it was."""
        layers = [layer for layer in tuner_layers(self.network) if ADAPTER in layer.lora_A]
        before = [layer._active_adapter for layer in layers]
        for layer, active in zip(layers, before, strict=True):
            names = [active] if isinstance(active, str) else list(active)
            layer._active_adapter = [name for name in names if name != ADAPTER]
        try:
            yield
        finally:
            for layer, active in zip(layers, before, strict=True):
                layer._active_adapter = active

    @torch.no_grad()
    def distance(self) -> float:
        """|| alpha / r B A || / || W || over all adapted weights: how far the policy has gone."""
        moved = total = 0.0
        for layer in tuner_layers(self.network):
            if ADAPTER in layer.lora_A:
                down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
                # |B A|^2 = sum of (B^T B) * (A A^T): no matrix of the size of W is made.
                square = ((up.T @ up).double() * (down @ down.T).double()).sum()
                moved += float(square) * layer.scaling[ADAPTER] ** 2
                total += float(layer.get_base_layer().weight.double().square().sum())
        return (moved / total) ** 0.5 if total else 0.0

    def save_lora(self, folder: Path) -> None:
        """`pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(folder)` takes."""
        name = "unet" if self.backbone.family == "unet" else "transformer"
        layers = {
            key.replace(f".{ADAPTER}.", "."): value.detach() for key, value in self.parameters().items()
        }
        about = self.network.peft_config[ADAPTER].to_dict()  # without it the adapter's scale would be lost
        type(self.pipeline).save_lora_weights(
            folder, **{f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": about}
        )

    # ------------------------------------------------------------------------------------- sampling

    @property
    def schedule(self) -> NoiseSchedule:
        return self.backbone.schedule

    @property
    def device(self) -> torch.device:
        return self.backbone.weight.device

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Channel, height and width of the latents of a picture; None is the pipeline's own size.

        Raises:
            InvalidInputError: not a multiple of the pixels that a latent token covers.
        """
        factor = self.backbone.pixels_per_latent
        own = getattr(self.network.config, "sample_size", None) or self.pipeline.default_sample_size
        sides = []
        for name, side in (("height", height), ("width", width)):
            side = int(own) * factor if side is None else side
            step = factor * self.backbone.architecture.latent_multiple
            if side < step or side % step:
                raise InvalidInputError(f"{name} = {side}: must be a multiple of {step} pixels")
            sides.append(side // factor)
        channels = self.backbone.architecture.latent_channels
        return channels, sides[0], sides[1]

    def grid(self, num_steps: int, shape: Sequence[int]) -> Grid:
        """Levels of `num_steps` steps as the pipeline's own scheduler spaces them (DDIM's spacing for
        variance-preserving models, whatever their scheduler)."""
        import diffusers

        flow = self.kind == "flow_prediction"
        name = str(self.scheduler_config.get("_class_name", FLOW_MATCH)) if flow else "DDIMScheduler"
        settings = {k: v for k, v in self.scheduler_config.items() if not k.startswith("_")}
        scheduler: Any = getattr(diffusers, name).from_config(settings)
        self.backbone.set_timesteps(scheduler, num_steps, *shape[-2:])
        timesteps = scheduler.timesteps.float()
        if flow:
            sigmas = scheduler.sigmas.float()
        else:
            last = (1.0 - torch.as_tensor(scheduler.final_alpha_cumprod)).clamp_min(0).sqrt()
            sigmas = torch.cat([self.schedule.sigma_at(timesteps), last.reshape(1).float()])
        return Grid(sigmas.to(self.device), timesteps.to(self.device))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """One row per prompt, by the pipeline's own text encoders.

        Each new prompt is encoded alone, so that its embedding has the same bits whatever a resumed run
        encodes beside it.

        Warns:
            PromptWarning: what the encoders do not see of a prompt, when it is encoded first.
        """
        for prompt in dict.fromkeys(prompts):
            self.encoders.encode_prompts([prompt], self.device, on_notes=warn_of_prompts)
        return self.encoders.encode_prompts(prompts, self.device)

    def predict(
        self, latents: Tensor, conditioning: Conditioning, timestep: Tensor, *, guidance_scale: float = 1.0
    ) -> Tensor:
        """The network's output (`kind`), guided; float32 and of the shape of `latents`.

        Args:
            timestep: (batch,), in units of the scheduler.
            guidance_scale: of classifier-free guidance; at 1 the empty prompt is not computed.
        """
        if guidance_scale == 1.0:
            return self._call(latents, conditioning, timestep)
        if self._empty is None:
            self._empty = self.encoders.text.encode_empty(self.device)
        empty = self._empty.index_select(torch.zeros(len(latents), dtype=torch.long, device=self.device))
        plain, guided = self._call(
            torch.cat([latents, latents]), _joined(empty, conditioning), torch.cat([timestep, timestep])
        ).chunk(2)
        return plain + guidance_scale * (guided - plain)

    def _call(self, latents: Tensor, conditioning: Conditioning, timestep: Tensor) -> Tensor:
        weight = self.backbone.weight
        arguments = self.backbone.arguments(
            latents.to(weight), conditioning.to(weight.device, weight.dtype), timestep.to(weight.device)
        )
        output = self.network(**arguments, return_dict=False)[0]
        if self.backbone.family == "flux":
            output = unpack(output, latents.shape[-2] // 2, latents.shape[-1] // 2)
        return output.float()

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (batch, 3, height, width) in [0, 1]; differentiable where the latents are."""
        return self.encoders.decode_latents(latents, self.device)

    @torch.no_grad()
    def pictures(self, latents: Tensor, *, batch_size: int = 32) -> list[Image.Image]:
        """The same as 8-bit pictures, `batch_size` at a time."""
        found: list[Image.Image] = []
        for part in latents.split(batch_size):
            pixels = (self.decode(part) * 255).round().to(torch.uint8)
            found += [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in pixels]
        return found

    def precision(self, precision: Literal["float32", "bfloat16"]) -> AbstractContextManager[None]:
        """Matrix products of the network in bfloat16 inside, or in the precision of its weights."""
        return matrix_precision(precision, self.device.type)


def _joined(first: Conditioning, second: Conditioning) -> Conditioning:
    """Rows of both; the shorter prompts are padded with zeros, masked where the backbone masks."""
    length = max(first.prompt_embeds.shape[1], second.prompt_embeds.shape[1])

    def rows(one: Conditioning) -> Tensor:
        return nn.functional.pad(one.prompt_embeds, (0, 0, 0, length - one.prompt_embeds.shape[1]))

    pooled = None
    if first.pooled_prompt_embeds is not None and second.pooled_prompt_embeds is not None:
        pooled = torch.cat([first.pooled_prompt_embeds, second.pooled_prompt_embeds])
    return Conditioning(torch.cat([rows(first), rows(second)]), pooled)
