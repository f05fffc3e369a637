"""Both clients: what they send, what they take, and what they refuse to send."""

import asyncio
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import dina_lrm
from dina_lrm import AsyncClient, Client, Conditioning, InvalidInputError, PromptWarning, RewardModel
from dina_lrm.remote import calls
from tests.unit.remote.fake import PROMPTS, Call, Fake, free_port, ok, pictures, rows


def test_latents_on_the_wire(call: Call, fake: Fake) -> None:
    latents, conditioning = rows(2, torch.bfloat16)
    scores = call(fake.url, "score_latents", latents.requires_grad_(), conditioning, 0.3, 7, token="Ærø")
    (request,) = fake.requests
    assert request.path == "/v1/score"
    assert request.headers["content-type"] == "application/octet-stream"
    assert request.headers["x-drm-protocol-version"] == "1"
    assert request.headers["authorization"].encode("latin-1") == "Bearer Ærø".encode()
    tensors = request.tensors
    assert sorted(tensors) == ["latents", "pooled_prompt_embeds", "prompt_embeds", "seeds", "u"]
    assert torch.equal(tensors["latents"], latents.detach())
    assert torch.equal(tensors["prompt_embeds"], conditioning.prompt_embeds)
    assert torch.equal(tensors["u"], torch.tensor([0.3, 0.3]))
    assert tensors["seeds"].tolist() == [7, 7]
    expected = latents.detach().double().mean(dim=(1, 2, 3)) + 3 + 700
    torch.testing.assert_close(scores, expected.float())
    assert not scores.requires_grad


@pytest.mark.parametrize(("max_rows", "sizes"), [(3, [3, 3, 1]), (7, [7]), (1, [1] * 7)])
def test_a_batch_goes_in_parts_and_comes_back_in_order(
    call: Call, fake: Fake, max_rows: int, sizes: list[int]
) -> None:
    latents, conditioning = rows(7)
    levels, seeds = torch.linspace(0, 1, 7), [3, 1, 4, 1, 5, 9, 2]
    scores = call(fake.url, "score_latents", latents, conditioning, levels, seeds, max_rows=max_rows)
    expected = latents.double().mean(dim=(1, 2, 3)) + 10 * levels + 100 * torch.tensor(seeds)
    torch.testing.assert_close(scores, expected.float())
    assert [len(one.tensors["latents"]) for one in fake.requests] == sizes
    sent = torch.cat([one.tensors["prompt_embeds"] for one in fake.requests])
    assert torch.equal(sent, conditioning.prompt_embeds)


