"""The whole reward once more, in float64 and plain torch operations on the tensors of the checkpoint files.

Nothing of the package computes here but what is under test. It reads a published-layout folder and a base
transformer's file, and follows the golden README: blocks, FiLM adapters, two softmaxes, gates, logistic,
ensembles. So it covers the kinds of checkpoint that the golden folder does not hold: a truncated backbone
with tap 0, a full fine-tune with a learned logistic, a text tap list shorter than the image's.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor

from dina_lrm import RewardModel
from tests.tiny import make_tiny_reward, tiny_conditioning, tiny_latents, tiny_transformer_only

HEADS, PATCH = 4, 2

KINDS = {
    "lora_whole_text": {"lora_rank": 4, "image_taps": (1, 2, 3), "text_taps": (1, 2, 3)},
    "lora_early_text": {"lora_rank": 4, "image_taps": (3,), "text_taps": (0, 2)},
    "truncated_with_tap_0": {"lora_rank": 0, "image_taps": (0, 1, 3), "text_taps": (0, 3)},
    "frozen_logistic": {
        "lora_rank": 0,
        "num_blocks": 4,
        "image_taps": (2, 4),
        "text_taps": (1, 3),
        "logistic": True,
    },
    "full_logistic": {
        "lora_rank": 0,
        "tuning": "full",
        "image_taps": (0, 3),
        "text_taps": (2,),
        "logistic": True,
    },
}


@pytest.mark.parametrize("seed", [0, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_against_the_recomputation(tmp_path: Path, kind: str, seed: int) -> None:
    pipeline = tiny_transformer_only(tmp_path, seed=seed, dual_attention_layers=(0, 1))
    model = make_tiny_reward(pipeline, seed=seed + 1, **KINDS[kind])
    if kind == "full_logistic":
        with torch.no_grad():
            for parameter in model.backbone.parameters():
                parameter.mul_(1.05)
    model.save_pretrained(tmp_path / "reward", "published")
    loaded = RewardModel.from_pretrained(tmp_path / "reward", pipeline=pipeline)
    wide = RewardModel.from_pretrained(tmp_path / "reward", pipeline=pipeline, dtype=torch.float64)
    latents, conditioning, noise = (
        tiny_latents(seed=seed),
        tiny_conditioning(seed=seed),
        tiny_latents(seed=seed + 2),
    )
    for levels in ([0.0], [0.4], [0.2, 0.5, 0.7]):
        expected = recompute(tmp_path / "reward", pipeline, latents, conditioning, noise, levels)
        with torch.no_grad():
            single = loaded.score_latents(latents, conditioning, levels, noise)
            double = wide.score_latents(
                latents.double(), conditioning.to(dtype=torch.float64), levels, noise.double()
            )
        torch.testing.assert_close(single.double(), expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(double, expected, atol=1e-6, rtol=0)


def recompute(
    reward: Path, pipeline: Path, latents: Tensor, conditioning, noise: Tensor, levels: list
) -> Tensor:
    model = json.loads((reward / "config.json").read_text())["model"]
    files = reward / "checkpoint"
    eta3, eta4 = torch.tensor(0.0), torch.tensor(0.15)
    if (files / "full_model.pt").exists():
        everything = torch.load(files / "full_model.pt", weights_only=True)
        base = {
            name.removeprefix("backbone."): x
            for name, x in everything.items()
            if name.startswith("backbone.")
        }
        head = {
            name.removeprefix("reward_head."): x
            for name, x in everything.items()
            if name.startswith("reward_head.")
        }
        eta3, eta4 = everything["eta3"], everything["eta4"]
    else:
        base = load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
        head = torch.load(files / "rm_head.pt", weights_only=True)
        if (files / "logistic.safetensors").exists():
            eta3, eta4 = (load_file(files / "logistic.safetensors")[name] for name in ("eta3", "eta4"))
    base, head = ({name: x.double() for name, x in state.items()} for state in (base, head))
    if model["use_lora"]:
        lora = load_file(files / "backbone_lora" / "adapter_model.safetensors")
        scale = model["lora_config"]["lora_alpha"] / model["lora_config"]["r"]
        for name in [name for name in lora if name.endswith("lora_A.weight")]:
            down, up = lora[name].double(), lora[name.replace("lora_A", "lora_B")].double()
            target = name.removeprefix("base_model.model.").replace("lora_A.", "")
            base[target] = base[target] + scale * up @ down
    config = json.loads((pipeline / "transformer" / "config.json").read_text())
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(pipeline / "scheduler")
    tokens = []
    for level in levels:
        row = (scheduler.sigmas[:1000] - level).abs().argmin()
        sigma, timestep = scheduler.sigmas[row].double(), scheduler.timesteps[row]
        noisy = (1 - sigma) * latents.double() + sigma * noise.double()
        image, text, temb = backbone(
            base,
            noisy,
            conditioning.prompt_embeds.double(),
            conditioning.pooled_prompt_embeds.double(),
            timestep,
            model,
            config,
        )
        tokens.append((adapt(head, "visual", image, temb), adapt(head, "text", text, temb)))
    visual, textual = (torch.cat(stream, dim=1) for stream in zip(*tokens, strict=True))
    score = head_score(head, visual, textual)
    if model["use_logistic"]:
        score = 4 / (1 + torch.exp(-(score - eta3.double()) / (eta4.double().abs() + 1e-6))) - 2
    return score


# --- the backbone


def linear(state: dict, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def normalize(x: Tensor) -> Tensor:
    """Layer norm without parameters."""
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + 1e-6)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention, one head at a time."""
    size = q.shape[-1] // heads
    out = []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size), dim=-1)
        out.append(weights @ v[..., part])
    return torch.cat(out, dim=-1)


