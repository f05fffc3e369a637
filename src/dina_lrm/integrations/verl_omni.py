"""A scorer for verl-omni: `pkg://dina_lrm.integrations.verl_omni`, for latents and pictures, here or remote.

    reward.custom_reward_function.path=pkg://dina_lrm.integrations.verl_omni
    reward.custom_reward_function.name=compute_score

A plain function: verl-omni's managers run those in their executor, so waiting for a server or for the lock of
the local reward holds nobody up.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dina_lrm.core.conditioning import Conditioning
from dina_lrm.errors import InvalidInputError
from dina_lrm.integrations import latent_http
from dina_lrm.integrations.local import PUBLISHED_REWARD, check_settings, finite, local_reward
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.models.scoring import NoiseLevels

MANAGERS_OWN = ("model_name", "reward_model_tokenizer", "reward_router_address")
"""Keywords that verl-omni's managers pass to every scorer."""
SERVED_CHANNELS = 16
"""Channels of a latent for a server, by which it is told from a picture."""


def compute_score(
    data_source: str,
    solution_image: Any,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None,
    *,
    server_url: str | None = None,
    reward: str | None = None,
    pipeline: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    noise_level: NoiseLevels = 0.4,
    noise_seed: int | None = 0,
    score_scale: float = 1.0,
    score_bias: float = 0.0,
    timeout_seconds: float | None = None,
    max_retries: int | None = None,
    **others: Any,
) -> dict[str, float]:
    """Score one sample; a latent wherever there is one, since it costs no decoding and no text encoder.

    What is scored is `extra_info["latents_clean"]` if it is there (for a video the only way), else
    `solution_image`: a latent if it is floating with as many channels as the reward's latents, otherwise a
    picture.

    Args:
        data_source: not read.
        solution_image: a latent (channel, height, width); or a picture (3, height, width), uint8, or floating
            in [0, 1]; or a video (frame, 3, height, width), for a backbone that takes videos.
        ground_truth: the prompt; read for pictures only.
        extra_info: for latents `prompt_embeds` (token, dim) and, where the backbone takes them,
            `pooled_prompt_embeds` (dim,): those that the latent was sampled with. Here and in latents a
            leading axis of length one may be there.
        server_url: score by a server (`integrations.latent_http`), latents only. None: score here, the reward
            being loaded once a process.
        reward, pipeline, device, dtype: as in `RewardModel.from_pretrained`; dtype by its name. By default
            the paper's reward on "cuda". With a server these are the server's affair, and refused here.
        noise_level: in [0, 1]; here also a list for an ensemble, or None for the reward's own.
        noise_seed: the same noise for every sample; None: fresh noise for each.
        score_scale, score_bias: score = score_scale * raw + score_bias. 0.1 and 1.0 are usual for the paper's
            reward.
        timeout_seconds, max_retries: of requests to a server, by default 120 and 5; refused without one.
        others: what managers pass to all scorers (`MANAGERS_OWN`) is not read; anything else is refused.

    Returns:
        "score", and "dina_raw": before scale and bias.

    Raises:
        InvalidInputError: something missing, of a wrong shape, or NaN; a setting that is not known, or that
            has no effect beside the others.
        ScoringError: no finite score to be had. verl-omni turns an exception into 0.0 unless the reward is
            `required`.
    """
    check_settings(others, compute_score, known=MANAGERS_OWN)
    own = {"reward": reward, "pipeline": pipeline, "device": device, "dtype": dtype}
    remote = {"timeout_seconds": timeout_seconds, "max_retries": max_retries}
    for name, value in (remote if server_url is None else own).items():
        if value is not None:
            where = "without server_url" if server_url is None else "with server_url: it is the server's"
            raise InvalidInputError(f"{name} = {value!r} has no effect {where}")
    info = {} if extra_info is None else extra_info
    if server_url is not None:
        given = {name: value for name, value in remote.items() if value is not None}
        raw = _score_remotely(server_url, solution_image, info, noise_level, noise_seed, given)
    else:
        local = local_reward(
            reward or PUBLISHED_REWARD, pipeline=pipeline, device=device or "cuda", dtype=dtype
        )
        with local.turn() as model:
            raw = _score_here(model, solution_image, ground_truth, info, noise_level, noise_seed)
    return {"score": score_scale * raw + score_bias, "dina_raw": raw}