def test_a_body_stays_below_what_a_server_takes(
    call: Call, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, conditioning = rows(5)
    row_bytes = 4 * (16 * 8 * 8 + 5 * 12 + 6)
    monkeypatch.setattr(calls, "MAX_BODY_BYTES", 2 * row_bytes)
    call(fake.url, "score_latents", latents, conditioning)
    assert [len(one.tensors["latents"]) for one in fake.requests] == [2, 2, 1]
    monkeypatch.setattr(calls, "MAX_BODY_BYTES", 1)
    fake.requests.clear()
    assert call(fake.url, "score", "a", pictures(3)).scores.tolist() == [1.0, 11.0, 21.0]
    assert len(fake.requests) == 3


def test_one_row_of_conditioning_serves_all(call: Call, fake: Fake) -> None:
    latents, _ = rows(3)
    _, one = rows(1)
    call(fake.url, "score_latents", latents, one, max_rows=2)
    sent = torch.cat([request.tensors["prompt_embeds"] for request in fake.requests])
    assert torch.equal(sent, one.prompt_embeds.expand(3, -1, -1))


def test_fresh_noise_sends_no_seeds(call: Call, fake: Fake) -> None:
    fake.plan = [ok({"protocol_version": "1", "raw_scores": [1.5]})]
    assert call(fake.url, "score_latents", *rows(1), 0.4, None).tolist() == [1.5]
    assert "seeds" not in fake.requests[0].tensors


def test_pictures_on_the_wire(call: Call, fake: Fake, tmp_path: Path) -> None:
    files = pictures(3)
    files[1].save(tmp_path / "one.png")
    floats = torch.zeros(3, 4, 6)
    floats[0], floats[2] = 21 / 255, 1.0
    images = [files[0], tmp_path / "one.png", floats]
    found = call(fake.url, "score", ["x", "y", "ż"], images, [0.2, 0.7], [1, 2, 3], max_rows=2)
    assert found.scores.tolist() == [1.0, 11.0, 21.0]
    assert found.scores.dtype == torch.float32
    assert found.standard_errors is None
    first, second = fake.requests
    assert first.path == second.path == "/v1/score/images"
    wanted = {"noise_levels": [0.2, 0.7], "num_draws": 1}
    assert json.loads(first.form[0][1]) == wanted | {"prompts": ["x", "y"], "seed": [1, 2]}
    assert json.loads(second.form[0][1]) == wanted | {"prompts": ["ż"], "seed": [3]}
    assert [name for name, _ in first.form] == ["request", "images", "images"]
    for (_, sent), picture in zip([*first.form[1:], *second.form[1:]], files, strict=True):
        with Image.open(io.BytesIO(sent)) as opened:
            assert np.array_equal(np.asarray(opened), np.asarray(picture))


def test_one_prompt_or_one_picture_serves_all(call: Call, fake: Fake) -> None:
    assert call(fake.url, "score", "x", pictures(2)).scores.tolist() == [1.0, 11.0]
    assert call(fake.url, "score", ["x", "y", "z"], pictures(1)).scores.tolist() == [1.0] * 3
    first, second = (json.loads(one.form[0][1]) for one in fake.requests)
    assert first["prompts"] == ["x", "x"]
    assert second["prompts"] == ["x", "y", "z"]
    assert first["noise_levels"] is None


def test_standard_errors_of_several_draws(fake: Fake) -> None:
    with Client(fake.url, max_rows=1) as one:
        found = one.score("x", pictures(2), num_draws=4)
    assert found.standard_errors is not None
    assert found.standard_errors.tolist() == pytest.approx([0.01, 0.11])


def test_compare(call: Call, fake: Fake) -> None:
    a, b = pictures(3)[1:]
    assert call(fake.url, "compare", "x", a, b, 0.1, 5) == pytest.approx(11 / 32)
    ((name, request), *files) = fake.requests[0].form
    assert fake.requests[0].path == "/v1/compare"
    assert name == "request"
    assert json.loads(request) == {"prompt": "x", "noise_levels": [0.1], "seed": 5}
    assert [name for name, _ in files] == ["image_a", "image_b"]


def test_what_a_server_did_not_see_of_a_prompt_is_said_once(call: Call, fake: Fake) -> None:
    fake.plan = [ok({"scores": [1.0], "notes": ["cut after 'tea'"]})] * 2
    with pytest.warns(PromptWarning, match="cut after 'tea'") as caught:
        call(fake.url, "score", "tea", pictures(2), max_rows=1)
    assert len(caught) == 1
    fake.plan = [ok({"probability": 0.5, "notes": ["unknown: tea"]})]
    with pytest.warns(PromptWarning, match="unknown: tea"):
        call(fake.url, "compare", "tea", *pictures(2))


def test_health(call: Call, fake: Fake, waits: list[float]) -> None:
    assert call(fake.url, "healthy") is True
    fake.plan = [(503, {}, b"")]
    assert call(fake.url, "healthy") is False
    assert [one.path for one in fake.requests] == ["/healthz"] * 2
    assert call(f"http://127.0.0.1:{free_port()}", "healthy") is False
    assert waits == []


def test_connections_are_kept(fake: Fake) -> None:
    latents, conditioning = rows(6)
    with Client(fake.url, max_rows=2) as one:
        assert one.healthy()
        for _ in range(3):
            one.score_latents(latents, conditioning)
        one.compare("x", *pictures(2))
    assert len(fake.requests) == 11
    assert fake.connections == 1
    with pytest.raises(RuntimeError, match="closed"):
        one.healthy()


def test_requests_at_once(fake: Fake) -> None:
    latents, conditioning = rows(8)

    async def gather() -> list[Tensor]:
        async with AsyncClient(fake.url) as one:
            return await asyncio.gather(
                *(
                    one.score_latents(latents[row : row + 1], conditioning.index_select(torch.tensor([row])))
                    for row in range(8)
                )
            )

    with Client(fake.url) as one:
        torch.testing.assert_close(torch.cat(asyncio.run(gather())), one.score_latents(latents, conditioning))


def test_bad_input_is_never_sent(call: Call, fake: Fake, tmp_path: Path) -> None:
    latents, conditioning = rows(4)
    embeds, pooled = conditioning.prompt_embeds, conditioning.pooled_prompt_embeds
    nan = latents.clone()
    nan[3, 0, 0, 0] = torch.nan  # in the last part
    mask = torch.ones(4, 5)
    two = pictures(2)
    cases: list[tuple[str, tuple[Any, ...], str]] = [
        ("score_latents", (nan, conditioning), "latents holds 1 NaN"),
        ("score_latents", (latents[0], conditioning), "latents has shape"),
        ("score_latents", (latents.double(), conditioning), "latents: dtype float64"),
        ("score_latents", (latents, Conditioning(embeds)), "pooled_prompt_embeds are missing"),
        ("score_latents", (latents, Conditioning(embeds * torch.inf, pooled)), "prompt_embeds holds"),
        (
            "score_latents",
            (latents, Conditioning(embeds, pooled, mask.tril())),
            "attention_mask hides tokens",
        ),
        ("score_latents", (latents[:3], conditioning), "4 rows of conditioning for 3 latents"),
        ("score_latents", (latents, conditioning, 1.4), r"noise_level = 1.4 is outside \[0, 1\]"),
        ("score_latents", (latents, conditioning, torch.tensor([0.4])), r"or a tensor \(4,\)"),
        ("score_latents", (latents, conditioning, 0.4, [0]), "1 seeds for 4 samples"),
        ("score_latents", (latents, conditioning, 0.4, 2**63), r"seeds: 9223372036854775808 is outside"),
        ("score", (["x", "y", "z"], two), "3 prompts for 2 images"),
        ("score", ([], two), "no prompts were given"),
        ("score", ("x", []), "no images were given"),
        ("score", ("x", tmp_path / "none.png"), r"missing file: .*none.png"),
        ("score", ("x", torch.zeros(3, 2, 8, 8)[None]), r"image 0 has shape \(3, 2, 8, 8\): .* no videos"),
        ("score", ("x", two, 1.2), r"noise_levels = 1.2 is outside"),
        ("score", ("x", two, []), "noise_levels is empty"),
        ("compare", (" ", *two), "prompt"),
        ("compare", ("x", two, two[0]), "compare takes two images, not 2 and 1"),
    ]
    for method, arguments, message in cases:
        with pytest.raises(InvalidInputError, match=message):
            call(fake.url, method, *arguments, max_rows=1)
    assert fake.requests == []
    with Client(fake.url) as one, pytest.raises(InvalidInputError, match="num_draws = 0: must be at least 1"):
        one.score("x", two, num_draws=0)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_settings_out_of_range(kind: type[Client] | type[AsyncClient]) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("file:///etc/hostname", {}, "url = 'file:///etc/hostname': it must start with http"),
        ("http://", {}, "name a host"),
        ("http://a:port", {}, "not an address"),
        ("http://a", {"timeout_seconds": 0.0}, "timeout_seconds = 0.0: must be above 0"),
        ("http://a", {"max_retries": -1}, "max_retries = -1"),
        ("http://a", {"max_rows": 0}, "max_rows = 0"),
        ("http://a", {"token": "secret\n"}, "token: it must be printable"),
    ]
    for url, settings, message in cases:
        with pytest.raises(InvalidInputError, match=message) as caught:
            kind(url, **settings)
        assert "secret" not in str(caught.value)