def per_head_norm(x: Tensor, weight: Tensor) -> Tensor:
    size = weight.shape[0]
    return torch.cat([rms(part, weight, 1e-6) for part in x.split(size, dim=-1)], dim=-1)


def backbone(
    base: dict, noisy: Tensor, embeds: Tensor, pooled: Tensor, timestep: Tensor, model: dict, config: dict
):
    width = config["num_attention_heads"] * config["attention_head_dim"]
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(128, dtype=torch.float32) / 128
    )  # float32, as diffusers
    angles = timestep * frequencies
    wave = torch.cat([angles.cos(), angles.sin()]).double()
    time = linear(
        base,
        "time_text_embed.timestep_embedder.linear_2",
        silu(linear(base, "time_text_embed.timestep_embedder.linear_1", wave)),
    )
    words = linear(
        base,
        "time_text_embed.text_embedder.linear_2",
        silu(linear(base, "time_text_embed.text_embedder.linear_1", pooled)),
    )
    temb = time + words

    batch, channels, height, width_px = noisy.shape
    rows, columns = height // PATCH, width_px // PATCH
    patches = (
        noisy.reshape(batch, channels, rows, PATCH, columns, PATCH)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(batch, rows * columns, -1)
    )
    image = patches @ base["pos_embed.proj.weight"].reshape(width, -1).T + base["pos_embed.proj.bias"]
    side = config["pos_embed_max_size"]
    table = base["pos_embed.pos_embed"].reshape(side, side, width)
    top, left = (side - rows) // 2, (side - columns) // 2
    image = image + table[top : top + rows, left : left + columns].reshape(rows * columns, width)
    text = linear(base, "context_embedder", embeds)

    image_taps, text_taps = model["visual_head_idx"], model["text_head_idx"]
    images, texts = {0: image}, {0: text}
    for index in range(model["num_transformer_layers"]):
        last = index == config["num_layers"] - 1
        dual = index in config["dual_attention_layers"]
        text, image = block(base, f"transformer_blocks.{index}", text, image, temb, last, dual)
        images[index + 1], texts[index + 1] = image, text
    return [images[tap] for tap in image_taps], [texts[tap] for tap in text_taps], temb


