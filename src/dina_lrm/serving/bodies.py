"""Bodies of requests: bytes of tensors, and pictures in JSON or in a form."""

from collections.abc import Sequence
from typing import Any, TypeVar

from anyio import to_thread
from fastapi import Request
from pydantic import BaseModel
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from dina_lrm.serving.schemas import RequestError, decoded, form_fields, json_of, parsed

__all__ = ["check_content_type", "form_schema", "read_body", "read_json", "read_pictures"]

LARGE_BYTES = 2**18
"""Bodies above are taken apart in a thread, so that others are answered meanwhile."""

RequestT = TypeVar("RequestT", bound=BaseModel)


def check_content_type(request: Request, allowed: Sequence[str]) -> str:
    """The content type of a request.

    Raises:
        RequestError: 415, another one.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in allowed:
        raise RequestError(
            f"content-type: {given[:80]!r}, expected {' or '.join(allowed)}", field="content-type", status=415
        )
    return given


async def read_body(request: Request) -> bytes:
    """The body; unlike that of `request.body()` nobody else keeps it."""
    parts = [part async for part in request.stream()]
    return b"".join(parts)


async def read_json(request: Request, kind: type[RequestT]) -> RequestT:
    """A request that is JSON.

    Raises:
        RequestError: it names the field that is wrong.
    """
    check_content_type(request, ("application/json",))
    return parsed(kind, json_of(await read_body(request), "body"))


async def read_pictures(
    request: Request, kind: type[RequestT], *, single: Sequence[str] = (), several: Sequence[str] = ()
) -> tuple[RequestT, dict[str, list[bytes]]]:
    """A request with pictures, and their bytes by field, from JSON or from a form.

    Raises:
        RequestError: it names the field that is wrong.
    """
    if check_content_type(request, ("application/json", "multipart/form-data")) == "application/json":
        body = await read_body(request)
        if len(body) > LARGE_BYTES:
            return await to_thread.run_sync(_from_json, body, kind, single, several)
        return _from_json(body, kind, single, several)
    try:
        async with request.form(max_files=10_000, max_fields=16) as form:
            return await _read_form(form, kind, single, several)
    except HTTPException as error:
        raise RequestError(f"body: {error.detail}", field="body") from error


def _from_json(
    body: bytes, kind: type[RequestT], single: Sequence[str], several: Sequence[str]
) -> tuple[RequestT, dict[str, list[bytes]]]:
    wanted = parsed(kind, json_of(body, "body"))
    texts = {name: getattr(wanted, name) for name in (*single, *several)}
    return wanted, {
        name: (
            [decoded(value, name)]
            if isinstance(value, str)
            else [decoded(one, f"{name}.{index}") for index, one in enumerate(value)]
        )
        for name, value in texts.items()
    }


async def _read_form(
    form: FormData, kind: type[RequestT], single: Sequence[str], several: Sequence[str]
) -> tuple[RequestT, dict[str, list[bytes]]]:
    texts = form.getlist("request")
    if len(texts) != 1 or not isinstance(text := texts[0], str):
        raise RequestError("request: a form has it once, as a JSON text", field="request", status=422)
    content = json_of(text.encode(errors="surrogatepass"), "request")
    uploads = form_fields(form, single, several)
    if not isinstance(content, dict):
        raise RequestError("request: it must be a JSON object", field="request", status=422)
    if twice := [name for name in (*single, *several) if name in content]:
        raise RequestError(f"{twice[0]}: a form has it as a file", field=twice[0], status=422)
    stand_ins = {name: "" for name in single} | {name: [""] for name in several}
    wanted = parsed(kind, content | stand_ins)
    return wanted, {name: [await file.read() for file in files] for name, files in uploads.items()}


def form_schema(
    kind: type[BaseModel], *, single: Sequence[str] = (), several: str | None = None
) -> dict[str, Any]:
    """What OpenAPI says about a body that is JSON or a form."""
    file = {"type": "string", "format": "binary"}
    files: dict[str, Any] = {name: file for name in single}
    if several is not None:
        files[several] = {"type": "array", "items": file, "minItems": 1}
    form = {
        "type": "object",
        "required": ["request", *files],
        "properties": {"request": {"type": "string", "contentMediaType": "application/json"}, **files},
    }
    schema = kind.model_json_schema()
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}},
        }
    }
