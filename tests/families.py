"""Tiny random pipelines of every backbone family, as diffusers folders: all parts real, none trained."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dina_lrm import Conditioning, RewardModel
from dina_lrm.backbones.architecture import Architecture
from dina_lrm.backbones.families import read_architecture
from dina_lrm.pipelines.libraries import quiet_loading
from dina_lrm.pipelines.source import PipelineSource
from tests.tiny import (
    _clip,
    _t5,
    _tokenizer,
    _vae,
    _vocabulary,
    make_tiny_pipeline,
    randomize,
    randomize_reward,
)

FAMILIES = ("sd3", "flux", "z_image", "qwen_image", "sd15", "sdxl", "wan")
TEXT_WIDTH = {"sd3": 64, "flux": 64, "z_image": 32, "qwen_image": 32, "sd15": 32, "sdxl": 64, "wan": 32}
POOLED_WIDTH = {"sd3": 64, "flux": 32, "sdxl": 32}
MASKED = ("z_image", "qwen_image")
"""Families whose text is padded under a mask."""
CHAT_TEMPLATE = "{% for message in messages %}<s> {{ message['content'] }} </s>{% endfor %}"


def make_family(family: str, folder: Path, *, seed: int = 0, num_layers: int | None = None) -> Path:
    """A whole pipeline folder; `num_layers` for recipes that read more blocks than the tiny network has."""
    network = {} if num_layers is None else {"num_layers": num_layers}
    if family == "sd3":
        return make_tiny_pipeline(folder, seed=seed, **network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = _MAKERS[family](**network)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            randomize(part, seed)
            part.eval()
    with quiet_loading():
        pipeline.save_pretrained(folder)
    return folder


def architecture_of(folder: Path) -> Architecture:
    return read_architecture(PipelineSource(folder).network_config())


def load_pipeline(folder: Path) -> Any:
    """The pipeline, ready to sample without progress bars."""
    import diffusers

    with quiet_loading():
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def network_of(pipeline: Any) -> Any:
    """The pipeline's denoiser."""
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def make_family_reward(pipeline: Path | Any, *, seed: int = 1, **settings: Any) -> RewardModel:
    """A reward as if trained: the default blocks and taps, LoRA of rank 2."""
    return randomize_reward(RewardModel.initialize(pipeline, **{"lora_rank": 2} | settings), seed)


def family_latents(
    family: str, batch: int = 2, height: int = 8, width: int = 12, *, frames: int | None = None, seed: int = 0
) -> Tensor:
    """Clean latents; with frames, of a video."""
    shape = (height, width) if frames is None else (frames, height, width)
    channels = 4 if family in ("sd15", "sdxl") else 16
    return torch.randn(batch, channels, *shape, generator=torch.Generator().manual_seed(seed))


def family_conditioning(family: str, batch: int = 2, *, tokens: int = 5, seed: int = 0) -> Conditioning:
    """Random text rows; where padding is masked, every second row is one token shorter."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(batch, tokens, TEXT_WIDTH[family], generator=generator)
    if family in MASKED:
        mask = (torch.arange(tokens) < tokens - torch.arange(batch)[:, None] % 2).long()
        return Conditioning(embeds * mask[..., None], attention_mask=mask)
    if family in POOLED_WIDTH:
        return Conditioning(embeds, torch.randn(batch, POOLED_WIDTH[family], generator=generator))
    return Conditioning(embeds)


def generate_latents(pipeline: Any, prompt: Any, *, steps: int = 3, seed: int = 0, **settings: Any) -> Tensor:
    """What the pipeline samples, before decoding."""
    if "num_frames" in inspect.signature(type(pipeline).__call__).parameters:
        settings = {"num_frames": 1} | settings
    negative = settings.get("negative_prompt")
    if isinstance(negative, str) and isinstance(prompt, list):
        settings["negative_prompt"] = [negative] * len(prompt)
    return pipeline(
        prompt,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        return_dict=False,
        **settings,
    )[0]


# --- the families


def _flux(num_layers: int = 2) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=64,
            num_layers=num_layers,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip().config),
        tokenizer=_tokenizer("<s>"),
        text_encoder_2=_t5(),
        tokenizer_2=_tokenizer(None),
    )


def _z_image() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = _tokenizer("<s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=4,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[640, 64, 64],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(),
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=len(_vocabulary()),
                hidden_size=32,
                intermediate_size=40,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
                max_position_embeddings=1024,
            )
        ),
        tokenizer=tokenizer,
    )


def _qwen_image() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(_vocabulary()),
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
    )
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            in_channels=64,
            out_channels=16,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=1.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=_video_vae(AutoencoderKLQwenImage, temperal_downsample=[False, True]),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=_tokenizer("<s>"),
    )


def _unet_pipeline(*, xl: bool) -> Any:
    import diffusers
    from transformers import CLIPTextModel

    down = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
    added: dict[str, Any] = {"cross_attention_dim": 32}
    if xl:
        down.reverse()
        added = {
            "cross_attention_dim": 64,
            "attention_head_dim": (1, 2, 2),
            "transformer_layers_per_block": (1, 1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 32 + 6 * 8,
        }
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        **{"attention_head_dim": 2} | added,
    )
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.13025 if xl else 0.18215,
        force_upcast=False,
    )
    if not xl:
        return diffusers.StableDiffusionPipeline(
            unet=unet,
            scheduler=diffusers.DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False),
            vae=vae,
            text_encoder=CLIPTextModel(_clip().config),
            tokenizer=_tokenizer("<s>"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return diffusers.StableDiffusionXLPipeline(
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**betas, timestep_spacing="leading"),
        vae=vae,
        text_encoder=CLIPTextModel(_clip().config),
        tokenizer=_tokenizer("<s>"),
        text_encoder_2=_clip(),
        tokenizer_2=_tokenizer("<s>"),
    )


def _wan() -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    return WanPipeline(
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=16,
            ffn_dim=48,
            num_layers=4,
            rope_max_seq_len=64,
        ),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=_video_vae(
            AutoencoderKLWan,
            temperal_downsample=[True, True],
            scale_factor_spatial=4,
            scale_factor_temporal=4,
        ),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(_vocabulary()), d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4)
        ),
        tokenizer=_tokenizer(None),
    )


def _video_vae(kind: Any, **settings: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    return kind(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        latents_mean=(0.1 * torch.randn(16, generator=generator)).tolist(),
        latents_std=(0.5 + torch.rand(16, generator=generator)).tolist(),
        **settings,
    )


_MAKERS: dict[str, Callable[..., Any]] = {
    "flux": _flux,
    "z_image": _z_image,
    "qwen_image": _qwen_image,
    "sd15": lambda: _unet_pipeline(xl=False),
    "sdxl": lambda: _unet_pipeline(xl=True),
    "wan": _wan,
}