def block(base: dict, name: str, text: Tensor, image: Tensor, temb: Tensor, last: bool, dual: bool):
    def modulation(norm: str) -> Tensor:
        return linear(base, f"{name}.{norm}.linear", silu(temb)).unsqueeze(1)

    parts = modulation("norm1").chunk(9 if dual else 6, dim=-1)
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = parts[:6]
    x = normalize(image) * (1 + scale_a) + shift_a
    if last:
        c_scale, c_shift = modulation("norm1_context").chunk(2, dim=-1)
        c = normalize(text) * (1 + c_scale) + c_shift
    else:
        c_parts = modulation("norm1_context").chunk(6, dim=-1)
        c = normalize(text) * (1 + c_parts[1]) + c_parts[0]

    attention = f"{name}.attn"
    q, k, v = (linear(base, f"{attention}.to_{p}", x) for p in "qkv")
    cq, ck, cv = (linear(base, f"{attention}.add_{p}_proj", c) for p in "qkv")
    q, k = (per_head_norm(y, base[f"{attention}.norm_{p}.weight"]) for y, p in ((q, "q"), (k, "k")))
    cq, ck = (per_head_norm(y, base[f"{attention}.norm_added_{p}.weight"]) for y, p in ((cq, "q"), (ck, "k")))
    joint = attend(torch.cat([q, cq], 1), torch.cat([k, ck], 1), torch.cat([v, cv], 1), HEADS)
    from_image, from_text = joint[:, : x.shape[1]], joint[:, x.shape[1] :]
    new_image = image + gate_a * linear(base, f"{attention}.to_out.0", from_image)
    if dual:
        x2 = normalize(image) * (1 + parts[7]) + parts[6]
        q, k, v = (linear(base, f"{name}.attn2.to_{p}", x2) for p in "qkv")
        q, k = (per_head_norm(y, base[f"{name}.attn2.norm_{p}.weight"]) for y, p in ((q, "q"), (k, "k")))
        new_image = new_image + parts[8] * linear(base, f"{name}.attn2.to_out.0", attend(q, k, v, HEADS))
    feed = feed_forward(base, f"{name}.ff", normalize(new_image) * (1 + scale_f) + shift_f)
    new_image = new_image + gate_f * feed
    if last:
        return None, new_image
    new_text = text + c_parts[2] * linear(base, f"{attention}.to_add_out", from_text)
    feed = feed_forward(base, f"{name}.ff_context", normalize(new_text) * (1 + c_parts[4]) + c_parts[3])
    return new_text + c_parts[5] * feed, new_image


def feed_forward(base: dict, name: str, x: Tensor) -> Tensor:
    x = linear(base, f"{name}.net.0.proj", x)
    tanh_gelu = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return linear(base, f"{name}.net.2", tanh_gelu)


# --- the head


def adapt(head: dict, stream: str, taps: list[Tensor], temb: Tensor) -> Tensor:
    outputs = []
    for index, x in enumerate(taps):
        name = f"layer_adapters_{stream}.{index}"
        film = linear(head, f"{name}.cond_mlp.2", silu(linear(head, f"{name}.cond_mlp.0", temb))).unsqueeze(1)
        gamma, beta = film.chunk(2, dim=-1)
        outputs.append(linear(head, f"{name}.proj", x * (1 + gamma) + beta + head[f"{name}.layer_embed"]))
    return linear(head, f"agg_{stream}", torch.cat(outputs, dim=-1))


def head_score(head: dict, image: Tensor, text: Tensor) -> Tensor:
    eps, heads = 2.0**-23, 8

    def branch(attention: str, q: Tensor, tokens: Tensor, norm: str, stream: str, gated: bool) -> Tensor:
        tokens = rms(tokens, head[f"{attention}.{norm}.weight"], eps)
        value = linear(head, f"{attention}.to_v_{stream}", tokens)
        if gated:
            gate = silu(linear(head, f"{attention}.gate_{stream}.0", tokens))
            value = torch.sigmoid(linear(head, f"{attention}.gate_{stream}.2", gate)) * value
        return attend(q, linear(head, f"{attention}.to_k_{stream}", tokens), value, heads)

    queries = head["query_tokens"].expand(image.shape[0], -1, -1)
    q = linear(head, "attn1.to_q", rms(queries, head["attn1.norm_q.weight"], eps))
    read = branch("attn1", q, image, "norm_v", "vis", True) + branch("attn1", q, text, "norm_t", "text", True)
    queries = queries + linear(head, "attn1.to_out.0", read)
    q = linear(head, "attn2.to_q", rms(queries, head["attn2.norm_q.weight"], eps))
    queries = queries + linear(head, "attn2.to_out.0", branch("attn2", q, image, "norm_v", "vis", False))
    hidden = linear(head, "ff.0", rms(queries, head["norm_ff.weight"], eps))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    queries = queries + linear(head, "ff.2", hidden)
    return linear(head, "head", queries).mean(dim=1)[:, 0]
