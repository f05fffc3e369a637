"""Every backbone against the untouched diffusers model and pipeline it stands for, on tiny random weights."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dina_lrm import Conditioning, InvalidInputError, RewardModel
from dina_lrm.backbones.backbone import Backbone
from dina_lrm.backbones.families import BACKBONES, backbone_of
from tests.families import (
    FAMILIES,
    MASKED,
    architecture_of,
    family_conditioning,
    family_latents,
    load_pipeline,
    make_family_reward,
    network_of,
)
from tests.tiny import PROMPT

SHAPES = [(8, 8), (8, 12)]
SIGMAS = [0.3, 0.8]


def every_tap(folder: Path, **settings: Any) -> RewardModel:
    """A reward that reads everything there is to read."""
    architecture = architecture_of(folder)
    count = len(architecture.block_names)
    texts = [tap for tap in range(count + 1) if architecture.text_tap_problem(tap) is None]
    taps = {"num_blocks": count, "image_taps": range(count + 1), "text_taps": texts}
    return make_family_reward(folder, **taps | settings)


def untouched_taps(network: Any, names: tuple[str, ...], arguments: dict[str, Any]) -> list[Any]:
    """What every block of the whole diffusers model puts out, caught by hooks."""
    caught: list[Any] = []
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda _, __, output: caught.append(output))
        for name in names
    ]
    with torch.no_grad():
        network(**arguments)
    for hook in hooks:
        hook.remove()
    return caught


def image_tokens(family: str, output: Any, num_patches: int) -> Tensor:
    match family:
        case "sd3" | "flux" | "qwen_image":
            return output[1]
        case "z_image":
            return output[:, :num_patches]
        case "wan":
            return output
        case _:
            return (output[0] if isinstance(output, tuple) else output).flatten(2).transpose(1, 2)


# --- features


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("level", SIGMAS)
def test_taps_are_what_hooks_catch(family: str, folder: Path, height: int, width: int, level: float) -> None:
    backbone = every_tap(folder, lora_rank=0).backbone
    latents, conditioning = family_latents(family, 2, height, width), family_conditioning(family, 2)
    level_of = backbone.schedule.match(torch.full((2,), level))
    with torch.no_grad():
        features = backbone(latents, conditioning, level_of.sigma)
    arguments = backbone.arguments(latents, conditioning, level_of.timestep)
    outputs = untouched_taps(network_of(load_pipeline(folder)), backbone.block_names, arguments)
    assert len(outputs) == len(backbone.block_names)
    for tap, output in enumerate(outputs, start=1):
        found = features.image[tap]
        expected = image_tokens(family, output, height * width // 4)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert found.shape[-1] == backbone.architecture.image_tap_dim(tap)
        if tap not in backbone.text_taps:
            continue
        text = features.text[backbone.text_taps.index(tap)]
        if family == "z_image":  # image first, then text, both filled up to multiples of 32
            start = output.shape[1] - text.shape[1]
            real = features.text_mask
            assert real is not None
            torch.testing.assert_close(text[real], output[:, start:][real], atol=1e-5, rtol=0)
        else:
            torch.testing.assert_close(text, output[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "wan"], indirect=True)
def test_the_text_that_blocks_leave_alone_is_read_at_tap_0(family: str, folder: Path) -> None:
    model = make_family_reward(folder, text_taps=(0,))
    conditioning = family_conditioning(family, 2)
    with torch.no_grad():
        features = model.backbone(family_latents(family), conditioning, torch.full((2,), 0.4))
    if family != "wan":
        assert torch.equal(features.text[0], conditioning.prompt_embeds)
    with pytest.raises(InvalidInputError, match="text tap 1 cannot be read"):
        make_family_reward(folder, text_taps=(1,))


def test_truncated_backbones_compute_the_same(family: str, folder: Path) -> None:
    whole, cut = every_tap(folder, lora_rank=0), make_family_reward(folder, lora_rank=0)
    arguments = (family_latents(family), family_conditioning(family), torch.full((2,), 0.4))
    with torch.no_grad():
        everything, some = whole.backbone(*arguments), cut.backbone(*arguments)
    assert cut.backbone.num_blocks < whole.backbone.num_blocks
    for tap, tokens in zip(cut.backbone.image_taps, some.image, strict=True):
        assert torch.equal(tokens, everything.image[tap])
    assert torch.equal(some.temb, everything.temb)


def test_the_state_a_pipeline_is_at_is_read_back(family: str, folder: Path) -> None:
    backbone = make_family_reward(folder).backbone
    latents, conditioning = family_latents(family, 2, 8, 12), family_conditioning(family, 2)
    timestep = backbone.schedule.match(torch.tensor(SIGMAS)).timestep
    state = backbone.state(**backbone.arguments(latents, conditioning, timestep))
    assert torch.equal(state.latents.reshape(latents.shape), latents)
    torch.testing.assert_close(state.timestep, timestep, atol=1e-3, rtol=0)
    mask = conditioning.attention_mask
    real = slice(None) if mask is None else mask.bool()
    assert torch.equal(state.conditioning.prompt_embeds[real], conditioning.prompt_embeds[real])


def test_video_latents_and_pictures_as_one_frame(family_folders: Any) -> None:
    model = make_family_reward(family_folders("wan"))
    conditioning = family_conditioning("wan", 2)
    picture = family_latents("wan", 2)
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        flat = model.score_latents(picture, conditioning, 0.4, noise)
        framed = model.score_latents(picture.unsqueeze(2), conditioning, 0.4, noise.unsqueeze(2))
        video = model.score_latents(family_latents("wan", 2, frames=3), conditioning, [0.2, 0.6], seed=0)
    assert torch.equal(flat, framed)
    assert video.shape == (2,)
    with pytest.raises(InvalidInputError, match=r"70 frames.* 1 to \d+"):
        model.score_latents(
            family_latents("wan", 1, 4, 4, frames=70), conditioning.index_select(torch.tensor([0]))
        )


def test_a_unet_of_uneven_size(family_folders: Any) -> None:
    """Latents that a downsampling does not divide evenly are upsampled as diffusers does it."""
    backbone = every_tap(family_folders("sd15"), lora_rank=0).backbone
    latents, conditioning = family_latents("sd15", 2, 10, 14), family_conditioning("sd15", 2)
    timestep = torch.tensor([100.0, 700.0])
    backbone.check_latents(latents)
    with torch.no_grad():
        features = backbone.features_at(latents, conditioning, timestep)
    arguments = backbone.arguments(latents, conditioning, timestep)
    outputs = untouched_taps(
        network_of(load_pipeline(family_folders("sd15"))), backbone.block_names, arguments
    )
    for tokens, output in zip(features.image[1:], outputs, strict=True):
        torch.testing.assert_close(tokens, image_tokens("sd15", output, 0), atol=1e-5, rtol=0)


# --- scores


def test_scores_do_not_depend_on_the_batch(family: str, folder: Path) -> None:
    model = make_family_reward(folder).requires_grad_(False)
    latents, conditioning = family_latents(family, 4), family_conditioning(family, 4)
    whole = model.score_latents(latents, conditioning, [0.2, 0.7], seed=0)
    assert whole.std() > 1e-3
    for row in range(4):
        alone = model.score_latents(
            latents[row : row + 1], conditioning.index_select(torch.tensor([row])), [0.2, 0.7], seed=0
        )
        torch.testing.assert_close(alone[0], whole[row], atol=1e-5, rtol=0)
    model.max_batch_size = 3
    torch.testing.assert_close(
        model.score_latents(latents, conditioning, [0.2, 0.7], seed=0), whole, atol=1e-5, rtol=0
    )


def test_padding_changes_nothing_where_text_is_masked(family: str, folder: Path) -> None:
    model = make_family_reward(folder).requires_grad_(False)
    latents, conditioning = family_latents(family, 2), family_conditioning(family, 2, tokens=6)
    embeds = conditioning.prompt_embeds
    garbage = torch.randn(2, 40, embeds.shape[-1], generator=torch.Generator().manual_seed(0))
    mask = conditioning.attention_mask
    mask = torch.ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask
    padded = Conditioning(
        torch.cat([embeds, garbage], dim=1),
        conditioning.pooled_prompt_embeds,
        torch.nn.functional.pad(mask, (0, 40)),
    )
    if family not in MASKED:
        with pytest.raises(InvalidInputError, match=r"text tokens.* padding"):
            model.score_latents(latents, padded, 0.4, seed=0)
        return
    expected = model.score_latents(latents, conditioning, 0.4, seed=0)
    torch.testing.assert_close(model.score_latents(latents, padded, 0.4, seed=0), expected, atol=1e-5, rtol=0)
    unmasked = Conditioning(padded.prompt_embeds, padded.pooled_prompt_embeds)
    assert (model.score_latents(latents, unmasked, 0.4, seed=0) - expected).abs().min() > 1e-3


def test_gradients_reach_the_latents(family: str, folder: Path) -> None:
    model = make_family_reward(folder).requires_grad_(False)
    latents = family_latents(family).requires_grad_()
    model.score_latents(latents, family_conditioning(family), [0.2, 0.7], seed=0).sum().backward()
    assert latents.grad is not None
    assert bool(latents.grad.flatten(1).abs().amax(dim=1).gt(1e-6).all())


def test_bfloat16_is_diffusers_own(family: str, folder: Path) -> None:
    """The same bits as the untouched model in bfloat16, with what diffusers keeps in float32 kept so.

    FLUX and Qwen-Image alone are told the time and the guidance without rounding.
    """
    model = every_tap(folder, lora_rank=0, dtype=torch.bfloat16)
    latents, conditioning = family_latents(family), family_conditioning(family)
    backbone = model.backbone
    timestep = backbone.schedule.match(torch.tensor(SIGMAS)).timestep
    half, words = latents.to(torch.bfloat16), conditioning.to(dtype=torch.bfloat16)
    kind = getattr(diffusers, backbone.architecture.diffusers_class)
    untouched = kind.from_pretrained(
        folder / backbone.architecture.component, torch_dtype=torch.bfloat16
    ).eval()
    arguments = backbone.arguments(half, words, timestep)
    if backbone.generator_rounds_time:  # the one thing that is not its own: 978.26 stays 978.26
        exact = [timestep, torch.full((2,), 3500.0)] if family == "flux" else [timestep / 1000]
        untouched.time_text_embed.register_forward_pre_hook(lambda _, given: (*exact, *given[len(exact) :]))
    outputs = untouched_taps(untouched, backbone.block_names, arguments)
    with torch.no_grad():
        features = backbone.features_at(latents, conditioning, timestep)
    for tokens, output in zip(features.image[1:], outputs, strict=True):
        assert torch.equal(tokens, image_tokens(family, output, 24))
    dtypes = {name: p.dtype for name, p in untouched.named_parameters()}
    cast = every_tap(folder, lora_rank=0).to(torch.bfloat16)
    for reward in (model, cast):
        assert reward.dtype == torch.bfloat16
        assert all(p.dtype == dtypes[name] for name, p in reward.backbone.named_parameters())
        assert reward.head.dtype == torch.float32
    scores = [m.score_latents(latents, conditioning, 0.4, seed=0) for m in (model, cast)]
    assert torch.equal(*scores)


# --- checkpoints


@pytest.mark.parametrize("tuning", ["lora", "frozen", "full"])
def test_saved_and_loaded(family: str, folder: Path, tmp_path: Path, tuning: str) -> None:
    model = make_family_reward(folder, tuning=tuning, lora_rank=2 if tuning == "lora" else 0)
    arguments = (family_latents(family), family_conditioning(family), [0.2, 0.7])
    with torch.no_grad():
        expected = model.score_latents(*arguments, seed=0)
    loaded = RewardModel.from_pretrained(model.save_pretrained(tmp_path / "reward"))
    assert loaded.config.backbone == backbone_of(architecture_of(folder)).family
    with torch.no_grad():
        assert torch.equal(loaded.score_latents(*arguments, seed=0), expected)


@pytest.mark.parametrize("family", ["sd3", "flux", "z_image"], indirect=True)
def test_published_layout(family: str, folder: Path, tmp_path: Path) -> None:
    """As other code writes it: without our own section, so the family comes from the pipeline."""
    import json

    model = make_family_reward(folder)
    with torch.no_grad():
        expected = model.score_latents(family_latents(family), family_conditioning(family), 0.4, seed=0)
    saved = model.save_pretrained(tmp_path / "reward", layout="published")
    record = json.loads((saved / "config.json").read_text())
    assert record.pop("dina_lrm")["model"]["backbone"] == family
    assert record["model"]["backbone_model_id"] == str(folder)
    (saved / "config.json").write_text(json.dumps(record))
    loaded = RewardModel.from_pretrained(saved)
    assert loaded.config.backbone == family
    assert loaded.config.guidance == model.config.guidance
    with torch.no_grad():
        again = loaded.score_latents(family_latents(family), family_conditioning(family), 0.4, seed=0)
    assert torch.equal(again, expected)
    names = set(model.adapter.state_dict())
    assert all(name.startswith("base_model.model.") for name in names)


# --- noise and schedules


@pytest.mark.parametrize("family", ["sd15", "sdxl"], indirect=True)
def test_noisy_states_are_the_schedulers_own(family: str, folder: Path) -> None:
    """Bit for bit DDPM's `add_noise`, at the steps that the wanted levels are snapped to."""
    model = make_family_reward(folder)
    clean, noise = family_latents(family, 5), family_latents(family, 5, seed=1)
    level = model.schedule.match(torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0]))
    config = load_pipeline(folder).scheduler.config
    reference = diffusers.DDPMScheduler.from_config(config)
    expected = reference.add_noise(clean, noise, level.timestep.long())
    torch.testing.assert_close(model.schedule.add_noise(clean, noise, level.sigma), expected, atol=0, rtol=0)


