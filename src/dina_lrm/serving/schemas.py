"""What requests with pictures may say, as JSON or as a form, and what is answered."""

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError
from starlette.datastructures import FormData, UploadFile

from dina_lrm.errors import InvalidInputError

__all__ = [
    "CompareReply",
    "CompareRequest",
    "ErrorReply",
    "ImageScores",
    "ImagesRequest",
    "LatentScores",
    "ModelInfo",
    "ModelList",
    "RequestError",
    "Status",
    "check_prompt",
    "decoded",
    "form_fields",
    "json_of",
    "levels_of",
    "paired",
    "parsed",
]

MAX_LEVELS = 16
MAX_DRAWS = 64
MAX_SHOWN = 80
"""Characters of a client's own words that are repeated in an answer."""


class RequestError(InvalidInputError):
    """A request that is answered with 4xx.

    Attributes:
        status: HTTP status.
        field: of the request, that is wrong, with its place in a list, such as images.1; None where no
            single one is.
    """

    def __init__(self, message: str, *, field: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.field = field
        self.status = status


def _said_as(allowed: str) -> WrapValidator:
    """One message for a field of several types, in place of one for each of them."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise PydanticCustomError("type", "expected " + allowed) from error  # type: ignore[arg-type]

    return WrapValidator(check)


Level = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False, strict=True)]
Levels = Annotated[
    Level | Annotated[list[Level], Field(min_length=1, max_length=MAX_LEVELS)] | None,
    _said_as(f"a number in [0, 1], a list of 1 to {MAX_LEVELS} of them, or null"),
]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    noise_levels: Levels = Field(
        None,
        description="One level, or several as one ensemble: 0 is clean, 1 pure noise. Null: the model's.",
    )
    model: str | None = Field(None, description="Which of the server's models; null: its first.")


class ImagesRequest(_Request):
    """Pictures to be scored for prompts, pair by pair; one prompt serves all pictures."""

    prompts: Annotated[str | list[str], _said_as("a text, or a list of texts")] = Field(
        examples=["a red circle on a gray background"]
    )
    images: Annotated[list[str], Field(min_length=1)] = Field(
        description="Base64, or data URLs, of PNG, JPEG, WebP, GIF or BMP files."
    )
    seed: Annotated[
        Seed | list[Seed], _said_as("a whole number of 64 bits, or a list of them, one for each picture")
    ] = Field(0, description="Of the noise; one for all, or one for each picture.")
    num_draws: Annotated[
        Annotated[int, Field(ge=1, le=MAX_DRAWS, strict=True)],
        _said_as(f"a whole number in [1, {MAX_DRAWS}]"),
    ] = Field(1, description=f"Noise draws, at most {MAX_DRAWS}; more than one give an error.")


class CompareRequest(_Request):
    """Two pictures to be compared for a prompt."""

    prompt: str = Field(examples=["a red circle on a gray background"])
    image_a: str = Field(description="Base64, or a data URL.")
    image_b: str
    seed: Seed = 0


class LatentScores(BaseModel):
    """Reply of the latent protocol."""

    protocol_version: str
    raw_scores: list[float]


class ImageScores(BaseModel):
    """Scores have no unit: compare those of one prompt, from one model, at the same noise levels."""

    scores: list[float]
    standard_errors: list[float] | None
    noise_levels: list[float]
    notes: list[str] = Field(description="What the text encoders did not see of the prompts.")
    model: str


class CompareReply(BaseModel):
    """Probability that picture A is preferred."""

    probability: float
    scores: tuple[float, float]
    noise_levels: list[float]
    notes: list[str]
    model: str


class ErrorReply(BaseModel):
    """Any answer but 200."""

    error: str
    field: str | None = None
    request_id: str | None = None


class Status(BaseModel):
    """State of the server."""

    status: str
    model: str
    queued: int = Field(description="Rows that were taken and are not answered yet.")


class ModelInfo(BaseModel):
    """A reward that the server has."""

    name: str
    base: str | None = Field(description="The generator whose backbone is read.")
    digest: str = Field(
        description="SHA-256 of the checkpoint's weights, shortened; none for two different ones."
    )
    training_step: int | None
    noise_levels: list[float] = Field(description="Where a request names none.")
    family: str
    latent_channels: int
    max_latent_side: int | None
    takes_pictures: bool
    takes_prompts: bool


class ModelList(BaseModel):
    """What there is, and what a request may cost."""

    version: str = Field(description="Of dina-lrm.")
    models: list[ModelInfo]
    limits: dict[str, float | int] = Field(description="Settings of the server, by name.")


RequestT = TypeVar("RequestT", bound=BaseModel)


def parsed(kind: type[RequestT], content: Any) -> RequestT:
    """A request from what its JSON held.

    Raises:
        RequestError: 422 with the first field that is wrong.
    """
    if not isinstance(content, dict):
        raise RequestError("body: it must be a JSON object", field="body", status=422)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part)[:MAX_SHOWN] for part in first["loc"]) or "body"
        raise RequestError(f"{field}: {first['msg']}", field=field, status=422) from error


def json_of(text: bytes, field: str) -> Any:
    """What a JSON text says.

    Raises:
        RequestError: 400; it is none, says NaN, or says something twice.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{field}: not JSON ({error})", field=field) from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:MAX_SHOWN]!r} is said twice")
        found[name] = value
    return found


