"""Does a change leave every answer as it was? Digests of what the package computes, to be compared by eye or
`diff` between two commits: only the public interface is used, so the script runs on both.

    python benchmarks/same_behaviour.py > before.txt      # on the commit before
    python benchmarks/same_behaviour.py > after.txt       # on the commit after
    diff before.txt after.txt

Scores, comparisons and places of pictures, the weights of a short training run and of short alignment runs,
the files of `prepare`, answers of the server, every case of the reference tensors (--golden), and the
options of every command. Floats are compared to the last bit, so both runs belong on one machine; each
command has one thread, because sums depend on their number.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open

PROMPTS = ["a red circle on a gray background", "a big blue square on a white background"]
COMMANDS = (
    "score compare rank inspect audit prepare evaluate serve label doctor search".split()
    + ["train shapes", "label export"]
    + [f"align {algorithm} shapes" for algorithm in ("refl", "grpo", "dpo", "step-dpo")]
)
FILES = (".safetensors", ".parquet", ".jsonl")
"""What runs leave; JSON files beside them hold times and places."""


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def call(folder: Path, *arguments: str) -> str:
    """Output of a command; each has one thread, and writes sets of names in one order."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "dina_lrm", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def tell(name: str, content: bytes | str) -> None:
    text = content.encode() if isinstance(content, str) else content
    print(f"{name:<44} {digest(text)}", flush=True)


def tell_files(name: str, folder: Path) -> None:
    """Every file that a run has left, by name."""
    for file in sorted(folder.rglob("*")):
        if file.suffix in FILES and not file.is_symlink():
            tell(f"{name}/{file.relative_to(folder)}", content_of(file))


