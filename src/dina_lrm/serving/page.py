"""The page of the reward server: score, compare, rank and generate pictures in a browser.

    page = build_page(model, run=run, pipeline=pipeline)
    mount_page(app, page)                                   # last: it answers for "/" and all below

All work on the model goes through `run`, one short piece after another, so that others get in between.
Nothing is loaded from another host; what may be asked of Gradio stands in `page_routes`.
"""

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
import numpy as np
from fastapi import FastAPI
from gradio.processing_utils import save_pil_to_cache
from PIL import Image
from torch import Tensor

from dina_lrm.errors import DinaError, InvalidInputError
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.models.scoring import preference_probability
from dina_lrm.sampling.stepwise import MAX_GUIDANCE, MAX_STEPS, Run, check_settings, sample_stepwise
from dina_lrm.serving.measuring import LEVELS, Measurer, measured, pil_picture, places
from dina_lrm.serving.page_routes import PageBlocks, PageRoutes
from dina_lrm.serving.views import (
    LevelScores,
    Ranked,
    Strip,
    comparison_view,
    headline,
    levels_text,
    number,
    place_names,
    ranking_view,
    sampling_view,
    score_view,
)
from dina_lrm.shapes.pipeline import GUIDANCE_SCALE, NUM_INFERENCE_STEPS
from dina_lrm.shapes.render import blur, render
from dina_lrm.shapes.scenes import parse_caption, sample_scene

__all__ = ["MAX_PICTURES", "build_page", "mount_page"]

log = logging.getLogger("dina_lrm.serving")

MAX_PICTURES = 64
"""Of one ranking."""
MAX_FILE_BYTES = 32 * 2**20
"""Of one upload."""
MAX_WAITING = 64
"""Visitors' requests that wait at once."""
KEPT_SECONDS = 3600
"""How long uploads lie on the server's disk."""
STRIP_LENGTH = 8
"""Pictures shown on the way to a sample."""
FILE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"]

CAPTIONS = (
    "a red circle on a gray background",
    "a big blue square above a yellow triangle on a white background",
    "a green cross to the left of a purple circle on a black background",
)

T = TypeVar("T")
Handler = Callable[..., Iterator[Any]]


def one_at_a_time() -> Run:
    """`run` for a page with the model to itself: each job in its visitor's thread, under one lock."""
    lock = threading.Lock()

    def run(job: Callable[[], T], /) -> T:
        with lock:
            return job()

    return run


def build_page(
    model: RewardModel,
    *,
    run: Run | None = None,
    pipeline: Any = None,
    title: str = "DiNa-LRM reward",
    max_megapixels: float = 16.0,
    max_prompt_length: int = 2000,
) -> gr.Blocks:
    """The page, to be given to `mount_page`.

    Args:
        model: a trained reward, with encoders for prompts and pictures.
        run: `run(job)` is `job()`, computed in the model's thread; ScoringError says that it is too busy.
            None: the page has the model to itself, and takes one job at a time.
        pipeline: what the page generates with: a `StableDiffusion3Pipeline` of the reward's own latent space,
            such as the bundled one. None: the page says that there is none.
        max_megapixels: of a picture, read before any pixel is.
        max_prompt_length: in characters.
    """
    measurer = Measurer(
        model=model,
        run=run or one_at_a_time(),
        max_megapixels=max_megapixels,
        max_prompt_length=max_prompt_length,
    )
    with PageBlocks(title=title, analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as page:
        gr.HTML(
            f'<header class="reward-head"><h1>{escape(title)}</h1><p>How well would people like a picture '
            f"for a prompt? Read from noisy latents at {levels_text(measurer.model_levels)}. A score "
            "has no unit and no zero: compare pictures for the same prompt.</p></header>"
        )
        with gr.Tab("Compare"):  # the first: a probability says something by itself, a score does not
            _compare_tab(measurer)
        with gr.Tab("Rank"):
            _rank_tab(measurer)
        with gr.Tab("Score"):
            _score_tab(measurer)
        with gr.Tab("Generate"):
            if pipeline is None:
                gr.HTML("<p>This server has no generator: it scores pictures that you bring.</p>")
            else:
                _generate_tab(measurer, pipeline)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=4, api_open=False)


