"""What strangers, and clients who mean well, can do to the server: probes, memory and answers meanwhile.

    python benchmarks/server_attacks.py --results benchmarks/results
    python benchmarks/server_attacks.py --source OTHER/src --label before     # the same against another tree

Every attack runs against a server of its own, a process on this machine, bounded in count and time. Meanwhile
`GET /healthz` is asked ten times a second, and the server's memory is read. Afterwards one request has to be
answered with the score that the library gives.
"""

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from record import about, write_results

from dina_lrm import RewardModel
from dina_lrm.remote.protocol import CONTENT_TYPE, PROTOCOL_VERSION, VERSION_HEADER, pack

TOLERANCE = 1e-5
HEADERS = {VERSION_HEADER: PROTOCOL_VERSION, "content-type": CONTENT_TYPE}
START_SECONDS = 600
CAPTION = "a red circle on a gray background"


@dataclass(frozen=True, kw_only=True)
class Options:
    results: Path | None = None
    """Folder of the table; by default it is only printed."""
    source: Path | None = None
    """The tree to attack, a folder with dina_lrm in it; by default the one that is installed."""
    label: str = "after"
    """What the rows are called; rows of other labels, and of other attacks, stay in the results."""
    seconds: float = 45.0
    """Longest that an attack may take."""
    only: tuple[str, ...] = ()
    """Attacks, by name; by default all."""


@dataclass
class Server:
    """A server under attack, what its probes took, and how much memory it had."""

    port: int
    process: Any
    log: Path
    idle_bytes: int = 0
    peak_bytes: int = 0
    probes: list[float] = field(default_factory=list)
    failed_probes: int = 0

    def memory(self) -> int:
        with suppress(OSError, IndexError):
            text = Path(f"/proc/{self.process.pid}/status").read_text()
            return int(text.split("VmRSS:")[1].split()[0]) * 1024
        return 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Probes ten times a second, and memory fifty times."""
        ended = threading.Event()
        self.idle_bytes = self.memory()

        def probe() -> None:
            while not ended.wait(0.1):
                started = time.monotonic()
                status, _ = ask(self.port, "GET", "/healthz", timeout=60)
                self.probes.append(time.monotonic() - started)
                self.failed_probes += status != 200

        def weigh() -> None:
            while not ended.wait(0.02):
                self.peak_bytes = max(self.peak_bytes, self.memory())

        threads = [threading.Thread(target=one, daemon=True) for one in (probe, weigh)]
        for thread in threads:
            thread.start()
        try:
            yield
            time.sleep(0.3)
        finally:
            ended.set()
            for thread in threads:
                thread.join(60)

    def statuses(self) -> Counter[int]:
        lines = (line for line in self.log.read_text().splitlines() if line.startswith("{"))
        return Counter(one["status"] for one in map(json.loads, lines) if "status" in one)


@contextmanager
def served(options: Options, folder: Path, *flags: str, files: int | None = None) -> Iterator[Server]:
    log = folder / f"{time.monotonic_ns()}.log"
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if options.source is not None:
        environment["PYTHONPATH"] = str(options.source)
    command = [sys.executable, "-m", "dina_lrm.serving", "--no-page", "--port", str(port), *flags]
    if files is not None:
        command = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *command]
    process = subprocess.Popen(command, stderr=log.open("wb"), env=environment)
    try:
        until = time.monotonic() + START_SECONDS
        while ask(port, "GET", "/healthz", timeout=5)[0] != 200:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server does not start: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield Server(port, process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(
    port: int, method: str, path: str, body: bytes | None = None, *, timeout: float = 60, **headers: str
) -> tuple[int, bytes]:
    """Status and content; status 0 where nothing came."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): it for name, it in headers.items()})
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def opened(port: int, first: bytes) -> socket.socket | None:
    try:
        connection = socket.create_connection(("127.0.0.1", port), timeout=30)
        connection.sendall(first)
    except OSError:
        return None
    return connection


