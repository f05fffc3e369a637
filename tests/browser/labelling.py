"""The labelling page's server in its own process, and a rater at it in a browser."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from dina_lrm.serving.labelling.items import Items
from dina_lrm.serving.labelling.store import VoteStore
from dina_lrm.shapes.render import render
from dina_lrm.shapes.scenes import change_attribute, sample_caption, sample_scene

COMMAND = [sys.executable, *"-m dina_lrm label --input items.jsonl --output votes.sqlite".split()]
PHONE = {"is_mobile": True, "has_touch": True}


class Server:
    """`dina-lrm label` in its own process, on one port however often it is started."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options = folder, options
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.votes = folder / "votes.sqlite"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "--port", str(self.port), *self.options],
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _ in range(600):
            try:
                httpx.get(f"{self.address}/healthz")
                return
            except httpx.TransportError:
                assert self.process.poll() is None
                time.sleep(0.1)
        pytest.fail("the server does not start")

    @property
    def results(self) -> str:
        """The link that the command prints for whoever runs the labelling."""
        store = VoteStore(self.votes)
        key = store.results_key
        store.close()
        return f"{self.address}/results#{key}"

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


def write_items(folder: Path, num_pairs: int) -> None:
    """Captions, each with a picture of it and one that differs in one respect."""
    rng = np.random.default_rng(0)
    with (folder / "items.jsonl").open("w") as file:
        for number in range(num_pairs):
            spec = sample_caption(rng)
            names = [f"{number}-right.png", f"{number}-wrong.png"]
            for name, scene in zip(names, (spec, change_attribute(rng, spec)), strict=True):
                render(sample_scene(rng, scene)).save(folder / name)
            file.write(json.dumps({"prompt": spec.caption, "images": names}) + "\n")


class Rater:
    """A person at the page, in a browser of their own."""

    def __init__(self, browser: Any, server: Server, items: Items, name: str, **context: Any) -> None:
        self.page = browser.new_context(**context).new_page()
        self.items, self.name = items, name
        self.acknowledged: list[str] = []
        self.errors: list[str] = []
        self.addresses: list[str] = []
        self.page.on("request", lambda request: self.addresses.append(request.url))
        self.page.on("requestfinished", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(server.address)

    def _note(self, request: Any) -> None:
        if request.url.endswith("/api/votes") and request.response().status == 200:
            self.acknowledged.append(json.loads(request.post_data)["id"])

    def enter(self) -> None:
        self.page.get_by_label("Your name").fill(self.name)
        self.page.keyboard.press("Enter")
        self.ready()

    def ready(self) -> None:
        """Wait until there is something to choose, or nothing left."""
        self.page.locator(
            '#finished:not([hidden]), #work:not([hidden]) #left[aria-disabled="false"]'
        ).first.wait_for()

    def counted_from(self, before: int) -> None:
        """Wait until another number of answers is shown."""
        self.page.locator(f'#mine:not([value="{before}"])').wait_for()

    @property
    def finished(self) -> bool:
        return self.page.locator("#finished").is_visible()

    @property
    def done(self) -> int:
        return int(self.page.locator("#mine").evaluate("progress => progress.value"))

    def right_side(self) -> str:
        """Where the picture stands that shows what the caption says."""
        number = self.page.locator("#left-picture").get_attribute("src").split("/")[-1].split("?")[0]
        return "left" if "right" in Path(str(self.items.pictures[int(number)])).name else "right"

    def press(self, key: str, *, wait: bool = True) -> None:
        before = self.done
        self.page.keyboard.press(key)
        if wait:
            self.counted_from(before)
            self.ready()