def mount_page(app: FastAPI, page: gr.Blocks) -> None:
    """Let an app show the page at "/"; routes that the app has already go before it."""
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=MAX_FILE_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Base(
            primary_hue="blue",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ).set(
            body_text_color_subdued="*neutral_600",
            body_text_color_subdued_dark="*neutral_300",
            input_placeholder_color="*neutral_600",
            input_placeholder_color_dark="*neutral_300",
            link_text_color_dark="*primary_300",
            link_text_color_hover_dark="*primary_200",
            button_primary_background_fill="*primary_600",
            button_primary_background_fill_hover="*primary_700",
        ),
        # css= would be rewritten
        head=f"<style>{_beside('page.css')}</style><script>{_beside('page.js')}</script>",
    )
    mounted: Any = app.routes[-1]
    mounted.app.add_middleware(PageRoutes, blocks=page)


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


# --- the four tabs -----------------------------------------------------------------------------------------


def _score_tab(measurer: Measurer) -> None:
    with gr.Row():
        with gr.Column():
            picture = _picture_box("Picture", 280)
            prompt = _prompt_box(measurer)
            button = gr.Button("Score", variant="primary")
        with gr.Column():
            result = gr.HTML(_waiting("The score, and what it is at every noise level, comes here."))
    examples = _example_buttons(
        [(caption, (_rendered(caption), caption)) for caption in CAPTIONS]
        + [("a picture that does not fit", (_rendered(CAPTIONS[1]), CAPTIONS[0]))]
    )

    def score(upload: Any, text: Any) -> Iterator[str]:
        pixels, notes = measurer.open(_path(upload), "Picture")
        encoded = measurer.prompt(text)
        notes += encoded.notes
        latents = measurer.latents(pixels, "Picture")
        total = measured(measurer.draws(latents, encoded, measurer.model_levels))
        yield score_view(total, measurer.model_levels, None, notes)
        scores = [measured(measurer.draws(latents, encoded, (level,))) for level in LEVELS]
        yield score_view(total, measurer.model_levels, LevelScores(LEVELS, scores), notes)

    _answer(score, button, prompt, examples, inputs=[picture, prompt], outputs=[result])


def _compare_tab(measurer: Measurer) -> None:
    first, second, third = CAPTIONS
    rng = np.random.default_rng(0)
    with gr.Row():
        with gr.Column():
            with gr.Row():
                picture_a = _picture_box("Picture A", 220, 120)
                picture_b = _picture_box("Picture B", 220, 120)
            prompt = _prompt_box(measurer)
            button = gr.Button("Compare", variant="primary")
        with gr.Column():
            result = gr.HTML(_waiting("The probability that A is preferred comes here."))
    examples = _example_buttons(
        [
            ("sharp or blurred", (_rendered(first), blur(_rendered(first), 0.6, rng), first)),
            (
                "above or below",
                (
                    _rendered(second),
                    _rendered("a yellow triangle above a big blue square on a white background"),
                    second,
                ),
            ),
            ("two that fit", (_rendered(third), _rendered(third, seed=1), third)),
        ]
    )

    def compare(upload_a: Any, upload_b: Any, text: Any) -> Iterator[str]:
        levels, model = measurer.model_levels, measurer.model
        names = ("Picture A", "Picture B")
        uploads = (upload_a, upload_b)
        pictures = [measurer.open(_path(one), name) for one, name in zip(uploads, names, strict=True)]
        encoded = measurer.prompt(text)
        notes = [note for _, of_picture in pictures for note in of_picture] + encoded.notes
        latents = [measurer.latents(one, name) for (one, _), name in zip(pictures, names, strict=True)]

        def draws(at: Sequence[float]) -> list[Tensor]:
            return [measurer.draws(one, encoded, at) for one in latents]

        score_a, score_b = (measured(one) for one in draws(levels))
        probability = preference_probability(score_a.value - score_b.value, levels, model.config)
        yield comparison_view(probability, (score_a, score_b), levels, None, notes)
        leads = [measured(a - b) for a, b in (draws((level,)) for level in LEVELS)]
        yield comparison_view(probability, (score_a, score_b), levels, LevelScores(LEVELS, leads), notes)

    _answer(compare, button, prompt, examples, inputs=[picture_a, picture_b, prompt], outputs=[result])


