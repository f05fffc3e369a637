"""The page of the reward server: score, compare, rank and generate pictures in a browser.

    page = build_page(model, run=run, pipeline=pipeline)
    mount_page(app, page)                                   # last: it answers for "/" and all below

All work on the model goes through `run`, one short piece after another, so that others get in between.
Nothing is loaded from another host; what may be asked of Gradio stands in `page_routes`.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
import numpy as np
from fastapi import FastAPI
from PIL import Image
from torch import Tensor

from dina_lrm.errors import InvalidInputError
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.models.scoring import preference_probability
from dina_lrm.sampling.policy import Policy
from dina_lrm.sampling.stepwise import MAX_GUIDANCE, MAX_STEPS, Executor, check_settings, sample_stepwise
from dina_lrm.serving.page_model import LEVELS, PageModel, mean_score, pil_picture, places
from dina_lrm.serving.page_parts import (
    CAPTIONS,
    FILE_TYPES,
    MAX_FILE_BYTES,
    answer,
    example_buttons,
    example_files,
    path_of,
    picture_box,
    prompt_box,
    rendered,
    waiting,
)
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
from dina_lrm.shapes.render import blur

__all__ = ["MAX_PICTURES", "build_page", "mount_page"]


MAX_PICTURES = 64
"""Pictures of one ranking."""
MAX_WAITING = 64
"""Visitors' requests that wait at once."""
KEPT_SECONDS = 3600
"""How long uploads lie on the server's disk."""
STRIP_LENGTH = 8
"""Pictures shown on the way to a sample."""


T = TypeVar("T")


def one_at_a_time() -> Executor:
    """`run` for a page with the model to itself: each job in its visitor's thread, under one lock."""
    lock = threading.Lock()

    def run(job: Callable[[], T], /) -> T:
        with lock:
            return job()

    return run


