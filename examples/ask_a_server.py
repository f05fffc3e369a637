"""A reward on one machine, its scores on another: a server, and the client that a trainer would use.

python examples/ask_a_server.py
"""

import socket
import subprocess
import sys
import time
from typing import Any

import torch

import dina_lrm
from dina_lrm.shapes.pipeline import load_pipeline

with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
command = [sys.executable, "-m", "dina_lrm.serving", "--no-page", "--port", str(port)]
server = subprocess.Popen(command, stderr=subprocess.DEVNULL)

prompt = "a red circle on a gray background"
pipeline: Any = load_pipeline()  # diffusers annotates what comes back too widely
images = pipeline(prompt, num_images_per_prompt=3, num_inference_steps=8, max_sequence_length=20).images

with dina_lrm.Client(f"http://127.0.0.1:{port}") as client:
    while not client.healthy():
        if server.poll() is not None:
            raise SystemExit("the server has ended: is dina-lrm[serve] installed?")
        time.sleep(0.2)
    print("pictures:", [round(score, 2) for score in client.score(prompt, images).scores.tolist()])
    print(f"first preferred to second: {client.compare(prompt, images[0], images[1]):.0%}")

    # What a trainer has at hand: latents, and the embeddings that its own pipeline made of the prompts.
    model = dina_lrm.RewardModel.from_pretrained("bundled")
    latents, conditioning = model.encode_images(images), model.encode_prompts(prompt)
    there = client.score_latents(latents, conditioning, noise_level=0.4, seed=0)
    with torch.no_grad():
        here = model.score_latents(latents, conditioning, noise_levels=0.4, seed=0)
    print(f"latents: largest difference between server and library {(there - here).abs().max():.1e}")

server.terminate()
print("the server's exit code:", server.wait(timeout=60))
