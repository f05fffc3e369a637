"""The bundled pipeline's networks at their initial, random state: the sizes are here and nowhere else.

Every class is the one Stable Diffusion 3.5 uses, only small, so that the folder made of them is an ordinary
`StableDiffusion3Pipeline`. One word-level tokenizer serves the three text encoders.
"""

from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from dina_lrm.shapes.scenes import CANVAS, vocabulary

MAX_TOKENS = 20
"""Tokens of a prompt, begin and end marks included; the longest caption of the grammar needs 18."""
PAD, UNKNOWN, BEGIN, END = 0, 1, 2, 3
LATENT_CHANNELS = 16
TEXT_DIM = 128
"""Width of the T5 encoder, and of the two CLIP text encoders' features side by side."""
PROJECTION_DIM = 32
"""Width of the space in which each CLIP text encoder meets the image encoder."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the caption grammar: lower case, one token a word or mark."""
    specials = {"<pad>": PAD, "<unk>": UNKNOWN, "<bos>": BEGIN, "<eos>": END}
    words = {word: index for index, word in enumerate(vocabulary(), start=len(specials))}
    tokenizer = Tokenizer(models.WordLevel(specials | words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BEGIN), ("<eos>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=MAX_TOKENS,
    )


def build_vae() -> AutoencoderKL:
    """Image (3, 64, 64) in [-1, 1] to latents (16, 16, 16)."""
    sizes: Any = {  # diffusers annotates these as tuples of one
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (16, 48, 96),
    }
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        **sizes,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=CANVAS,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    )


def build_clip_text_encoder() -> CLIPTextModelWithProjection:
    """One of the two small CLIP text encoders (they differ only by their random start)."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(vocabulary()) + 4,
            hidden_size=TEXT_DIM // 2,
            intermediate_size=2 * TEXT_DIM,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=PROJECTION_DIM,
            hidden_act="gelu",
            pad_token_id=PAD,
            bos_token_id=BEGIN,
            eos_token_id=END,
        )
    )


def build_clip_image_encoder() -> CLIPVisionModelWithProjection:
    """The image encoder of both CLIP text encoders; its projection is two halves, one for each."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=CANVAS,
            patch_size=8,
            projection_dim=2 * PROJECTION_DIM,
            hidden_act="gelu",
        )
    )


def build_t5_encoder() -> T5EncoderModel:
    """The small T5 encoder, trained together with the denoiser."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(vocabulary()) + 4,
            d_model=TEXT_DIM,
            d_kv=32,
            d_ff=2 * TEXT_DIM,
            num_layers=3,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=PAD,
            eos_token_id=END,
        )
    )


def build_transformer(num_layers: int = 6, num_heads: int = 3) -> SD3Transformer2DModel:
    """The denoiser: an MMDiT of width 64 `num_heads` over 64 image tokens, with SD3.5's query-key norm."""
    return SD3Transformer2DModel(
        sample_size=CANVAS // 4,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=num_layers,
        attention_head_dim=64,
        num_attention_heads=num_heads,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=64 * num_heads,
        pooled_projection_dim=2 * PROJECTION_DIM,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow with Stable Diffusion 3's shift of 3."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