def head(length: int) -> bytes:
    lines = ["POST /v1/score HTTP/1.1", "host: 127.0.0.1", f"content-length: {length}"]
    lines += [f"{name}: {value}" for name, value in HEADERS.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


# --- attacks ------------------------------------------------------------------------------------------------


def endless_header(server: Server, end: float) -> str:
    """One connection, one header value of up to 128 MiB."""
    connection = opened(server.port, b"GET /v1/score HTTP/1.1\r\nhost: 127.0.0.1\r\nx-a: ")
    assert connection is not None
    connection.settimeout(30)
    sent, part = 0, b"a" * 65536
    with suppress(OSError):
        while sent < 128 * 2**20 and time.monotonic() < end:
            connection.sendall(part)
            sent += len(part)
    connection.close()
    return f"{sent / 2**20:.0f} MiB were taken"


def large_pictures(server: Server, end: float) -> str:
    """16 pictures of 16 megapixels in one request."""
    stream = io.BytesIO()
    Image.fromarray(np.full((4000, 3999, 3), 127, dtype=np.uint8)).save(stream, "PNG")
    picture = base64.b64encode(stream.getvalue()).decode()
    body = json.dumps({"prompts": CAPTION, "images": [picture] * 16}).encode()
    status, _ = ask(
        server.port,
        "POST",
        "/v1/score/images",
        body,
        timeout=end - time.monotonic(),
        content_type="application/json",
    )
    return f"{len(body) / 1e6:.1f} MB were answered with {status}"


def heavy_request(server: Server, end: float, body: bytes) -> str:
    """8 pictures of 64 x 64 pixels, 64 draws, 16 levels: allowed. Meanwhile four others score latents."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    picture = base64.b64encode(stream.getvalue()).decode()
    levels = [0.05 * (index + 1) for index in range(16)]
    heavy = json.dumps(
        {"prompts": CAPTION, "images": [picture] * 8, "num_draws": 64, "noise_levels": levels}
    ).encode()
    waits, statuses, found = list[float](), Counter[int](), list[int]()

    def large() -> None:
        found.append(
            ask(
                server.port,
                "POST",
                "/v1/score/images",
                heavy,
                timeout=end - time.monotonic(),
                content_type="application/json",
            )[0]
        )

    def small() -> None:
        while not found and time.monotonic() < end:
            started = time.monotonic()
            statuses[ask(server.port, "POST", "/v1/score", body, timeout=120, **HEADERS)[0]] += 1
            waits.append(time.monotonic() - started)
            time.sleep(0.2)

    threads = [threading.Thread(target=one) for one in (large, small, small, small, small)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not waits:
        return f"answered with {found[0]} before any other request"
    p50, p99 = np.quantile(waits, [0.5, 0.99])
    done = {0: "not done in the time"}.get(found[0], f"answered with {found[0]}")
    return (
        f"{done}; {len(waits)} requests of others meanwhile {dict(statuses)}, "
        f"median {p50:.2f} s, p99 {p99:.2f} s"
    )


def long_row(server: Server, end: float, model: RewardModel) -> str:
    """One row of 40,000 text tokens."""
    conditioning = model.encode_prompts([CAPTION])
    long = conditioning.prompt_embeds[:, :1].expand(1, 40_000, -1).half().contiguous()
    body = pack(
        torch.zeros(1, 16, 8, 8),
        type(conditioning)(long, conditioning.pooled_prompt_embeds),
        torch.tensor([0.4]),
        [0],
    )
    status, content = ask(server.port, "POST", "/v1/score", body, timeout=end - time.monotonic(), **HEADERS)
    return f"answered with {status} {content[:80].decode(errors='replace') if status != 200 else ''}"


def held_connections(server: Server, end: float) -> str:
    """200 slow headers, 200 slow bodies and 300 silent connections, for 25 s."""
    first = [b"GET /healthz HTTP/1.1\r\nx-a: ", head(1_000_000), b""]
    held = [
        (kind, connection)
        for kind, count in ((0, 200), (1, 200), (2, 300))
        for _ in range(count)
        if (connection := opened(server.port, first[kind])) is not None
    ]
    until = min(end, time.monotonic() + 25)
    while time.monotonic() < until:
        for kind, connection in held:
            if kind < 2:
                with suppress(OSError):
                    connection.sendall(b"a")
        time.sleep(1)
    still = Counter[str]()
    for kind, connection in held:
        connection.setblocking(False)
        try:
            alive = connection.recv(65536) != b""
            while alive:
                alive = connection.recv(65536) != b""
        except BlockingIOError:
            still[("slow headers", "slow bodies", "silent")[kind]] += 1
        except OSError:
            pass
        connection.close()
    return f"still open after 25 s: {dict(still) or 'none'}"


def unfinished_bodies(server: Server, end: float) -> str:
    """25 bodies of 63 MiB, which lack their last byte."""
    length, part = 63 * 2**20, b"\0" * 2**20
    statuses = Counter[str]()

    def send() -> None:
        connection = opened(server.port, head(length))
        if connection is None:
            return
        connection.settimeout(max(1.0, end - time.monotonic()))
        with suppress(OSError):
            for _ in range(62):
                connection.sendall(part)
            connection.sendall(part[:-1])
        connection.settimeout(5)
        try:
            statuses[connection.recv(4096)[9:12].decode() or "closed"] += 1
        except TimeoutError:
            statuses["no answer in 5 s"] += 1
        except OSError:
            statuses["closed"] += 1
        connection.close()

    threads = [threading.Thread(target=send) for _ in range(25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return f"answers {dict(statuses)}"


def leaving(server: Server, end: float) -> str:
    """400 clients that leave in the middle of a body."""
    for _ in range(400):
        if time.monotonic() > end:
            break
        connection = opened(server.port, head(100_000) + b"abc")
        if connection is not None:
            connection.close()
    time.sleep(2)
    tracebacks = server.log.read_text().count("Traceback")
    return f"statuses in the log {dict(server.statuses())}, tracebacks {tracebacks}"


def other_sites(server: Server, end: float) -> str:
    """A foreign Host, and a form that another site makes a browser send."""
    rebound = ask(server.port, "GET", "/metrics", host="rebound.example")[0]
    stream = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)).save(stream, "PNG")
    body = (
        b'--x\r\ncontent-disposition: form-data; name="request"\r\n\r\n{"prompts": "a red circle"}\r\n'
        b'--x\r\ncontent-disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
        + stream.getvalue()
        + b"\r\n--x--\r\n"
    )
    posted = ask(
        server.port,
        "POST",
        "/v1/score/images",
        body,
        content_type="multipart/form-data; boundary=x",
        origin="https://evil.example",
    )[0]
    return f"foreign host {rebound}, form of another site {posted}"


def few_files(server: Server, end: float) -> str:
    """200 connections to a server that may open 128 files."""
    held = [one for one in (opened(server.port, b"GET /healthz HTTP/1.1\r\n") for _ in range(200)) if one]
    time.sleep(1)
    for one in held:
        one.close()
    time.sleep(0.5)
    lines = [line for line in server.log.read_text().splitlines() if "refused" in line or "open" in line]
    return f"lines in the log about it: {len(lines)}"


# --- the run ------------------------------------------------------------------------------------------------


def main(options: Options) -> None:
    model = RewardModel.from_pretrained("bundled").requires_grad_(False)
    conditioning = model.encode_prompts([CAPTION])
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.score_latents(latents, conditioning, torch.tensor([0.4]), seed=[0]).item()
    body = pack(latents, conditioning, torch.tensor([0.4]), [0])
    attacks: dict[str, Callable[[Server, float], str]] = {
        "endless header": endless_header,
        "large pictures": large_pictures,
        "heavy request": lambda server, end: heavy_request(server, end, body),
        "40,000 tokens": lambda server, end: long_row(server, end, model),
        "held connections": held_connections,
        "unfinished bodies": unfinished_bodies,
        "leaving": leaving,
        "other sites": other_sites,
        "few files": few_files,
    }
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as name:
        for attack, run in attacks.items():
            if options.only and attack not in options.only:
                continue
            with served(options, Path(name), files=128 if attack == "few files" else None) as server:
                ask(server.port, "POST", "/v1/score", body, timeout=60, **HEADERS)  # warm
                with server.watched():
                    outcome = run(server, time.monotonic() + options.seconds)
                status, content = ask(server.port, "POST", "/v1/score", body, timeout=60, **HEADERS)
                score = json.loads(content)["raw_scores"][0] if status == 200 else float("nan")
                rows.append(
                    {
                        "label": options.label,
                        "attack": attack,
                        "probe_median_ms": 1000 * float(np.median(server.probes)),
                        "probe_max_ms": 1000 * max(server.probes),
                        "failed_probes": server.failed_probes,
                        "memory_above_idle_mb": (server.peak_bytes - server.idle_bytes) / 1e6,
                        "status_500": server.statuses()[500],
                        "next_request": "right" if abs(score - expected) < TOLERANCE else f"status {status}",
                        "outcome": outcome,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    if options.results is not None:
        file = options.results / "server_attacks.json"
        there = json.loads(file.read_text()) if file.exists() else {"rows": [], "measured": {}}
        together = {(row["label"], row["attack"]): row for row in [*there["rows"], *rows]}
        rows = list(together.values())
        measured = there["measured"] | {options.label: about([0])}
        content = {"tolerance": TOLERANCE, "measured": measured, "rows": rows}
        write_results(options.results, "server_attacks", content, table(rows), seeds=[0])
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "One server process for each row, with one thread, and probes ten times a second.",
        "",
        "| attack | | probe, median | probe, max | failed | memory above idle | 500s | next request | |",
        "|---|---|--:|--:|--:|--:|--:|---|---|",
    ]
    order = list(dict.fromkeys(row["attack"] for row in rows))
    for row in sorted(rows, key=lambda row: (order.index(row["attack"]), row["label"] != "before")):
        lines.append(
            f"| {row['attack']} | {row['label']} | {row['probe_median_ms']:.0f} ms | "
            f"{row['probe_max_ms']:.0f} ms | {row['failed_probes']} | {row['memory_above_idle_mb']:.0f} MB | "
            f"{row['status_500']} | {row['next_request']} | {row['outcome']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