def form_fields(form: FormData, single: Sequence[str], several: Sequence[str]) -> dict[str, list[UploadFile]]:
    """Uploaded files of a form by field.

    Raises:
        RequestError: 422; an unknown field, or one that is missing or given too often.
    """
    found: dict[str, list[UploadFile]] = {name: [] for name in (*single, *several)}
    for name, value in form.multi_items():
        if name == "request":
            continue
        if name not in found:
            raise RequestError(
                f"{name[:MAX_SHOWN]!r}: unknown; a form has request, {', '.join(found)}",
                field=name[:MAX_SHOWN],
                status=422,
            )
        if not isinstance(value, UploadFile):
            raise RequestError(f"{name}: it must be a file", field=name, status=422)
        found[name].append(value)
    for name, values in found.items():
        if not values or (name in single and len(values) > 1):
            raise RequestError(f"{name}: {len(values)} files, expected one", field=name, status=422)
    return found


def decoded(text: str, field: str) -> bytes:
    """The bytes of a file in base64, or in a data URL.

    Raises:
        RequestError: 422; not base64.
    """
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RequestError(f"{field}: a data URL has to be in base64", field=field, status=422)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{field}: not base64 ({error})", field=field, status=422) from error


def paired(
    prompts: str | Sequence[str], seed: int | Sequence[int], count: int, max_prompt_length: int
) -> tuple[list[str], list[int]]:
    """A prompt and a seed for each of `count` pictures.

    Raises:
        RequestError: 422; other numbers of them, an empty prompt, or one that is too long.
    """
    own = [prompts] if isinstance(prompts, str) else list(prompts)
    if len(own) not in (1, count):
        raise RequestError(
            f"prompts: {len(own)} for {count} images; give one, or one each", field="prompts", status=422
        )
    for index, prompt in enumerate(own):
        check_prompt(prompt, f"prompts.{index}" if len(own) > 1 else "prompts", max_prompt_length)
    seeds = [seed] * count if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise RequestError(
            f"seed: {len(seeds)} for {count} images; give one, or one each", field="seed", status=422
        )
    return own * (count // len(own)), seeds


def check_prompt(prompt: str, name: str, max_length: int) -> None:
    """Not empty, not too long, and text."""
    if not prompt.strip():
        raise RequestError(f"{name}: empty", field=name, status=422)
    if len(prompt) > max_length:
        raise RequestError(f"{name}: {len(prompt)} characters, at most {max_length}", field=name, status=422)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name}: not text ({error.reason})", field=name, status=422) from error


def levels_of(requested: float | Sequence[float] | None, default: Sequence[float]) -> tuple[float, ...]:
    """Noise levels as a tuple: more than one is an ensemble."""
    if requested is None:
        return tuple(default)
    return (float(requested),) if isinstance(requested, int | float) else tuple(requested)
