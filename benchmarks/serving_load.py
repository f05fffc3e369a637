"""The server under load: what batching gains, whether answers are right, what happens past capacity.

    python benchmarks/serving_load.py --results benchmarks/results

Each of `clients` threads holds one connection and sends a latent with its own prompt, level and seed as soon
as its last answer is there; every answer is compared with the library's score of that very latent. The server
is a process of its own on the same machine, so clients and server share its cores.

1. one row a pass (`--max-batch-size 1`), then batches, each for `seconds`;
2. a queue of 16 rows for all clients: what is refused, and how soon a single client is served afterwards;
3. SIGTERM in the middle: whether every request that the server took has been answered.
"""

import http.client
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import tyro
from record import write_results

from dina_lrm import RewardModel
from dina_lrm.remote.protocol import CONTENT_TYPE, PROTOCOL_VERSION, VERSION_HEADER, pack
from dina_lrm.shapes.scenes import sample_caption

TOLERANCE = 1e-5
"""Of a score, relative above 1: what rounding in another batch may do."""


@dataclass(frozen=True, kw_only=True)
class Options:
    results: Path | None = None
    """Folder of the table; by default it is only printed."""
    clients: int = 64
    seconds: float = 60.0
    latents: int = 256
    """Different requests."""
    max_batch_size: int = 32
    max_wait_ms: float = 10.0
    port: int = 8123


@dataclass
class Tally:
    """What the clients of one phase have met."""

    seconds: list[float] = field(default_factory=list)
    """Of answered requests."""
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """Answers that are not the score of the latent that was sent."""
    broken: Counter[str] = field(default_factory=Counter)
    """Requests without an answer, by error."""
    answered: set[str] = field(default_factory=set)
    """Ids of requests with an answer 200."""
    without_retry_after: int = 0


class Server:
    """`dina-lrm serve` in a process of its own, with its log."""

    def __init__(self, options: Options, log: Path, *flags: str) -> None:
        self.options, self.log = options, log
        command = [sys.executable, "-m", "dina_lrm.serving", "--no-page", "--port", str(options.port), *flags]
        self.process = subprocess.Popen(command, stderr=log.open("wb"))
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server has ended: {log.read_text()[-2000:]}")
            try:
                if _get(options.port, "/healthz") == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)

    def logged(self) -> dict[str, int]:
        """Status of each request of the latent protocol that the server has taken, by id."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return {one["request_id"]: one["status"] for one in lines if one.get("path") == "/v1/score"}


def _get(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def requests(count: int) -> tuple[list[bytes], list[float]]:
    """Bodies and the library's scores."""
    model = RewardModel.from_pretrained("bundled").requires_grad_(False)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    conditioning = model.encode_prompts([sample_caption(rng).caption for _ in range(count)])
    latents = torch.randn(count, 16, 8, 8, generator=generator)
    u = torch.rand(count, generator=generator)
    with torch.no_grad():
        scores = model.score_latents(latents, conditioning, u, seed=list(range(count))).tolist()
    rows = [torch.tensor([row]) for row in range(count)]
    bodies = [
        pack(latents[row], conditioning.index_select(row), u[row], [index]) for index, row in enumerate(rows)
    ]
    return bodies, scores


def load(
    options: Options, bodies: list[bytes], scores: list[float], seconds: float, *, stop_at: Any = None
) -> Tally:
    """All clients at once, for so long or until the server is gone."""
    tally, lock, end = Tally(), threading.Lock(), time.monotonic() + seconds

    def client(number: int) -> None:
        rng = random.Random(number)
        connection = http.client.HTTPConnection("127.0.0.1", options.port, timeout=60)
        count = 0
        while time.monotonic() < end:
            index, count = rng.randrange(len(bodies)), count + 1
            name = f"{number}-{count}"
            headers = {VERSION_HEADER: PROTOCOL_VERSION, "content-type": CONTENT_TYPE, "x-request-id": name}
            started = time.monotonic()
            try:
                connection.request("POST", "/v1/score", bodies[index], headers)
                response = connection.getresponse()
                content = response.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                with lock:
                    tally.broken[type(error).__name__] += 1
                if stop_at is not None:
                    return
                continue
            took = time.monotonic() - started
            with lock:
                tally.statuses[response.status] += 1
                if response.status == 200:
                    tally.seconds.append(took)
                    tally.answered.add(name)
                    (score,) = json.loads(content)["raw_scores"]
                    if abs(score - scores[index]) > TOLERANCE * max(1.0, abs(scores[index])):
                        tally.wrong.append(f"{name}: {score}, expected {scores[index]}")
                elif response.status == 503 and not response.getheader("retry-after"):
                    tally.without_retry_after += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(options.clients)]
    for thread in threads:
        thread.start()
    if stop_at is not None:
        time.sleep(seconds / 2)
        stop_at()
    for thread in threads:
        thread.join()
    return tally


