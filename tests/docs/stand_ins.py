"""What pages set up in invisible blocks for a reader who has it: weights on the hub, pictures, data sets.

Each function makes one thing and declares it, so that the list at the end of a run is complete.
"""

import csv
import io
import json
import shutil
import sys
import tarfile
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.docs.page import current, declare

COMMIT = "0" * 40


# --- pictures and rows -------------------------------------------------------------------------------------


def picture(file: str, caption: str, *, blur: float = 0.0, seed: int = 0) -> None:
    """A picture of the reader's own: a drawing of the bundled world."""
    from dina_lrm.shapes import render, scenes

    scene = scenes.sample_scene(np.random.default_rng(seed), scenes.parse_caption(caption))
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    drawn = render.render(scene)
    (render.blur(drawn, blur, np.random.default_rng(0)) if blur else drawn).save(file)
    declare(f"the reader's {file}", f"a drawing of {caption}" + (", blurred" if blur else ""))


def rows(file: str, count: int = 6, *, columns: tuple[str, ...] = ("chosen", "rejected")) -> None:
    """Rows of the reader's in JSON lines or CSV: preferences, or one picture each."""
    made = []
    for index, (prompt, files) in enumerate(_drawings(Path(file).parent / "pictures", count)):
        pictures = [str(path.relative_to(Path(file).parent)) for path in files[:2]]
        order = pictures if len(columns) == 2 else pictures[index % 2 :]
        made.append({"prompt": prompt, **dict(zip(columns, order, strict=False))})
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="") as output:
        if file.endswith(".csv"):
            table = csv.DictWriter(output, fieldnames=("prompt", *columns))
            table.writeheader()
            table.writerows(made)
        else:
            output.writelines(json.dumps(row) + "\n" for row in made)
    declare(f"the reader's {file}", f"{count} rows of drawings")