def content_of(file: Path) -> bytes:
    """What a file says: safetensors writes its metadata in any order, and metrics have times among them."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="np") as opened:
            parts = [json.dumps(sorted((opened.metadata() or {}).items())).encode()]
            for name in sorted(opened.keys()):
                tensor = opened.get_slice(name)
                parts += [name.encode(), str((tensor.get_dtype(), tensor.get_shape())).encode()]
        header, size = file.read_bytes(), 8
        size += int.from_bytes(header[:8], "little")
        return b"".join(parts) + header[size:]
    if file.name in ("metrics.jsonl", "evaluations.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return json.dumps([{name: row[name] for name in row if not is_time(name)} for row in rows]).encode()
    return file.read_bytes()


def is_time(name: str) -> bool:
    return any(word in name for word in ("second", "per_", "wait"))


def draw(folder: Path) -> list[str]:
    """Six pictures of blurred noise."""
    rng = np.random.default_rng(0)
    names = []
    for index in range(6):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
        names.append(f"{index}.png")
        picture.save(folder / names[-1])
    return names


def pictures_and_runs(folder: Path) -> None:
    names = draw(folder)
    tell("score", call(folder, "score", PROMPTS[0], *names, "--json"))
    tell("score --num-draws", call(folder, "score", PROMPTS[0], *names, "--num-draws", "3", "--json"))
    tell("compare", call(folder, "compare", PROMPTS[0], *names[:2], "--json"))
    tell("rank", call(folder, "rank", PROMPTS[1], *names, "--json"))
    rows = [{"prompt": PROMPTS[i % 2], "chosen": names[i], "rejected": names[(i + 1) % 6]} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    single = [{"prompt": PROMPTS[i % 2], "image": names[i]} for i in range(6)]
    (folder / "single.jsonl").write_text("".join(json.dumps(row) + "\n" for row in single))
    call(folder, "score", "--input", "single.jsonl", "--output", "scored.jsonl")
    tell("score --input", (folder / "scored.jsonl").read_bytes())
    call(folder, "prepare", "jsonl", "--root", "rows.jsonl", "--output", "latents", "--processes", "1")
    tell_files("prepare", folder / "latents")
    train = ["train", "shapes", "--num-steps", "60", "--validation.every", "30", "--data.train-prompts", "64"]
    call(folder, *train, "--data.validation-prompts", "16", "--cpu", "--output", "trained")
    tell_files("train", folder / "trained")
    own = ["train", "bundled", "--num-steps", "4", "--data.train", "latents", "--data.validation", "latents"]
    call(folder, *own, "--batch-size", "2", "--cpu", "--output", "own")
    tell_files("train on prepared pairs", folder / "own")
    tell(
        "score with a trained reward",
        call(folder, "score", PROMPTS[0], *names, "--model", "trained", "--json"),
    )
    tell(
        "evaluate",
        re.sub(
            r'"[a-z_]*seconds[a-z_]*": [0-9.e-]+',
            "",
            call(folder, "evaluate", "--model", "bundled", "--pairs", "latents", "--json"),
        ),
    )
    for algorithm in ("refl", "grpo", "dpo", "step-dpo"):
        arguments = ["align", algorithm, "shapes", "--reward", "bundled", "--num-steps", "4", "--cpu"]
        call(folder, *arguments, "--monitor.every", "2", "--monitor.num-prompts", "4", "--output", algorithm)
        tell_files(f"align {algorithm}", folder / algorithm)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "dina_lrm", "serve", "--no-page", "--port", str(port)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/healthz"):
                break
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def server(folder: Path) -> None:
    import torch

    from dina_lrm import Client, RewardModel

    names = draw(folder)
    reward = RewardModel.from_pretrained("bundled")
    conditioning = reward.encode_prompts(PROMPTS)
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with served(folder) as address, Client(address) as client:
        for levels in (0.4, torch.tensor([0.2, 0.7])):
            scores = client.score_latents(latents, conditioning, levels, seed=[1, 2])
            tell(f"server, latents, {levels}", json.dumps(scores.tolist()))
        files = [(folder / name).read_bytes() for name in names]
        tell("server, pictures", json.dumps(client.score(PROMPTS[0], files, num_draws=2).scores.tolist()))
        tell("server, compare", json.dumps(client.compare(PROMPTS[0], files[0], files[1])))
        with urllib.request.urlopen(f"{address}/v1/models") as reply:
            tell("server, models", reply.read())
        with urllib.request.urlopen(f"{address}/openapi.json") as reply:
            content: dict[str, Any] = json.loads(reply.read())
            tell("server, routes", json.dumps(sorted((p, sorted(m)) for p, m in content["paths"].items())))


def golden_cases(golden: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from dina_lrm import Conditioning, RewardModel

    torch.set_num_threads(1)
    for case, inputs in (
        ("A_lora_dual", "A_lora_dual"),
        ("C_frozen_logistic", "C_frozen_logistic"),
        ("A_lora_dual", "E_ensemble_A"),
    ):
        io = load_file(golden / inputs / "io.safetensors")
        model = RewardModel.from_pretrained(golden / case / "reward", pipeline=golden / case)
        conditioning = Conditioning(io["encoder_hidden_states"], io["pooled_projections"])
        levels: list[Any] = [io[name].tolist() for name in ("u3.u", "u5.u") if name in io]
        levels += [float(level) for level in io["u"]] if "u" in io else []
        for level in levels:
            for merged in (True, False):
                with torch.set_grad_enabled(not merged):
                    scores = model.score_latents(io["latents"], conditioning, level, noise=io["noise"])
                shown = [round(one, 2) for one in (level if isinstance(level, list) else [level])]
                tell(
                    f"golden {inputs} {shown} {'merged' if merged else 'apart'}"[:80],
                    scores.detach().numpy().tobytes(),
                )
        if "sigma" in io:
            noisy = model.schedule.add_noise(io["latents"], io["noise"], io["sigma"][0]).requires_grad_()
            (gradient,) = torch.autograd.grad(model(noisy, conditioning, io["sigma"][0]).sum(), noisy)
            tell(f"golden {inputs} gradient", gradient.numpy().tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--golden", type=Path, help="folder of the reference tensors")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for command in COMMANDS:
            text = call(folder, *command.split(), "--help")
            tell(f"options of {command}", " ".join(sorted(set(re.findall(r"--[a-z][a-z0-9.-]*", text)))))
        if options.golden is not None:
            golden_cases(options.golden.resolve())
        server(folder)
        pictures_and_runs(folder)


if __name__ == "__main__":
    main()