def steady(
    options: Options, folder: Path, bodies: list[bytes], scores: list[float], size: int
) -> dict[str, Any]:
    server = Server(
        options,
        folder / f"{size}.log",
        "--max-batch-size",
        str(size),
        "--max-wait-ms",
        str(options.max_wait_ms),
    )
    load(options, bodies, scores, 3.0)  # the first requests warm up what they touch
    tally = load(options, bodies, scores, options.seconds)
    server.stop()
    quantiles = np.quantile(tally.seconds, [0.5, 0.99])
    return {
        "phase": f"batches of {size}",
        "requests": len(tally.seconds),
        "per_second": len(tally.seconds) / options.seconds,
        "p50_ms": 1000 * quantiles[0],
        "p99_ms": 1000 * quantiles[1],
        "other_answers": sum(tally.statuses.values()) - len(tally.seconds),
        "broken": sum(tally.broken.values()),
        "wrong": len(tally.wrong),
    }


def overload(options: Options, folder: Path, bodies: list[bytes], scores: list[float]) -> dict[str, Any]:
    server = Server(options, folder / "overload.log", "--max-queue", "16")
    tally = load(options, bodies, scores, min(options.seconds, 10.0))
    ended = time.monotonic()
    quiet = Options(**{**vars(options), "clients": 1})
    while not load(quiet, bodies, scores, 0.01).answered:
        pass
    recovered = time.monotonic() - ended
    server.stop()
    return {
        "phase": "queue of 16",
        "served": tally.statuses[200],
        "refused": tally.statuses[503],
        "other_answers": sum(tally.statuses.values()) - tally.statuses[200] - tally.statuses[503],
        "without_retry_after": tally.without_retry_after,
        "broken": sum(tally.broken.values()),
        "wrong": len(tally.wrong),
        "recovered_in_seconds": recovered,
    }


def terminated(options: Options, folder: Path, bodies: list[bytes], scores: list[float]) -> dict[str, Any]:
    server = Server(options, folder / "sigterm.log", "--max-batch-size", str(options.max_batch_size))
    codes: list[int] = []
    tally = load(options, bodies, scores, 6.0, stop_at=lambda: codes.append(server.stop()))
    logged = server.logged()
    taken = {name for name, status in logged.items() if status != 503}
    return {
        "phase": "SIGTERM",
        "exit_code": codes[0],
        "taken": len(taken),
        "answered": len(tally.answered),
        "taken_but_not_answered": len(taken - tally.answered),
        "statuses": dict(Counter(logged.values())),
        "wrong": len(tally.wrong),
        "connections_closed_by_the_end": sum(tally.broken.values()),
    }


def main(options: Options) -> None:
    bodies, scores = requests(options.latents)
    with TemporaryDirectory() as name:
        folder = Path(name)
        rows = [
            steady(options, folder, bodies, scores, 1),
            steady(options, folder, bodies, scores, options.max_batch_size),
        ]
        rows.append(overload(options, folder, bodies, scores))
        rows.append(terminated(options, folder, bodies, scores))
    for row in rows:
        print(json.dumps(row), flush=True)
    about = {
        "clients": options.clients,
        "seconds": options.seconds,
        "tolerance": TOLERANCE,
        "throughput_ratio": rows[1]["per_second"] / rows[0]["per_second"],
    }
    text = table(about, rows)
    print(text)
    if options.results is not None:
        write_results(options.results, "serving_load", {**about, "rows": rows}, text, seeds=[0])


def table(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{about['clients']} clients, {about['seconds']:g} s each, the bundled reward; clients and server "
        f"share the machine.",
        "",
        "| server | requests a second | median | p99 | errors | answers that differ from the library's |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows[:2]:
        errors = row["other_answers"] + row["broken"]
        lines.append(
            f"| {row['phase']} | {row['per_second']:.0f} | {row['p50_ms']:.0f} ms | {row['p99_ms']:.0f} ms | "
            f"{errors} | {row['wrong']} |"
        )
    over, end = rows[2], rows[3]
    lines += [
        "",
        f"Batching serves {about['throughput_ratio']:.1f} times as many. With a queue of 16 rows "
        f"{over['served']} requests were served and {over['refused']} refused with 503, "
        f"{over['without_retry_after']} of them without Retry-After; a request after the load was served "
        f"within {1000 * over['recovered_in_seconds']:.0f} ms. At SIGTERM under load the server had taken "
        f"{end['taken']} requests and left {end['taken_but_not_answered']} unanswered; exit code "
        f"{end['exit_code']}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