def tar_shards(folder: str, count: int = 6) -> None:
    """Shards as WebDataset has them."""
    Path(folder).mkdir()
    drawn = list(_drawings(Path("pictures"), count))
    for number, part in enumerate((drawn[: count // 2], drawn[count // 2 :])):
        with tarfile.open(Path(folder) / f"{number:05d}.tar", "w") as tar:
            for index, (prompt, files) in enumerate(part):
                text = tarfile.TarInfo(f"{index:04d}.txt")
                text.size = len(prompt.encode())
                tar.addfile(text, io.BytesIO(prompt.encode()))
                tar.add(files[0], f"{index:04d}.png")
    declare(f"the reader's {folder}", f"two tar shards with {count} drawings")


def items(file: str, count: int = 6) -> None:
    """Pictures that have not been voted on yet."""
    lines = [
        json.dumps({"prompt": prompt, "images": [str(path) for path in files]}) + "\n"
        for prompt, files in _drawings(Path("pictures"), count)
    ]
    Path(file).write_text("".join(lines))
    declare(f"the reader's {file}", f"{count} prompts with three drawings each")


def raters(votes: int = 8) -> None:
    """Two people who vote on the page of this page's labelling server, for the picture that came first."""
    import uuid

    import httpx

    address = current().here("127.0.0.1:8080")
    with httpx.Client(base_url=f"http://{address}", trust_env=False) as client:
        for rater in ("Ada", "Grace"):
            task = client.get("/api/next", params={"rater": rater}).raise_for_status().json()
            for _ in range(votes):
                pair = task["pair"]
                vote = {
                    "items": task["items"],
                    "id": uuid.uuid4().hex,
                    "rater": rater,
                    "pair": pair["index"],
                    "left": pair["left"],
                    "choice": "left" if pair["left"] < pair["right"] else "right",
                    "seconds": 1.0,
                }
                answer = client.post("/api/votes", json=vote, headers={"origin": f"http://{address}"})
                task = answer.raise_for_status().json()
    declare("people who vote", f"two raters, {votes} votes each, sent as the labelling page sends them")


def prepared(folder: str, pipeline: str) -> None:
    """A folder of `dina-lrm prepare`."""
    from dina_lrm.cli.main import main

    rows(f"{folder}-rows/rows.jsonl", 24)
    source = f"{current().folder}/{folder}-rows/rows.jsonl"
    assert main(["prepare", "jsonl", "--root", source, "--pipeline", pipeline, "--output", folder]) == 0
    declare(f"the reader's prepared pairs {folder}", "those rows, prepared")


def save_block(file: str) -> None:
    """The block above, in a file, as the page asks for."""
    Path(file).write_text(current().block)


def prompts(file: str, count: int) -> None:
    """A file of prompts, one a line."""
    from dina_lrm.shapes.scenes import sample_caption

    rng = np.random.default_rng(0)
    found: dict[str, None] = {}
    while len(found) < count:
        found[sample_caption(rng).caption] = None
    Path(file).write_text("\n".join(found) + "\n")
    declare(f"the reader's {file}", f"{count} captions of the bundled world")


def _drawings(folder: Path, count: int) -> Iterator[tuple[str, list[Path]]]:
    """A caption, with pictures that show it, something else, and it again, blurred."""
    from dina_lrm.shapes import render, scenes

    rng = np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        spec = scenes.sample_caption(rng, num_objects=1)
        right = render.render(scenes.sample_scene(rng, spec))
        wrong = render.render(scenes.sample_scene(rng, scenes.change_attribute(rng, spec)))
        files = [folder / f"{index}-{name}.png" for name in ("right", "wrong", "blurred")]
        for drawn, file in zip((right, wrong, render.blur(right, 1.0, rng)), files, strict=True):
            drawn.save(file)
        yield spec.caption, files


# --- public data sets, in the layout in which they are published -------------------------------------------


def data_set(name: str, root: str, count: int = 6) -> None:
    """A tiny data set of drawings."""
    folder = Path(root)
    drawn = list(_drawings(folder / _PICTURES[name], count))
    for split in _SPLITS[name]:
        content = [_ROWS[name](prompt, files, folder, split) for prompt, files in drawn]
        if name == "pickapic":
            import pyarrow
            import pyarrow.parquet

            file = folder / "data" / f"{split}-00000-of-00001.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), file)
        else:
            (folder / f"{split}.json").write_text(json.dumps(content))
    declare(f"the data set {name} at {root}", f"{count} rows of drawings in its layout")


def hub_data_set(name: str, repository: str) -> None:
    """The same, where `datasets` looks for a data set of the hub."""
    import datasets

    folder = current().folder / f"hub-{name}"
    data_set(name, str(folder))
    load = datasets.load_dataset

    def load_dataset(path: str, *args: Any, split: str, streaming: bool) -> Any:
        if path != repository:
            return load(path, *args, split=split, streaming=streaming)
        files = {split: [str(file) for file in folder.glob(f"data/{split}-*.parquet")]}
        return load("parquet", data_files=files, split=split, streaming=streaming)

    current().patch.setattr(datasets, "load_dataset", load_dataset)
    declare(f"{repository} on the hub, streamed", "those rows, read from a file")


def _hpdv3(prompt: str, files: list[Path], root: Path, split: str) -> dict[str, Any]:
    first, second, _ = (str(file.relative_to(root)) for file in files)
    return {"prompt": prompt, "path1": first, "path2": second, "choice_dist": [9, 3], "confidence": 0.97}


def _hpdv2(prompt: str, files: list[Path], root: Path, split: str) -> dict[str, Any]:
    names = [file.name for file in files]
    if split == "train":
        for file in files[:2]:
            (root / "train").mkdir(exist_ok=True)
            shutil.copy(file, root / "train")
        return {"prompt": prompt, "file_path": names[:2], "human_preference": [1, 0]}
    return {"prompt": prompt, "image_path": names, "rank": [1, 3, 2]}


def _imagereward(prompt: str, files: list[Path], root: Path, split: str) -> dict[str, Any]:
    names = [str(file.relative_to(root)) for file in files]
    return {"id": files[0].stem, "prompt": prompt, "generations": names, "ranking": [1, 2, 2]}


def _pickapic(prompt: str, files: list[Path], root: Path, split: str) -> dict[str, Any]:
    sides = {f"jpg_{side}": files[side].read_bytes() for side in (0, 1)}
    return {"caption": prompt, **sides, "label_0": 1.0, "label_1": 0.0, "has_label": True}


_ROWS: dict[str, Callable[[str, list[Path], Path, str], dict[str, Any]]] = {
    "hpdv3": _hpdv3,
    "hpdv2": _hpdv2,
    "imagereward": _imagereward,
    "pickapic": _pickapic,
}
_PICTURES = {"hpdv3": "images", "hpdv2": "test", "imagereward": "rm_images", "pickapic": "drawn"}
_SPLITS = {"hpdv3": ("test", "train"), "hpdv2": ("test", "train"), "imagereward": ("test",)} | {
    "pickapic": ("test_unique",)
}


# --- weights -----------------------------------------------------------------------------------------------


def hub_pipeline(name: str, family: str, num_layers: int | None = None) -> None:
    """A generator on the hub: a tiny random pipeline of the same classes in the hub's local cache."""
    _hub_folder(name, _make_pipeline, family, num_layers)
    blocks = "" if num_layers is None else f" of {num_layers} blocks"
    declare(f"{name} on the hub", f"a tiny random pipeline{blocks} of the same classes")


def reward(folder: str, base: str = "bundled", **settings: Any) -> None:
    """A reward that the reader has trained: the bundled one, or a random one over a stand-in."""
    if base == "bundled":
        from dina_lrm.pipelines.source import bundled_folder

        shutil.copytree(bundled_folder("reward"), folder)
        declare(f"the reader's reward {folder}", "a copy of the bundled reward")
        return
    from tests.families import make_family_reward

    make_family_reward(base, **settings).save_pretrained(folder)
    declare(f"the reader's reward {folder}", f"a tiny random one over the stand-in of {base}")


def hub_reward(name: str, base: str) -> None:
    """A reward on the hub, in the published layout."""

    def make(folder: Path) -> None:
        from tests.families import make_family_reward

        taps = {"image_taps": (4, 8, 12), "text_taps": (4, 8, 12)}
        make_family_reward(base, num_blocks=12, **taps).save_pretrained(folder, layout="published")

    _hub_folder(name, make)
    declare(f"{name} on the hub", f"a tiny random reward over the stand-in of {base}, in the same layout")


def hub() -> None:
    """A hub on which the reader has an account."""
    from contextlib import ExitStack

    from tests.fake_hub import fake_hub, use_hub

    running, page = ExitStack(), current()
    address = running.enter_context(fake_hub()).url
    page.closing.append(running.close)
    use_hub(page.patch, address, page.folder / "hub-cache")
    page.patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    declare("the Hugging Face hub, logged in", "a local server with the part of its HTTP API that is used")


def clip_scorer(name: str) -> None:
    """CLIP, PickScore and the like on the hub: a tiny random CLIP."""

    def make(folder: Path) -> None:
        from tests.unit.evaluation.baselines.scorers import save_clip_processor, tiny_clip

        tiny_clip().save_pretrained(folder)
        save_clip_processor(folder)

    _hub_folder(name, make)
    declare(f"{name} on the hub", "a tiny random CLIP")


def _make_pipeline(folder: Path, family: str, num_layers: int | None) -> None:
    from tests.families import make_family
    from tests.tiny import make_tiny_pipeline

    if family == "sd3":  # for the sizes of pictures that people have
        layers = {} if num_layers is None else {"num_layers": num_layers}
        make_tiny_pipeline(folder, vae_depth=4, pos_embed_max_size=192, **layers)
        return
    make_family(family, folder, num_layers=num_layers)


@cache
def _hub_folder(name: str, make: Callable[..., None], *settings: Any) -> Path:
    """Where the hub's client looks for a repository that it has downloaded."""
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    if not snapshot.exists():
        snapshot.mkdir(parents=True)
        make(snapshot, *settings)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


# --- time --------------------------------------------------------------------------------------------------


def short_training(num_steps: int = 2) -> None:
    """Every recipe of `dina-lrm train` for a few steps, on few prompts, of small batches."""
    from dina_lrm.recipes import training as recipes

    full = recipes.recipe

    def recipe(name: str) -> Any:
        config = full(name)
        return replace(
            config,
            data=replace(config.data, train_prompts=4, validation_prompts=4),
            validation=replace(config.validation, every=num_steps, max_pairs=8),
            num_steps=num_steps,
            batch_size=4,
            accumulation_steps=1,
            precision="float32",  # bfloat16 is slow on most CPUs
        )

    current().patch.setattr(recipes, "recipe", recipe)
    declare("training recipes at full length", f"{num_steps} steps of 4 pairs")


def short_alignment() -> None:
    """Every recipe of `dina-lrm align` for one update of few and small pictures in few steps."""
    from dina_lrm.build import alignment as build_alignment
    from dina_lrm.recipes import alignment as alignment_recipes

    full = alignment_recipes.alignment_recipe

    def recipe(algorithm: str, generator: str) -> Any:
        config = full(algorithm, generator)
        sampler = replace(config.sampler, num_steps=2, window=(0, 1) if algorithm == "grpo" else None)
        if config.policy.pipeline != "bundled":
            sampler = replace(sampler, height=32, width=32)
        groups = {"group_size": 2} if algorithm == "grpo" else {}
        steps = {"gradient_steps": 1, "random_stop": 0} if algorithm == "refl" else {}
        return replace(
            config,
            sampler=sampler,
            monitor=replace(config.monitor, num_prompts=2, every=1, grid_size=1),
            num_steps=1,
            batch_size=2,
            precision="float32",  # bfloat16 is slow on most CPUs
            **groups,
            **steps,
        )

    current().patch.setattr(alignment_recipes, "alignment_recipe", recipe)
    assert build_alignment.run_alignment
    declare("alignment recipes at full length", "one update on two prompts, two steps a picture")


def short_measuring(captions: int = 6) -> None:
    """`dina-lrm evaluate` on few captions of the bundled world instead of 700."""
    from dina_lrm.build import pairs as build

    full = build.shapes_pairs
    current().patch.setattr(build, "shapes_pairs", lambda *a, **k: full(*a, **{**k, "num_prompts": captions}))
    declare("test pairs of 700 captions", f"of {captions} captions")


def few_levels() -> None:
    """`dina-lrm evaluate --learn-levels` among few noise levels."""
    import functools

    from dina_lrm.evaluation import adaptive

    short = functools.partial(adaptive.order_levels, levels=(0.2, 0.4), num_levels=2)
    current().patch.setattr(adaptive, "order_levels", short)
    declare("the best five views of eight noise levels", "the best two of two")


def short_demo() -> None:
    """`dina-lrm demo` with results that are made up; tests/end_to_end/test_demo.py runs it."""
    from dina_lrm.cli import demo
    from tests.unit.reporting.demo_results import make_demo_results

    current().patch.setattr(demo, "run_demo", lambda options: make_demo_results())
    declare("the demo's five minutes", "made up results, from which the report is written")


# --- other people's programs -------------------------------------------------------------------------------


def module(name: str, **contents: Any) -> types.ModuleType:
    """A module of a library that is not installed here, with what the page uses of it."""
    made = types.ModuleType(name)
    made.__dict__.update(contents)
    current().patch.setitem(sys.modules, name, made)
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, made)
    declare(
        f"the library {name.partition('.')[0]}", f"a module {name} with {', '.join(contents) or 'nothing'}"
    )
    return made


def address(there: str, here: str) -> None:
    """A server on another machine: one that runs here."""
    current().addresses[there] = current().here(here)
    declare(there, f"the server at {here}")


def hpsv2(name: str) -> None:
    """HPSv2 on the hub."""

    def make(folder: Path) -> None:
        hpsv2_file(str(folder / "HPS_v2.1_compressed.pt"))

    _hub_folder(name, make)


def hpsv2_file(file: str) -> None:
    """HPSv2's published file."""
    import torch

    from tests.unit.evaluation.baselines.scorers import tiny_clip, to_open_clip

    Path(file).parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": to_open_clip(tiny_clip())}, file)
    declare(f"HPSv2's weights, {Path(file).name}", "those of a tiny random CLIP under the published names")


def hpsv3(folder: str) -> None:
    """HPSv3's published files."""
    from tests.unit.evaluation.baselines.scorers import save_tiny_hpsv3

    save_tiny_hpsv3(Path(folder))
    declare(f"HPSv3's weights in {folder}", "those of a tiny random Qwen2-VL under the published names")


def language_model(there: str, reply: str) -> None:
    """An OpenAI-compatible server that always writes the same."""
    from contextlib import ExitStack
    from http.server import BaseHTTPRequestHandler

    from tests.local_server import answering

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            body = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    running = ExitStack()
    address = running.enter_context(answering(Handler))
    page = current()
    page.closing.append(running.close)
    page.addresses[there] = address.removeprefix("http://")
    declare(f"a language model served at {there}", f"a server that always answers {reply!r}")
