"""The reward head: FiLM adapters per tap, gated cross-attention from learned queries, one number per latent.

Legend: B batch, N tokens, Q queries, D backbone token width, W head width, E embedding width, f = W // 4.
Module names are those of the published checkpoint, so its state dict loads as it is.
Departure from the paper's code: with no text taps the text stream is absent, and its weights do not exist.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dina_lrm.core.ensemble import unfold_levels
from dina_lrm.core.precision import without_autocast
from dina_lrm.core.tensors import Features, Score
from dina_lrm.errors import InvalidInputError

RMS_EPS = torch.finfo(torch.float32).eps
"""Machine epsilon of float32 whatever the dtype at hand; torch's own default has changed between versions."""


class FiLMAdapter(nn.Module):
    """Features of one tap, modulated by the noise level, compressed to a quarter of the width.

        y = Linear( (1 + gamma) P(x) + beta + e ),   (gamma, beta) = MLP(temb)

    e is the tap's learned embedding; P is the identity unless the widths differ. The MLP starts at zero.
    """

    def __init__(self, token_dim: int, embedding_dim: int, width: int, *, project_in: bool = False) -> None:
        super().__init__()
        self.proj_in = nn.Linear(token_dim, width) if project_in or token_dim != width else nn.Identity()
        self.layer_embed = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.cond_mlp = nn.Sequential(
            nn.Linear(embedding_dim, 2 * width), nn.SiLU(), _zero_linear(2 * width, 2 * width)
        )
        self.proj = nn.Linear(width, width // 4)

    def forward(
        self, tokens: Features, temb: Float[Tensor, "batch embedding"]
    ) -> Float[Tensor, "batch token compressed"]:
        gamma, beta = self.cond_mlp(temb).unsqueeze(1).chunk(2, dim=-1)
        return self.proj(self.proj_in(tokens) * (1 + gamma) + beta + self.layer_embed)


class QueryAttention(nn.Module):
    """Queries attend to image tokens and, where present, to text tokens; residual.

        q  <-  q + Linear( softmax(q k_V) v_V + softmax(q k_T) v_T )

    Two separate softmaxes, summed: neither stream can crowd the other out. With gates, each token's value is
    scaled by sigmoid(g(token)), so a token can be silenced without moving attention elsewhere.
    """

    def __init__(
        self, width: int, num_heads: int, *, with_text: bool, gated: bool, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_q = nn.RMSNorm(width, eps=RMS_EPS)
        self.norm_v = nn.RMSNorm(width, eps=RMS_EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k_vis = nn.Linear(width, width)
        self.to_v_vis = nn.Linear(width, width)
        self.gate_vis = _token_gate(width) if gated else None
        self.norm_t = nn.RMSNorm(width, eps=RMS_EPS) if with_text else None
        self.to_k_text = nn.Linear(width, width) if with_text else None
        self.to_v_text = nn.Linear(width, width) if with_text else None
        self.gate_text = _token_gate(width) if with_text and gated else None
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))

    def forward(
        self,
        queries: Float[Tensor, "batch query width"],
        image: Float[Tensor, "batch image_token width"],
        text: Float[Tensor, "batch text_token width"] | None = None,
        text_mask: Bool[Tensor, "batch text_token"] | None = None,
    ) -> Float[Tensor, "batch query width"]:
        q = self.to_q(self.norm_q(queries))
        attended = self._read(q, self.norm_v(image), self.to_k_vis, self.to_v_vis, self.gate_vis)
        if self.norm_t is not None and self.to_k_text is not None and self.to_v_text is not None:
            assert text is not None
            attended = attended + self._read(
                q, self.norm_t(text), self.to_k_text, self.to_v_text, self.gate_text, text_mask
            )
        return queries + self.to_out(attended)

    def _read(
        self,
        q: Tensor,
        context: Tensor,
        to_key: nn.Linear,
        to_value: nn.Linear,
        gate: nn.Module | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        key, value = to_key(context), to_value(context)
        if gate is not None:
            value = gate(context).sigmoid() * value
        q, key, value = (rearrange(x, "b n (h d) -> b h n d", h=self.num_heads) for x in (q, key, value))
        seen = None if mask is None else mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(q, key, value, attn_mask=seen)
        return rearrange(attended, "b h n d -> b n (h d)")


def _token_gate(width: int) -> nn.Sequential:
    """One number per token; zero at the start, so every gate opens at sigmoid(0) = 1/2."""
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), _zero_linear(width, 1))


