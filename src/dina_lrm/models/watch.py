"""The reward of the state a sampling pipeline is at, out of the forward pass it makes anyway.

    with model.watch(pipeline) as watch:
        pipeline(prompt, callback_on_step_end=watch)
    watch.steps        # one StepScore a step: sigma, scores

In step i a pipeline evaluates its network at (z_i, sigma_i). The watch notes what the network was called with
and, at the end of the step, gives the reward of z_i at sigma_i:

- If reward and generator compute the same there, which means a frozen-backbone reward that shares the weights
  of the pipeline's network, no adapter active in it and no cache of its blocks, the blocks' outputs are those
  of the generator's own forward pass. The backbone's walk is replayed with them; only the embedders and the
  head are computed.
- Otherwise (LoRA rewards, a policy's adapter, other guidance, a reward with weights of its own, a FLUX or
  Qwen-Image in half precision, which rounds the time that the reward does not) one forward pass of the first
  L blocks is made, with the reward's weights.

With classifier-free guidance only the conditional half is scored. The score is that of `score_state` for the
same state, up to the rounding of a larger batch.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dina_lrm.backbones.backbone import BackboneFeatures, NoisyState
from dina_lrm.backbones.lora import tuner_layers
from dina_lrm.core.precision import without_inference_mode
from dina_lrm.core.tensors import Score
from dina_lrm.errors import InvalidInputError
from dina_lrm.pipelines.source import PipelineSource

if TYPE_CHECKING:
    from dina_lrm.models.reward_network import RewardNetwork


@dataclass(frozen=True)
class StepScore:
    """The reward of the state that one sampling step started from."""

    step: int
    timestep: float
    sigma: float
    scores: Score
    """(batch,)"""
    replayed: bool
    """True if no forward pass of the backbone was made for it."""


class RewardWatch:
    """A `callback_on_step_end` that scores the states a pipeline passes through; a context manager.

    Attributes:
        steps: what was scored, in order, over all calls of the pipeline made inside the context.
    """

    def __init__(self, model: "RewardNetwork", pipeline: Any) -> None:
        source = PipelineSource(pipeline)
        if source.network is None:
            raise InvalidInputError("watch takes a live diffusers pipeline, whose sampling is to be watched")
        self.steps: list[StepScore] = []
        self._model = model
        self._called: nn.Module = getattr(pipeline, source.denoiser)
        self._network: nn.Module = source.network  # inside what torch.compile puts around it
        self._handles: list[RemovableHandle] = []
        self._call: dict[str, Any] | None = None
        self._outputs: dict[nn.Module, Any] = {}
        self._listening = False

    def __enter__(self) -> "RewardWatch":
        self._handles.append(self._called.register_forward_pre_hook(self._note_call, with_kwargs=True))
        shared = self._model.backbone.shared
        if self._model.config.tuning == "frozen" and shared is not None and shared.network is self._network:
            for module in self._model.backbone.run_modules:
                original = shared.originals[module]
                self._handles.append(original.register_forward_hook(partial(self._note_output, module)))
        self._listening = True
        return self

    def __exit__(self, *_: Any) -> None:
        self._listening = False
        while self._handles:
            self._handles.pop().remove()
        self._forget()

    @torch.no_grad()
    def __call__(
        self, pipeline: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Score the state that this step started from; what is passed in is handed back unchanged."""
        if not self._listening:
            raise InvalidInputError("a reward watch sees nothing outside its context: use `with`")
        if self._call is None:
            raise InvalidInputError("no network of the watched pipeline was called in this step")
        if "latents" not in callback_kwargs:
            raise InvalidInputError('the watch needs "latents" among callback_on_step_end_tensor_inputs')
        backbone, call, outputs = self._model.backbone, self._call, self._outputs
        self._forget()
        state = backbone.state(**call)
        told = torch.as_tensor(timestep, dtype=torch.float32, device=state.timestep.device)
        state = state._replace(timestep=told.expand(len(state.latents)))  # before a pipeline rounds it
        rows = self._conditional_rows(len(state.latents), len(callback_kwargs["latents"]))
        complete = all(module in outputs for module in backbone.run_modules)
        replayed = complete and self._is_the_rewards_own_call(state, call)
        if replayed:
            with self._model.turn, without_inference_mode():
                features = backbone.features_at(*state, run=lambda module, *_, **__: outputs[module])
                scores = self._model.score_tokens(self._model.tokens(_rows_of(features, rows)))
        else:
            scores = self._model.score_state(*state.index_select(rows))
        sigma = backbone.schedule.sigma_at(state.timestep[:1])
        self.steps.append(StepScore(step, float(state.timestep[0]), float(sigma), scores, replayed))
        return callback_kwargs

    # ------------------------------------------------------------------------------------- inside

    def _note_call(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of the first call for a state: the conditional one, where there are two."""
        if not self._listening:
            return
        bound = inspect.signature(type(network).forward).bind(network, *args, **kwargs)
        call = {name: value for name, value in bound.arguments.items() if name != "self"}
        if self._call is None or not _same_state(
            *(self._model.backbone.state(**c) for c in (self._call, call))
        ):
            self._call, self._outputs = call, {}

    def _note_output(self, ours: nn.Module, theirs: nn.Module, _: Any, output: Any) -> None:
        if self._listening and ours not in self._outputs:
            self._outputs[ours] = output

    def _forget(self) -> None:
        self._call, self._outputs = None, {}

    def _is_the_rewards_own_call(self, state: NoisyState, call: Mapping[str, Any]) -> bool:
        """Did the generator compute just what the reward would have: same arguments, no adapter?"""
        backbone = self._model.backbone
        adapted = any(
            layer.active_adapters and not layer.disable_adapters for layer in tuner_layers(self._network)
        )
        device = state.latents.device.type
        half = backbone.weight.dtype.itemsize < 4 or (
            torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        )
        if adapted or self._is_cached() or (half and backbone.generator_rounds_time):
            return False
        own = backbone.arguments(*state)
        extra = [value for name, value in call.items() if name not in own and name != "return_dict"]
        plain = all(value is None or value is False or value == {} for value in extra)
        return plain and _same(own, call)

    def _is_cached(self) -> bool:
        """Does the generator approximate blocks by what they put out in earlier steps?"""
        return bool(getattr(self._network, "is_cache_enabled", False))

    def _conditional_rows(self, num_rows: int, num_latents: int) -> Tensor:
        half, device = self._model.backbone.conditional_half, self._model.device
        if num_rows == num_latents:
            return torch.arange(num_rows, device=device)
        if num_rows != 2 * num_latents or half is None:
            raise InvalidInputError(
                f"the network was called with {num_rows} rows for {num_latents} latents: "
                f"which of them are conditional is not known for this pipeline"
            )
        start = 0 if half == "first" else num_latents
        return torch.arange(start, start + num_latents, device=device)


def _rows_of(features: BackboneFeatures, rows: Tensor) -> BackboneFeatures:
    mask = features.text_mask
    return BackboneFeatures(
        tuple(tokens[rows] for tokens in features.image),
        tuple(tokens[rows] for tokens in features.text),
        features.temb[rows],
        None if mask is None else mask[rows],
    )


def _same_state(one: NoisyState, other: NoisyState) -> bool:
    return torch.equal(one.timestep, other.timestep) and torch.equal(one.latents, other.latents)


def _same(ours: Any, theirs: Any) -> bool:
    """Equal arguments, up to the rounding of the coarser dtype."""
    if isinstance(ours, Mapping):
        return isinstance(theirs, Mapping) and all(_same(ours[name], theirs.get(name)) for name in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if not isinstance(ours, Tensor):
        return (ours is None and theirs is None) or ours == theirs
    if theirs is None:
        return False
    other = torch.as_tensor(theirs, device=ours.device)
    if other.numel() == 1:
        other = other.expand(ours.shape)
    if other.shape != ours.shape:
        return False
    dtypes = [tensor.dtype for tensor in (ours, other) if tensor.is_floating_point()]
    tolerance = 4 * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    return torch.allclose(ours.double(), other.double(), rtol=tolerance, atol=tolerance)
