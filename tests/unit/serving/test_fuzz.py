"""Strangers at the door: mutated safetensors bodies, and requests made up from the OpenAPI document."""

import json
import random
import struct
from collections import Counter
from typing import Any

import pytest
import schemathesis
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from safetensors.torch import save
from schemathesis import GenerationMode
from torch import Tensor

from dina_lrm.remote.protocol import FIELDS
from tests.unit.serving.conftest import HEADERS

DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "X", 3]


def mutated(body: bytes, rng: random.Random) -> bytes:
    """A body with something wrong in its bytes, or in its header, which is written anew."""
    size = struct.unpack("<Q", body[:8])[0]
    kind = rng.randrange(8)
    if kind == 0:
        return body[: rng.randrange(len(body))]
    if kind == 1:
        changed = bytearray(body)
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if kind == 2:  # in the header, where a byte counts for more
        changed = bytearray(body)
        changed[rng.randrange(8 + size)] = rng.randrange(256)
        return bytes(changed)
    if kind == 3:
        return rng.randbytes(rng.randrange(200))
    if kind == 4:
        return struct.pack("<Q", rng.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1))) + body[8:]
    header: dict[str, Any] = json.loads(body[8 : 8 + size])
    name = rng.choice(FIELDS)
    if kind == 5:
        header[name]["dtype"] = rng.choice(DTYPES)
    elif kind == 6:
        shape = header[name]["shape"]
        header[name]["shape"] = rng.choice(
            ([], shape[::-1], [*shape, 1], shape[1:], [0, *shape[1:]], [-1], [2**62, 4], "x", [1.5], None)
        )
    else:
        part = rng.choice(("shape", "data_offsets", "dtype", None, "renamed"))
        if part is None:
            del header[name]
        elif part == "renamed":
            header[rng.choice(("x", "", "__metadata__", "latents\x00"))] = header.pop(name)
        else:
            header[name][part] = rng.choice(([0, 0], [5, 1], [0, 2**63], {}, None, "é", []))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body[8 + size :]


def outlast(client: TestClient, tensors: dict[str, Tensor], count: int) -> Counter[int]:
    """Send mutated bodies; every answer is 200 or names what is wrong."""
    body, rng, statuses = save(tensors), random.Random(0), Counter[int]()
    expected = client.post("/v1/score", content=body, headers=HEADERS).json()["raw_scores"]
    for _ in range(count):
        reply = client.post("/v1/score", content=mutated(body, rng), headers=HEADERS)
        statuses[reply.status_code] += 1
        assert reply.status_code in (200, 413, 422), reply.text
        if reply.status_code == 200:
            assert all(map(torch.isfinite, torch.tensor(reply.json()["raw_scores"])))
        else:
            assert reply.json()["error"]
    again = client.post("/v1/score", content=body, headers=HEADERS).json()["raw_scores"]
    assert again == pytest.approx(expected, rel=1e-6)
    return statuses


@pytest.mark.long
def test_a_thousand_mutated_bodies(client: TestClient, tensors: dict[str, Tensor]) -> None:
    statuses = outlast(client, tensors, 1000)
    assert statuses[422] > 500
    assert statuses[200] > 50  # bits of a latent may be flipped without harm: these were really scored


@pytest.mark.slow
def test_ten_thousand_mutated_bodies(client: TestClient, tensors: dict[str, Tensor]) -> None:
    statuses = outlast(client, tensors, 10_000)
    print(dict(statuses))
    assert sum(statuses.values()) == 10_000


CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
]


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("route", ["/v1/score", "/v1/score/images", "/v1/compare"])
def test_requests_made_up_from_openapi(address: str, route: str, mode: GenerationMode) -> None:
    """Right ones and wrong ones: no fault of the server, and every answer is one that is documented."""
    operation = schemathesis.openapi.from_url(f"{address}/openapi.json")[route]["POST"]
    checks = schemathesis.checks.CHECKS.get_by_names(CHECKS)
    statuses = Counter[int]()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=50,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def call(case: Any) -> None:
        response = case.call(base_url=address)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=checks)

    call()
    assert sum(statuses.values()) >= 10
    assert max(statuses) < 500