def build_page(
    model: RewardModel,
    *,
    run: Executor | None = None,
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
        pipeline: what the page generates with: a live pipeline of the reward's own latent space and a family
            that `Policy` knows, such as the bundled one. None: the page says that there is none.
        max_megapixels: of a picture, read before any pixel is.
        max_prompt_length: in characters.
    """
    page_model = PageModel(
        model=model,
        run=run or one_at_a_time(),
        max_megapixels=max_megapixels,
        max_prompt_length=max_prompt_length,
    )
    with PageBlocks(title=title, analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as page:
        gr.HTML(
            f'<header class="reward-head"><h1>{escape(title)}</h1><p>How well would people like a picture '
            f"for a prompt? Read from noisy latents at {levels_text(page_model.model_levels)}. A score "
            "has no unit and no zero: compare pictures for the same prompt.</p></header>"
        )
        with gr.Tab("Compare"):  # the first: a probability says something by itself, a score does not
            _compare_tab(page_model)
        with gr.Tab("Rank"):
            _rank_tab(page_model)
        with gr.Tab("Score"):
            _score_tab(page_model)
        with gr.Tab("Generate"):
            if pipeline is None:
                gr.HTML("<p>This server has no generator: it scores pictures that you bring.</p>")
            else:
                _generate_tab(page_model, Policy(pipeline))
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


def _score_tab(page_model: PageModel) -> None:
    with gr.Row():
        with gr.Column():
            picture = picture_box("Picture", 280)
            prompt = prompt_box(page_model)
            button = gr.Button("Score", variant="primary")
        with gr.Column():
            result = gr.HTML(waiting("The score, and what it is at every noise level, comes here."))
    examples = example_buttons(
        [(caption, (rendered(caption), caption)) for caption in CAPTIONS]
        + [("a picture that does not fit", (rendered(CAPTIONS[1]), CAPTIONS[0]))]
    )

    def score(upload: Any, text: Any) -> Iterator[str]:
        pixels, notes = page_model.open(path_of(upload), "Picture")
        encoded = page_model.prompt(text)
        notes += encoded.notes
        latents = page_model.latents(pixels, "Picture")
        total = mean_score(page_model.draws(latents, encoded, page_model.model_levels))
        yield score_view(total, page_model.model_levels, None, notes)
        scores = [mean_score(page_model.draws(latents, encoded, (level,))) for level in LEVELS]
        yield score_view(total, page_model.model_levels, LevelScores(LEVELS, scores), notes)

    answer(score, button, prompt, examples, inputs=[picture, prompt], outputs=[result])


def _compare_tab(page_model: PageModel) -> None:
    first, second, third = CAPTIONS
    rng = np.random.default_rng(0)
    with gr.Row():
        with gr.Column():
            with gr.Row():
                picture_a = picture_box("Picture A", 220, 120)
                picture_b = picture_box("Picture B", 220, 120)
            prompt = prompt_box(page_model)
            button = gr.Button("Compare", variant="primary")
        with gr.Column():
            result = gr.HTML(waiting("The probability that A is preferred comes here."))
    examples = example_buttons(
        [
            ("sharp or blurred", (rendered(first), blur(rendered(first), 0.6, rng), first)),
            (
                "above or below",
                (
                    rendered(second),
                    rendered("a yellow triangle above a big blue square on a white background"),
                    second,
                ),
            ),
            ("two that fit", (rendered(third), rendered(third, seed=1), third)),
        ]
    )

    def compare(upload_a: Any, upload_b: Any, text: Any) -> Iterator[str]:
        levels, model = page_model.model_levels, page_model.model
        names = ("Picture A", "Picture B")
        uploads = (upload_a, upload_b)
        pictures = [
            page_model.open(path_of(upload), name) for upload, name in zip(uploads, names, strict=True)
        ]
        encoded = page_model.prompt(text)
        notes = [note for _, of_picture in pictures for note in of_picture] + encoded.notes
        latents = [page_model.latents(one, name) for (one, _), name in zip(pictures, names, strict=True)]

        def draws(at: Sequence[float]) -> list[Tensor]:
            return [page_model.draws(latent, encoded, at) for latent in latents]

        score_a, score_b = (mean_score(draw) for draw in draws(levels))
        probability = preference_probability(score_a.value - score_b.value, levels, model.config)
        yield comparison_view(probability, (score_a, score_b), levels, None, notes)
        leads = [mean_score(a - b) for a, b in (draws((level,)) for level in LEVELS)]
        yield comparison_view(probability, (score_a, score_b), levels, LevelScores(LEVELS, leads), notes)

    answer(compare, button, prompt, examples, inputs=[picture_a, picture_b, prompt], outputs=[result])


def _rank_tab(page_model: PageModel) -> None:
    with gr.Row():
        with gr.Column():
            files = gr.File(
                label=f"Pictures, 2 to {MAX_PICTURES}",
                file_count="multiple",
                file_types=FILE_TYPES,
                height=220,
                elem_classes="reward-files",
            )
            prompt = prompt_box(page_model)
            button = gr.Button("Rank", variant="primary")
        with gr.Column():
            status = gr.HTML(waiting("The pictures come here, best first."))
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
    examples = example_buttons([("four pictures", (lambda: example_files(files), CAPTIONS[0]))])

    def rank(uploads: Any, text: Any) -> Iterator[tuple[Any, Any, Any]]:
        paths = [path for path in map(path_of, uploads or []) if path is not None]
        if not 2 <= len(paths) <= MAX_PICTURES:
            raise InvalidInputError(f"Pictures: {len(paths)} given, 2 to {MAX_PICTURES} can be ranked")
        encoded = page_model.prompt(text)
        notes = list(encoded.notes)
        found: list[tuple[Tensor, str, Image.Image]] = []
        for path in paths:
            name = Path(path).name
            picture, of_picture = page_model.open(path, name)
            notes += of_picture
            latents = page_model.latents(picture, name)
            draws = page_model.draws(latents, encoded, page_model.model_levels)
            found.append((draws, name, pil_picture(picture, max_side=512)))
            yield waiting(f"{len(found)} of {len(paths)} scored."), gr.skip(), gr.skip()
        found.sort(key=lambda one: -one[0].mean().item())
        ranking = [
            Ranked(name, mean_score(draws), place)
            for (draws, name, _), place in zip(found, places([one[0] for one in found]), strict=True)
        ]
        shown = [
            (picture, f"{place}: {number(one.score.value)}")
            for (*_, picture), place, one in zip(found, place_names(ranking), ranking, strict=True)
        ]
        yield (
            waiting(f"{len(found)} pictures, best first:"),
            gr.update(value=shown, visible=True),
            ranking_view(ranking, page_model.model_levels, notes),
        )

    answer(
        rank,
        button,
        prompt,
        examples,
        inputs=[files, prompt],
        outputs=[status, gallery, table],
        cleared=(gr.update(visible=False), ""),
    )


def _generate_tab(page_model: PageModel, policy: Policy) -> None:
    with gr.Row():
        with gr.Column():
            prompt = prompt_box(page_model, CAPTIONS[0])
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
            status = gr.HTML(waiting("The picture and its reward on the way come here."))
            chart = gr.HTML()
    examples = example_buttons([(caption, (caption,)) for caption in CAPTIONS])

    def generate(
        text: str | None, seed: float, steps: float, guidance: float
    ) -> Iterator[tuple[Any, Any, Any]]:
        seed, steps = check_settings(seed, steps, guidance)
        encoded = page_model.prompt(text)
        shown = set(np.linspace(0, steps - 1, min(STRIP_LENGTH, steps)).round().astype(int).tolist())
        sigmas: list[float] = []
        of_states: list[float] = []
        of_pictures: list[float] = []
        strip: list[Strip] = []
        latents = None
        for state in sample_stepwise(
            policy,
            encoded.text,
            seed=seed,
            num_steps=steps,
            guidance_scale=guidance,
            run=page_model.run,
        ):
            latents = state.clean
            sigmas.append(state.sigma)
            of_states.append(page_model.state(state, encoded))
            of_pictures.append(page_model.draws(latents, encoded, page_model.model_levels, 1).item())
            if state.step in shown:
                strip.append(Strip(state.step + 1, state.sigma, page_model.decoded(latents)))
                yield (
                    waiting(f"Step {state.step + 1} of {steps}."),
                    gr.update(visible=False),
                    sampling_view(
                        sigmas,
                        of_states,
                        of_pictures,
                        page_model.model_levels,
                        strip,
                        encoded.notes,
                        num_steps=steps,
                    ),
                )
        assert latents is not None
        total = mean_score(page_model.draws(latents, encoded, page_model.model_levels))
        yield (
            headline(total, page_model.model_levels),
            gr.update(value=strip[-1].picture, visible=True),
            gr.skip(),
        )

    events = answer(
        generate,
        button,
        prompt,
        examples,
        inputs=[prompt, seed, steps, guidance],
        outputs=[status, final, chart],
        cleared=(gr.update(visible=False), ""),
        uploads=False,
    )
    stop.click(lambda: waiting("Stopped."), None, status, cancels=events, api_visibility="private")


# --- pieces of the page ------------------------------------------------------------------------------------
