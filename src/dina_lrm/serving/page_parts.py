"""Parts that the tabs of the page share."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

import gradio as gr
import numpy as np
from gradio.processing_utils import save_pil_to_cache
from PIL import Image

from dina_lrm.errors import DinaError
from dina_lrm.serving.page_model import PageModel
from dina_lrm.shapes.render import blur, render
from dina_lrm.shapes.scenes import parse_caption, sample_scene

log = logging.getLogger("dina_lrm.serving")

CAPTIONS = (
    "a red circle on a gray background",
    "a big blue square above a yellow triangle on a white background",
    "a green cross to the left of a purple circle on a black background",
)

MAX_FILE_BYTES = 32 * 2**20
"""Bytes of one upload."""
FILE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"]
Handler = Callable[..., Iterator[Any]]


def picture_box(label: str, height: int, min_width: int = 160) -> gr.Image:
    return gr.Image(
        label=label,
        height=height,
        min_width=min_width,
        type="filepath",
        format="png",
        sources=["upload", "clipboard"],
        buttons=["fullscreen"],
        elem_classes="reward-picture",
        alt_text=label,
    )


def path_of(upload: Any) -> str | None:
    """Where an upload lies on the server's disk."""
    return None if upload is None else upload.get("path")


def prompt_box(page_model: PageModel, value: str | None = None) -> gr.Textbox:
    return gr.Textbox(
        value,
        label="Prompt",
        placeholder="What the picture should show",
        lines=1,
        max_lines=4,
        max_length=page_model.max_prompt_length,
    )


def example_buttons(examples: Sequence[tuple[str, Sequence[Any]]]) -> list[tuple[gr.Button, Sequence[Any]]]:
    """Buttons that fill in the inputs of a tab; a function among the values is called for its value."""
    with gr.Row(elem_classes="reward-examples"):
        gr.HTML('<p class="reward-muted">Try an example:</p>', min_width=120)
        return [(gr.Button(label, size="sm", min_width=120), values) for label, values in examples]


def answer(
    handler: Handler,
    button: gr.Button,
    prompt: gr.Textbox,
    examples: Sequence[tuple[gr.Button, Sequence[Any]]],
    *,
    inputs: list[Any],
    outputs: list[Any],
    cleared: Sequence[Any] = (),
    uploads: bool = True,
) -> list[Any]:
    """The handler answers the button, Enter in the prompt, and each example once that is filled in.

    Args:
        outputs: the first is markup.
        cleared: see `_told`.
        uploads: the inputs come as Gradio received them, files as {"path": ...} in its folder of uploads;
            Gradio itself would open pictures of any size.

    Returns:
        The events, to be cancelled.
    """
    options: dict[str, Any] = {
        "fn": _told(handler, cleared),
        "inputs": inputs,
        "outputs": outputs,
        "preprocess": not uploads,
        "api_visibility": "private",
        "concurrency_id": handler.__name__,
        "show_progress": "minimal",
    }
    events = [gr.on([button.click, prompt.submit], **options)]
    for example, values in examples:
        filled = example.click(
            functools.partial(_values, values),
            None,
            inputs[: len(values)],
            api_visibility="private",
            show_progress="hidden",
        )
        events += [filled, filled.success(**options)]
    return events


def _values(values: Sequence[Any]) -> Any:
    found = [value() if callable(value) else value for value in values]
    return found if len(found) > 1 else found[0]


def _told(handler: Handler, cleared: Sequence[Any]) -> Handler:
    """The handler, with its errors told to the visitor: what was wrong with the input, or that it is a fault
    of the server, which the log explains. They come in place of the result, and as a passing message that is
    seen wherever the page is scrolled to.

    Args:
        cleared: what the outputs after the first become then.
    """

    @functools.wraps(handler)
    def told(*values: Any) -> Iterator[Any]:
        try:
            yield from handler(*values)
            return
        except DinaError as error:
            text = escape(str(error))
        except Exception:
            log.exception("the page failed")
            text = "A fault of the server; its log tells more."
        gr.Warning(text, duration=20)
        alert = f'<p class="reward-alert" role="alert">{text}</p>'
        yield (alert, *cleared) if cleared else alert

    return told


def waiting(text: str) -> str:
    return f'<p class="reward-muted" role="status">{text}</p>'


def rendered(caption: str, seed: int = 0) -> Image.Image:
    """A picture that fits a caption of the shapes grammar."""
    return render(sample_scene(np.random.default_rng(seed), parse_caption(caption)))


def example_files(files: gr.File) -> list[str]:
    """Files of four pictures, two of which fit the first caption."""
    rng = np.random.default_rng(0)
    pictures = {
        "fits": rendered(CAPTIONS[0]),
        "blurred": blur(rendered(CAPTIONS[0], seed=1), 0.6, rng),
        "triangle": rendered("a red triangle on a gray background"),
        "blue": rendered("a blue circle on a white background"),
    }
    return [
        save_pil_to_cache(picture, cache_dir=files.GRADIO_CACHE, name=name, format="png")
        for name, picture in pictures.items()
    ]