def _zero_linear(in_features: int, out_features: int) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


@dataclass(frozen=True)
class HeadTokens:
    """What the head's attentions read of some latents: one set of tokens a row."""

    image: Float[Tensor, "batch image_token width"]
    text: Float[Tensor, "batch text_token width"] | None = None
    text_mask: Bool[Tensor, "batch text_token"] | None = None
    """False for padding, which is not looked at."""

    @classmethod
    def stack(cls, parts: Sequence["HeadTokens"]) -> "HeadTokens":
        """Rows below rows; texts of different length are padded and masked."""
        image = torch.cat([part.image for part in parts])
        texts = [part.text for part in parts if part.text is not None]
        if not texts:
            return cls(image)
        masks = [part.text_mask for part in parts]
        length = max(text.shape[1] for text in texts)
        if all(mask is None for mask in masks) and all(text.shape[1] == length for text in texts):
            return cls(image, torch.cat(texts))
        padded = [F.pad(text, (0, 0, 0, length - text.shape[1])) for text in texts]
        seen = [
            F.pad(
                text.new_ones(text.shape[:2], dtype=torch.bool) if mask is None else mask,
                (0, length - text.shape[1]),
            )
            for text, mask in zip(texts, masks, strict=True)
        ]
        return cls(image, torch.cat(padded), torch.cat(seen))

    def rows(self, index: Tensor | slice) -> "HeadTokens":
        """Some of the rows."""
        text = None if self.text is None else self.text[index]
        return HeadTokens(self.image[index], text, None if self.text_mask is None else self.text_mask[index])

    def unfold(self, num_levels: int) -> "HeadTokens":
        """Rows ordered level by level become one ensemble a latent (`core.ensemble.unfold_levels`)."""
        mask = self.text_mask
        if mask is not None:
            mask = rearrange(mask, "(level batch) token -> batch (level token)", level=num_levels)
        text = None if self.text is None else unfold_levels(self.text, num_levels)
        return HeadTokens(unfold_levels(self.image, num_levels), text, mask)