def test_where_the_token_comes_from(call: Call, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    call(fake.url, "healthy")
    monkeypatch.setenv("DINA_LRM_TOKEN", "of the environment")
    call(fake.url, "healthy")
    call(fake.url, "healthy", token="given")
    given = [request.headers.get("authorization") for request in fake.requests]
    assert given == [None, "Bearer of the environment", "Bearer given"]
    with Client(fake.url, token="secret") as one:
        assert repr(one) == f"Client({fake.url!r})"


def test_a_proxy_of_the_environment(call: Call, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", fake.url)
    assert call("http://reward.example", "healthy") is False  # the fake is no proxy: it knows no such path
    assert [request.path for request in fake.requests] == ["http://reward.example/healthz"]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert call(fake.url, "healthy") is True
    assert fake.requests[-1].path == "/healthz"


@pytest.mark.parametrize("ending", ["", "/", "/v1/score", "/v1/score/"])
def test_addresses(call: Call, fake: Fake, ending: str) -> None:
    call(fake.url + ending, "score_latents", *rows(1))
    assert fake.requests[0].path == "/v1/score"


@pytest.fixture(scope="module")
def reward() -> RewardModel:
    return RewardModel.from_pretrained("bundled").requires_grad_(False)


@pytest.fixture(scope="module")
def address(reward: RewardModel) -> Iterator[str]:
    uvicorn = pytest.importorskip("uvicorn")
    from dina_lrm.serving.app import create_app
    from dina_lrm.serving.settings import ServerSettings

    settings = ServerSettings(page=False, max_wait_ms=0.0, token="let me in", max_rows=4)
    server = uvicorn.Server(uvicorn.Config(create_app(settings, reward), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_the_server_says_what_the_library_says(call: Call, address: str, reward: RewardModel) -> None:
    def ask(method: str, *arguments: Any) -> Any:
        return call(address, method, *arguments, token="let me in", max_rows=2)

    assert ask("healthy")
    latents = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    conditioning = reward.encode_prompts([*PROMPTS, PROMPTS[0]])
    levels, seeds = torch.tensor([0.1, 0.4, 0.9]), [5, -7, 6]
    torch.testing.assert_close(
        ask("score_latents", latents, conditioning, levels, seeds),
        reward.score_latents(latents, conditioning, levels, seed=seeds),
        rtol=1e-6,
        atol=1e-5,
    )
    pixels = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(4))
    several = list(pixels.to(torch.uint8))
    for levels_of_pictures in (None, 0.3, [0.2, 0.6]):
        torch.testing.assert_close(
            ask("score", PROMPTS[0], several, levels_of_pictures, seeds).scores,
            reward.score(PROMPTS[0], several, levels_of_pictures, seeds).scores,
            rtol=1e-6,
            atol=1e-5,
        )
    compared = ask("compare", PROMPTS[1], several[0], several[1], 0.3, 2)
    assert compared == pytest.approx(reward.compare(PROMPTS[1], several[0], several[1], 0.3, 2), abs=1e-5)


def test_what_the_server_refuses(call: Call, address: str, waits: list[float]) -> None:
    with pytest.raises(InvalidInputError, match=r"token.* token="):
        call(address, "score_latents", *rows(1))
    with pytest.raises(InvalidInputError, match=r"width 12.*sd3"):
        call(address, "score_latents", *rows(1), token="let me in")
    with pytest.raises(InvalidInputError, match=r"5 in one request.* 4"):
        call(address, "score_latents", *rows(5), token="let me in")
    assert waits == []


def test_the_package_names_both() -> None:
    assert dina_lrm.Client is Client
    assert dina_lrm.AsyncClient is AsyncClient