def _rank_tab(measurer: Measurer) -> None:
    with gr.Row():
        with gr.Column():
            files = gr.File(
                label=f"Pictures, 2 to {MAX_PICTURES}",
                file_count="multiple",
                file_types=FILE_TYPES,
                height=220,
                elem_classes="reward-files",
            )
            prompt = _prompt_box(measurer)
            button = gr.Button("Rank", variant="primary")
        with gr.Column():
            status = gr.HTML(_waiting("The pictures come here, best first."))
            gallery = gr.Gallery(
                label="Best first",
                columns=3,
                height="auto",
                object_fit="contain",
                format="png",
                interactive=False,
                buttons=["fullscreen"],
                show_label=False,
                elem_classes="reward-gallery",
                visible=False,
            )
            table = gr.HTML()
    examples = _example_buttons([("four pictures", (lambda: _example_files(files), CAPTIONS[0]))])

    def rank(uploads: Any, text: Any) -> Iterator[tuple[Any, Any, Any]]:
        paths = [path for path in map(_path, uploads or []) if path is not None]
        if not 2 <= len(paths) <= MAX_PICTURES:
            raise InvalidInputError(f"Pictures: {len(paths)} given, 2 to {MAX_PICTURES} can be ranked")
        encoded = measurer.prompt(text)
        notes = list(encoded.notes)
        found: list[tuple[Tensor, str, Image.Image]] = []
        for path in paths:
            name = Path(path).name
            picture, of_picture = measurer.open(path, name)
            notes += of_picture
            latents = measurer.latents(picture, name)
            draws = measurer.draws(latents, encoded, measurer.model_levels)
            found.append((draws, name, pil_picture(picture, max_side=512)))
            yield _waiting(f"{len(found)} of {len(paths)} scored."), gr.skip(), gr.skip()
        found.sort(key=lambda one: -one[0].mean().item())
        ranking = [
            Ranked(name, measured(draws), place)
            for (draws, name, _), place in zip(found, places([one[0] for one in found]), strict=True)
        ]
        shown = [
            (picture, f"{place}: {number(one.score.value)}")
            for (*_, picture), place, one in zip(found, place_names(ranking), ranking, strict=True)
        ]
        yield (
            _waiting(f"{len(found)} pictures, best first:"),
            gr.update(value=shown, visible=True),
            ranking_view(ranking, measurer.model_levels, notes),
        )

    _answer(
        rank,
        button,
        prompt,
        examples,
        inputs=[files, prompt],
        outputs=[status, gallery, table],
        cleared=(gr.update(visible=False), ""),
    )


