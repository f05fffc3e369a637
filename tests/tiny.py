"""Tiny random pipelines in the diffusers format of Stable Diffusion 3.5: every part real, nothing trained.

Weights are drawn at a size at which every part shows in the output: diffusers' own initial values would leave
whole blocks close to the identity.
"""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dina_lrm import Conditioning, RewardModel
from dina_lrm.data.latents import LatentPairs

WORDS = (
    "a an the red green blue gray white black yellow circle square triangle ellipse on above below left "
    "right of and to small large medium background two three in"
).split()
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
MAX_TOKENS = 12
TEXT_TOKENS = 2 * MAX_TOKENS
PROMPT = "a red circle on a gray background"


def make_tiny_pipeline(folder: Path, *, seed: int = 0, vae_depth: int = 3, **transformer: Any) -> Path:
    """A full `StableDiffusion3Pipeline` folder: 16 latent channels, VAE factor 4, patch 2, 4 blocks.

    Args:
        vae_depth: 4 for a VAE factor of 8, as Stable Diffusion's.
        transformer: overrides of the transformer's config, such as num_layers=6.
    """
    from diffusers import StableDiffusion3Pipeline

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "transformer": tiny_transformer(**transformer),
            "scheduler": _scheduler(),
            "vae": _vae(vae_depth),
            "text_encoder": _clip(),
            "text_encoder_2": _clip(),
            "text_encoder_3": _t5(),
        }
    for part in parts.values():
        if isinstance(part, nn.Module):
            randomize(part, seed)
    for name, start in (("tokenizer", "<s>"), ("tokenizer_2", "<s>"), ("tokenizer_3", None)):
        parts[name] = _tokenizer(start)
    StableDiffusion3Pipeline(**parts).save_pretrained(folder)
    return folder


def tiny_transformer_only(folder: Path, *, seed: int = 0, **transformer: Any) -> Path:
    """A folder with transformer/ and scheduler/ alone: it can score latents and nothing else."""
    model = tiny_transformer(**transformer)
    randomize(model, seed)
    model.save_pretrained(folder / "transformer")
    _scheduler().save_pretrained(folder / "scheduler")
    return folder


def copy_of(folder: Path, target: Path, *, without: tuple[str, ...] = ()) -> Path:
    """A copy that a test may damage, some components left out."""
    return Path(
        shutil.copytree(folder, target, ignore=lambda _, names: [name for name in names if name in without])
    )


def tiny_transformer(**overrides: Any) -> Any:
    """SD3.5-style: qk-norm, and a second attention in the first block. Text width 64, pooled 32 + 32."""
    from diffusers import SD3Transformer2DModel

    settings: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 64,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 12,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return SD3Transformer2DModel(**settings | overrides).eval()


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Weights N(0, 1 / fan_in), biases N(0, 0.1^2), scales 1 + N(0, 0.1^2): all shows, nothing explodes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(draw / parameter[0].numel() ** 0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.1 * draw)
            else:
                parameter.copy_(0.1 * draw)


def make_tiny_reward(pipeline: Any, *, seed: int = 1, **settings: Any) -> RewardModel:
    """A reward over `tiny_transformer`, every weight of which shows."""
    defaults = {"num_blocks": 3, "image_taps": (1, 3), "text_taps": (1, 3), "lora_rank": 2}
    return randomize_reward(RewardModel.initialize(pipeline, **defaults | settings), seed)


def randomize_reward(model: RewardModel, seed: int = 1) -> RewardModel:
    """As if trained: the parts that start at zero are drawn too."""
    randomize(model.head, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapter.parameters() if model.adapter else []:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        if model.squash is not None:
            model.squash.eta3.fill_(0.3)
            model.squash.eta4.fill_(-0.4)
    model.trained = True
    return model.eval()


def tiny_latents(batch: int = 3, height: int = 8, width: int = 12, *, seed: int = 0) -> Tensor:
    """Clean latents that fit `tiny_transformer`."""
    return torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(seed))


def tiny_conditioning(batch: int = 3, *, tokens: int = 5, seed: int = 0) -> Conditioning:
    """Random text rows of the widths that `tiny_transformer` takes."""
    generator = torch.Generator().manual_seed(seed)
    embeds, pooled = (torch.randn(batch, *shape, generator=generator) for shape in ((tokens, 64), (64,)))
    return Conditioning(embeds, pooled)


def preferred_pairs(latents: Tensor, conditioning: Conditioning) -> LatentPairs:
    """Of latents i and i + n, the one with the higher mean in its first channel is preferred.

    Rows of the conditioning are the prompts, which take turns.
    """
    num_pairs, num_prompts = len(latents) // 2, len(conditioning.prompt_embeds)
    first, second = torch.arange(num_pairs), torch.arange(num_pairs) + num_pairs
    utility = latents[:, 0].flatten(1).mean(dim=1)
    first_wins = utility[first] > utility[second]
    return LatentPairs(
        latents=latents,
        prompts=[f"prompt {i}" for i in range(num_prompts)],
        prompt_embeds=conditioning.prompt_embeds,
        pooled_prompt_embeds=conditioning.pooled_prompt_embeds,
        attention_mask=conditioning.attention_mask,
        prompt_index=torch.arange(num_pairs) % num_prompts,
        chosen=torch.where(first_wins, first, second),
        rejected=torch.where(first_wins, second, first),
        target=torch.ones(num_pairs),
    )


def _scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def _vae(depth: int = 3) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=(8,) * depth,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def _clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=32,
        projection_dim=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=_vocabulary()["<s>"],
        eos_token_id=_vocabulary()["</s>"],
        pad_token_id=_vocabulary()["<pad>"],
    )
    return CLIPTextModelWithProjection(config).eval()


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(_vocabulary()),
        d_model=64,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=3,
    )
    return T5EncoderModel(config).eval()


@cache
def _vocabulary() -> dict[str, int]:
    return {word: index for index, word in enumerate((*SPECIAL, *WORDS))}


def _tokenizer(start: str | None) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = _vocabulary()
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "$A </s>" if start is None else f"{start} $A </s>"
    words.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocabulary[token]) for token in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=MAX_TOKENS,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