def seen_timesteps(pipeline: Any, backbone: Backbone, steps: int, height: int, width: int) -> Tensor:
    """Timesteps at which a pipeline calls its network, in units of the training table."""
    seen: list[Tensor] = []

    def note(network: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        import inspect

        bound = inspect.signature(type(network).forward).bind(network, *args, **kwargs).arguments
        del bound["self"]
        seen.append(backbone.state(**bound).timestep[0])

    hook = network_of(pipeline).register_forward_pre_hook(note, with_kwargs=True)
    pipeline(PROMPT, num_inference_steps=steps, height=height, width=width, output_type="latent")
    hook.remove()
    return torch.stack(seen)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96)])
def test_sampling_levels_are_the_pipelines(family: str, folder: Path, height: int, width: int) -> None:
    pipeline = load_pipeline(folder)
    model = make_family_reward(folder)
    seen = seen_timesteps(pipeline, model.backbone, 4, height, width)
    factor = model.backbone.pixels_per_latent
    sigmas = model.backbone.sampling_sigmas(4, height // factor, width // factor)
    found = model.schedule.sigma_at(seen).unique(sorted=True)
    torch.testing.assert_close(found, sigmas.unique(sorted=True), atol=1e-5, rtol=0)


# --- prompts and pictures


# --- refusals


def test_every_backbone_is_covered(family_folders: Any) -> None:
    covered = {backbone_of(architecture_of(family_folders(family))) for family in FAMILIES}
    assert covered == set(BACKBONES)
