"""One model that a server holds: its thread, and what a request to it may cost."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from dina_lrm import __version__
from dina_lrm.models.options import ModelOptions
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.serving.batching import MicroBatcher
from dina_lrm.serving.callers import Caller
from dina_lrm.serving.engine import Engine, Result, Row, Unit
from dina_lrm.serving.metrics import Metrics
from dina_lrm.serving.pictures import EncodedPicture
from dina_lrm.serving.schemas import ModelInfo, RequestError
from dina_lrm.serving.settings import ServerSettings

__all__ = ["PictureRow", "Served", "load_models"]


@dataclass(frozen=True)
class PictureRow:
    """What is to be scored of a picture."""

    picture: EncodedPicture
    prompt: str
    noise_levels: tuple[float, ...]
    seed: int
    num_draws: int


def load_models(settings: ServerSettings) -> dict[str, RewardModel]:
    """The rewards that a server is to serve, by name."""
    return {
        name: ModelOptions(
            model=location,
            pipeline=settings.pipeline,
            device=settings.device,
            dtype=settings.dtype,
            compile=settings.compile,
        )
        .load()
        .requires_grad_(False)
        for name, location in settings.models
    }


class Served:
    """A model with the thread that holds it."""

    def __init__(self, name: str, model: RewardModel, settings: ServerSettings, metrics: Metrics) -> None:
        self.name, self.settings = name, settings
        self.engine = Engine(model)
        self.digest = _digest(model)
        self.batcher = MicroBatcher[Unit, Result](
            self.engine.run,
            max_batch_size=settings.max_batch_size,
            max_wait_ms=settings.max_wait_ms,
            max_queue=settings.max_queue,
            max_work=settings.max_queue_tokens,
            max_pass_seconds=settings.max_pass_seconds,
            observe=lambda stats: metrics.batch(name, stats),
        )
        metrics.describe(
            name,
            base=str(model.config.backbone_id),
            digest=self.digest,
            version=__version__,
            queued=lambda: self.batcher.queued,
            work=lambda: self.batcher.work,
        )

    @property
    def model(self) -> RewardModel:
        return self.engine.model

    def info(self) -> ModelInfo:
        config, architecture = self.model.config, self.model.backbone.architecture
        encoders = self.model.encoders
        return ModelInfo(
            name=self.name,
            base=config.backbone_id,
            digest=self.digest,
            training_step=self.model.training_step,
            noise_levels=list(config.noise_levels),
            family=self.model.backbone.family,
            latent_channels=architecture.latent_channels,
            max_latent_side=architecture.max_latent_side,
            takes_pictures=encoders is not None and encoders.source.has("vae"),
            takes_prompts=encoders is not None and all(map(encoders.source.has, encoders.text.encoders)),
        )

    # ------------------------------------------------------------------------------------- costs

    def check_count(self, rows: int, name: str) -> None:
        """As `check_cost`, as soon as it is known how many rows there are."""
        setting = min(("max_rows", "max_queue"), key=lambda setting: getattr(self.settings, setting))
        limit = getattr(self.settings, setting)
        if rows > limit:
            raise _too_large(name, f"{rows} in one request", limit, setting)

    def check_cost(self, rows: Sequence[Row | PictureRow], name: str, caller: Caller | None) -> int:
        """Tokens of work of a request.

        Args:
            name: of the field that holds the rows.
            caller: who sends it, where there are several.

        Raises:
            RequestError: 413; it says which limit, and by how much it is passed.
        """
        limits, total, pixels = self.settings, 0, 0
        self.check_count(len(rows), name)
        if caller is not None and caller.max_queue is not None and len(rows) > caller.max_queue:
            raise _too_large(name, f"{len(rows)} in one request", caller.max_queue, "max_queue of this token")
        for row in rows:
            if isinstance(row, Row):
                text = row.conditioning.prompt_embeds.shape[1]
                if text > limits.max_text_tokens:
                    raise _too_large(
                        "prompt_embeds", f"{text} tokens", limits.max_text_tokens, "max_text_tokens"
                    )
                tokens = self.engine.image_tokens(row.latent.shape) + text
            else:
                pixels += row.picture.pixels
                tokens = self.engine.picture_tokens(*self.size(row.picture))
            if tokens > limits.max_row_tokens:
                raise _too_large(name, f"a row of {tokens} tokens", limits.max_row_tokens, "max_row_tokens")
            total += tokens * len(row.noise_levels) * row.num_draws
        if pixels > limits.max_request_megapixels * 1e6:
            raise _too_large(
                name,
                f"{pixels / 1e6:.1f} million pixels",
                limits.max_request_megapixels,
                "max_request_megapixels",
            )
        if total > limits.max_request_tokens:
            raise _too_large(
                name,
                f"{total} tokens of work (rows x draws x noise levels x tokens)",
                limits.max_request_tokens,
                "max_request_tokens",
            )
        return total

    def size(self, picture: EncodedPicture) -> tuple[int, int]:
        """Height and width that a picture is encoded at; InvalidInputError where it is too small."""
        return self.model.picture_size(picture.height, picture.width, picture.name)

    def encoded_bytes(self, picture: EncodedPicture) -> int:
        """Bytes of a picture that waits to be encoded: three colours in float32."""
        height, width = self.size(picture)
        return 3 * 4 * height * width


def _too_large(field: str, what: str, limit: float, setting: str) -> RequestError:
    return RequestError(f"{field}: {what}, at most {limit:g} are taken ({setting})", field=field, status=413)


def _digest(model: RewardModel) -> str:
    """Digest of the weights that belong to the reward: head and adapter, or head and backbone."""
    own = dict(model.head.state_dict())
    if model.adapter is not None:
        own |= {f"adapter.{index}": parameter for index, parameter in enumerate(model.adapter.parameters())}
    elif model.config.tuning == "full":
        own |= {f"backbone.{name}": one for name, one in model.backbone.state_dict().items()}
    digest = hashlib.sha256()
    for name, tensor in sorted(own.items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