class RewardHead(nn.Module):
    """Scores latents from backbone features.

    Args:
        image_dims, text_dims: token width at each tap; no text taps means image tokens only.
        embedding_dim: width of the backbone's time embedding.
        width: None takes the widest image tap.

    Two steps, because a noise ensemble joins token sets in between: `aggregate` turns one level's features
    into tokens, `score_tokens` turns tokens, of one level or of several concatenated, into a score.
    """

    def __init__(
        self,
        *,
        image_dims: Sequence[int],
        text_dims: Sequence[int],
        embedding_dim: int,
        width: int | None = None,
        num_queries: int = 4,
        num_attention_heads: int = 8,
        project_in: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = max(image_dims) if width is None else width
        if width % num_attention_heads or width % 4:
            raise InvalidInputError(
                f"head width {width} must be divisible by 4 and by its {num_attention_heads} attention heads"
            )
        self.width = width
        compressed = width // 4

        def adapters(dims: Sequence[int]) -> nn.ModuleList:
            return nn.ModuleList(
                FiLMAdapter(dim, embedding_dim, width, project_in=project_in) for dim in dims
            )

        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, num_queries, width))
        self.layer_adapters_visual = adapters(image_dims)
        self.layer_adapters_text = adapters(text_dims)
        self.agg_visual = nn.Linear(len(image_dims) * compressed, width)
        self.agg_text = nn.Linear(len(text_dims) * compressed, width) if text_dims else None
        self.attn1 = QueryAttention(
            width, num_attention_heads, with_text=len(text_dims) > 0, gated=True, dropout=dropout
        )
        self.attn2 = QueryAttention(width, num_attention_heads, with_text=False, gated=False, dropout=dropout)
        self.norm_ff = nn.RMSNorm(width, eps=RMS_EPS)
        self.ff = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )
        self.head = nn.Linear(width, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.query_tokens.dtype

    def aggregate(
        self, image: Sequence[Tensor], text: Sequence[Tensor], temb: Float[Tensor, "batch embedding"]
    ) -> tuple[Float[Tensor, "batch image_token width"], Float[Tensor, "batch text_token width"] | None]:
        """Tokens of one noise level: every tap through its adapter, joined on channels, mixed.

        Taps of different resolution (a UNet's) are laid end to end, each through its own slice of the mixing
        matrix: the same sum over taps, without its terms at other places.
        """
        temb = temb.to(self.dtype)

        def join(taps: Sequence[Tensor], adapters: nn.ModuleList, mix: nn.Linear) -> Tensor:
            compressed = [
                adapter(tokens.to(self.dtype), temb) for adapter, tokens in zip(adapters, taps, strict=True)
            ]
            return _mix_taps(compressed, mix)

        image_tokens = join(image, self.layer_adapters_visual, self.agg_visual)
        text_tokens = None if self.agg_text is None else join(text, self.layer_adapters_text, self.agg_text)
        return image_tokens, text_tokens

    def score_tokens(
        self,
        image_tokens: Float[Tensor, "batch image_token width"],
        text_tokens: Float[Tensor, "batch text_token width"] | None,
        text_mask: Bool[Tensor, "batch text_token"] | None = None,
    ) -> Score:
        """One score per row, the mean over queries; text tokens whose mask is False are not looked at.

        Scores are of the head's own dtype, float32 at least, whatever `torch.autocast` the caller is in.
        """
        queries = self.query_tokens.expand(image_tokens.shape[0], -1, -1)
        queries = self.attn1(queries, image_tokens, text_tokens, text_mask)
        queries = self.attn2(queries, image_tokens)
        # The few queries are float32 up to here. Under autocast the score would be rounded to bfloat16, whose
        # numbers near 10 lie 0.06 apart: further than pictures of one prompt.
        with without_autocast(queries.device.type):
            queries = queries + self.ff(self.norm_ff(queries))
            return self.head(queries).mean(dim=1).squeeze(-1)

    def forward(
        self,
        image: Sequence[Tensor],
        text: Sequence[Tensor],
        temb: Float[Tensor, "batch embedding"],
        text_mask: Bool[Tensor, "batch text_token"] | None = None,
    ) -> Score:
        return self.score_tokens(*self.aggregate(image, text, temb), text_mask)


def _mix_taps(taps: Sequence[Tensor], mix: nn.Linear) -> Tensor:
    """Compressed tokens of each tap to tokens of the head's width, by one Linear over all taps' channels."""
    if all(tap.shape[1] == taps[0].shape[1] for tap in taps):
        return mix(torch.cat(list(taps), dim=-1))
    slices = mix.weight.split([tap.shape[-1] for tap in taps], dim=-1)
    mixed = [F.linear(tap, weight, mix.bias) for tap, weight in zip(taps, slices, strict=True)]
    return torch.cat(mixed, dim=1)


class LogisticSquash(nn.Module):
    """Optional last step: a learned logistic between two fixed bounds.

    s' = (e1 - e2) / (1 + exp(-(s - e3) / (|e4| + 1e-6))) + e2,   e1 = 2, e2 = -2
    """

    def __init__(self) -> None:
        super().__init__()
        self.eta3 = nn.Parameter(torch.tensor(0.0))
        self.eta4 = nn.Parameter(torch.tensor(0.15))

    def forward(self, score: Score) -> Score:
        upper, lower = 2.0, -2.0
        return (upper - lower) * torch.sigmoid((score - self.eta3) / (self.eta4.abs() + 1e-6)) + lower