def _score_remotely(
    server_url: str,
    solution_image: Any,
    info: Mapping[str, Any],
    noise_level: NoiseLevels,
    noise_seed: int | None,
    requests: Mapping[str, Any],
) -> float:
    latents = _latents(solution_image, info, SERVED_CHANNELS)
    if latents is None:
        raise InvalidInputError(
            f"solution_image is {_layout(solution_image)}, and extra_info has no latents_clean: a server "
            f"scores latents, so set output_type to latent or both, or score here, without server_url"
        )
    if isinstance(noise_level, bool) or not isinstance(noise_level, int | float):
        raise InvalidInputError(f"noise_level = {noise_level!r}: a server takes one number in [0, 1]")
    (raw,) = latent_http.score_latents(
        server_url,
        _row(latents, 4, "the latent"),
        _conditioning(info),
        torch.tensor([noise_level], dtype=torch.float32),
        None if noise_seed is None else [noise_seed],
        **requests,
    )
    return raw


@torch.no_grad()
def _score_here(
    model: RewardModel,
    solution_image: Any,
    prompt: str,
    info: Mapping[str, Any],
    noise_level: NoiseLevels,
    noise_seed: int | None,
) -> float:
    architecture = model.backbone.architecture
    takes_video = architecture.max_latent_frames is not None
    latents = _latents(solution_image, info, architecture.latent_channels)
    if latents is not None:
        num_axes = 5 if takes_video and latents.ndim > 3 else 4
        latents = _row(latents, num_axes, "the latent")
        scores = model.score_latents(latents, _conditioning(info), noise_level, seed=noise_seed)
    else:
        picture = _picture(solution_image, takes_video)
        scores = model.score(prompt, [picture], noise_level, noise_seed).scores
    return finite(scores).item()


def _latents(solution_image: Any, info: Mapping[str, Any], channels: int) -> Tensor | None:
    clean = info.get("latents_clean")
    name, value = ("solution_image", solution_image) if clean is None else ("latents_clean", clean)
    if not isinstance(value, Tensor) or value.ndim < 3:
        raise InvalidInputError(f"{name} is {_layout(value)}: it must be a tensor (channel, height, width)")
    is_latent = clean is not None or (value.is_floating_point() and value.shape[-3] == channels)
    return value if is_latent else None


def _picture(image: Tensor, takes_video: bool) -> Tensor:
    """(channel, height, width), or (channel, frame, height, width) for a video."""
    if image.ndim == 4 and len(image) == 1:
        return image[0]
    if image.ndim == 4 and not takes_video:
        raise InvalidInputError(
            f"solution_image is {_layout(image)}, a video of {len(image)} frames: this reward's backbone "
            f"takes pictures only"
        )
    return image.transpose(0, 1) if image.ndim == 4 else image


def _conditioning(info: Mapping[str, Any]) -> Conditioning:
    if info.get("prompt_embeds") is None:
        raise InvalidInputError(
            f"extra_info has no prompt_embeds, only {sorted(info)}: a latent is scored with the embeddings "
            f"that it was sampled with"
        )
    pooled = info.get("pooled_prompt_embeds")
    return Conditioning(
        _row(info["prompt_embeds"], 3, "prompt_embeds"),
        None if pooled is None else _row(pooled, 2, "pooled_prompt_embeds"),
    )


def _row(value: Any, num_axes: int, name: str) -> Tensor:
    """A batch of one, of what may be one already."""
    if isinstance(value, Tensor) and value.ndim == num_axes - 1:
        return value[None]
    if isinstance(value, Tensor) and value.ndim == num_axes and len(value) == 1:
        return value
    raise InvalidInputError(
        f"{name} is {_layout(value)}: it must be one sample, a tensor with {num_axes - 1} axes"
    )


def _layout(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"of type {type(value).__name__}"