def _generate_tab(measurer: Measurer, pipeline: Any) -> None:
    with gr.Row():
        with gr.Column():
            prompt = _prompt_box(measurer, CAPTIONS[0])
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, min_width=100)
                steps = gr.Slider(
                    1, MAX_STEPS, NUM_INFERENCE_STEPS, step=1, label="Steps", min_width=190, buttons=[]
                )
                guidance = gr.Slider(
                    1, MAX_GUIDANCE, GUIDANCE_SCALE, step=0.5, label="Guidance", min_width=190, buttons=[]
                )
            with gr.Row():
                button = gr.Button("Generate", variant="primary", min_width=120)
                stop = gr.Button("Stop", variant="stop", min_width=120)
            final = gr.Image(
                label="Picture",
                format="png",
                height=280,
                interactive=False,
                buttons=["download"],
                elem_classes="reward-picture",
                alt_text="Generated picture",
                visible=False,
            )
        with gr.Column():
            status = gr.HTML(_waiting("The picture and its reward on the way come here."))
            chart = gr.HTML()
    examples = _example_buttons([(caption, (caption,)) for caption in CAPTIONS])

    def generate(
        text: str | None, seed: float, steps: float, guidance: float
    ) -> Iterator[tuple[Any, Any, Any]]:
        seed, steps = check_settings(seed, steps, guidance)
        encoded = measurer.prompt(text)
        shown = set(np.linspace(0, steps - 1, min(STRIP_LENGTH, steps)).round().astype(int).tolist())
        sigmas: list[float] = []
        of_states: list[float] = []
        of_pictures: list[float] = []
        strip: list[Strip] = []
        latents = None
        for state in sample_stepwise(
            pipeline,
            encoded.text,
            seed=seed,
            num_steps=steps,
            guidance_scale=guidance,
            run=measurer.run,
        ):
            latents = state.clean
            sigmas.append(state.sigma)
            of_states.append(measurer.state(state, encoded))
            of_pictures.append(measurer.draws(latents, encoded, measurer.model_levels, 1).item())
            if state.step in shown:
                strip.append(Strip(state.step + 1, state.sigma, measurer.decoded(latents)))
                yield (
                    _waiting(f"Step {state.step + 1} of {steps}."),
                    gr.update(visible=False),
                    sampling_view(
                        sigmas,
                        of_states,
                        of_pictures,
                        measurer.model_levels,
                        strip,
                        encoded.notes,
                        num_steps=steps,
                    ),
                )
        assert latents is not None
        total = measured(measurer.draws(latents, encoded, measurer.model_levels))
        yield (
            headline(total, measurer.model_levels),
            gr.update(value=strip[-1].picture, visible=True),
            gr.skip(),
        )

    events = _answer(
        generate,
        button,
        prompt,
        examples,
        inputs=[prompt, seed, steps, guidance],
        outputs=[status, final, chart],
        cleared=(gr.update(visible=False), ""),
        uploads=False,
    )
    stop.click(lambda: _waiting("Stopped."), None, status, cancels=events, api_visibility="private")


# --- pieces of the page ------------------------------------------------------------------------------------


def _picture_box(label: str, height: int, min_width: int = 160) -> gr.Image:
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


def _path(upload: Any) -> str | None:
    """Where an upload lies on the server's disk."""
    return None if upload is None else upload.get("path")


def _prompt_box(measurer: Measurer, value: str | None = None) -> gr.Textbox:
    return gr.Textbox(
        value,
        label="Prompt",
        placeholder="What the picture should show",
        lines=1,
        max_lines=4,
        max_length=measurer.max_prompt_length,
    )


def _example_buttons(examples: Sequence[tuple[str, Sequence[Any]]]) -> list[tuple[gr.Button, Sequence[Any]]]:
    """Buttons that fill in the inputs of a tab; a function among the values is called for its value."""
    with gr.Row(elem_classes="reward-examples"):
        gr.HTML('<p class="reward-muted">Try an example:</p>', min_width=120)
        return [(gr.Button(label, size="sm", min_width=120), values) for label, values in examples]


def _answer(
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


def _waiting(text: str) -> str:
    return f'<p class="reward-muted" role="status">{text}</p>'


def _rendered(caption: str, seed: int = 0) -> Image.Image:
    """A picture that fits a caption of the shapes grammar."""
    return render(sample_scene(np.random.default_rng(seed), parse_caption(caption)))


def _example_files(files: gr.File) -> list[str]:
    """Files of four pictures, two of which fit the first caption."""
    rng = np.random.default_rng(0)
    pictures = {
        "fits": _rendered(CAPTIONS[0]),
        "blurred": blur(_rendered(CAPTIONS[0], seed=1), 0.6, rng),
        "triangle": _rendered("a red triangle on a gray background"),
        "blue": _rendered("a blue circle on a white background"),
    }
    return [
        save_pil_to_cache(picture, cache_dir=files.GRADIO_CACHE, name=name, format="png")
        for name, picture in pictures.items()
    ]
