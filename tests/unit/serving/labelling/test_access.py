"""Who may come in: behind a proxy, from other sites, with and without the token."""

import re
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from dina_lrm.serving.labelling.app import Labelling, create_app
from dina_lrm.serving.labelling.store import VoteStore
from tests.unit.serving.labelling.page import HERE, Page

# --- behind a proxy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", ["/label", ""], ids=["with the prefix", "prefix stripped"])
def test_behind_a_prefix(labelling: Labelling, sent: str) -> None:
    app = create_app(labelling, token="secret", root_path="/label")
    with TestClient(app, base_url="http://label.example.org", follow_redirects=False) as client:
        form = client.get(f"{sent}/", headers={"accept": "text/html"})
        assert 'action="/label/login"' in form.text
        opened = client.post(f"{sent}/login", data={"token": "secret"})
        assert opened.status_code == 303
        assert opened.headers["location"] == "/label/"
        assert "path=/label/;" in opened.headers["set-cookie"].lower()
        cookie = {"cookie": opened.headers["set-cookie"].partition(";")[0]}
        assert client.get(f"{sent}/login", headers=cookie).headers["location"] == "/label/"
        assert "Which picture is better?" in client.get(f"{sent}/", headers=cookie).text
        for path in ("/page.css", "/label.js", "/pictures/0", "/api/next?rater=ada", "/healthz"):
            assert client.get(sent + path, headers=cookie).status_code == 200, path


def test_addresses_in_the_pages_are_relative(client: TestClient) -> None:
    for path in ("/", "/results", "/label.js", "/results.js"):
        assert not re.findall(r"""(?:href=|src=|fetch\(|insist\()["'`]/""", client.get(path).text), path


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("label.example.org", "https://label.example.org", 200),
        ("label.example.org", "https://label.example.org:8443", 200),  # nginx's $host has no port
        ("127.0.0.1:8080", "https://label.example.org", 200),  # a proxy that sends a host of its own
        ("label.example.org", "https://elsewhere.example", 403),
        ("127.0.0.1:8080", "https://127.0.0.1:9999", 403),
        ("elsewhere.example", "https://elsewhere.example", 403),
    ],
)
def test_behind_a_proxy_with_a_name_of_its_own(
    labelling: Labelling, host: str, origin: str, status: int
) -> None:
    app = create_app(labelling, hosts=["label.example.org"], local_hosts=["127.0.0.1"])
    with TestClient(app, base_url=HERE) as client:
        page = Page(client, "ada")
        reply = client.post("/api/votes", json=page.request("left"), headers={"host": host, "origin": origin})
        assert reply.status_code == status


# --- who may come in ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://elsewhere.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_requests_from_other_sites_are_refused(
    client: TestClient, store: VoteStore, headers: dict[str, str]
) -> None:
    page = Page(client, "ada")
    reply = client.post("/api/votes", json=page.request("left"), headers=headers)
    assert reply.status_code == 403
    assert store.votes() == []


@pytest.mark.parametrize("headers", [{"origin": HERE}, {"sec-fetch-site": "same-origin"}, {}])
def test_our_own_page_and_programs_are_let_in(client: TestClient, headers: dict[str, str]) -> None:
    page = Page(client, "ada")
    assert client.post("/api/votes", json=page.request("left"), headers=headers).status_code == 200


def test_a_name_of_another_site_for_this_address_is_refused(client: TestClient) -> None:
    for host in ("elsewhere.example", "elsewhere.example:8080", "127.0.0.1.elsewhere.example", "[", ""):
        assert client.get("/", headers={"host": host}).status_code == 403
    assert client.get("/").status_code == 200


def test_large_bodies_are_refused(client: TestClient) -> None:
    reply = client.post("/api/votes", content=b" " * 20_000, headers={"content-type": "application/json"})
    assert reply.status_code == 413


def test_pages_load_nothing_from_elsewhere(client: TestClient) -> None:
    for path in ("/", "/results", "/page.css", "/label.js", "/results.js"):
        reply = client.get(path)
        assert reply.status_code == 200
        assert "http://" not in reply.text
        assert "https://" not in reply.text
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert reply.headers["x-content-type-options"] == "nosniff"
    for path in ("/docs", "/openapi.json", "/page/label.html", "/nothing"):
        assert client.get(path).status_code == 404


@pytest.fixture
def guarded(labelling: Labelling) -> Iterator[TestClient]:
    app = create_app(labelling, token="a secret ü")
    with TestClient(app, base_url=HERE, follow_redirects=False) as client:
        yield client


def test_nothing_without_the_token(guarded: TestClient, store: VoteStore) -> None:
    for path in ("/", "/results", "/label.js", "/pictures/0", "/api/next?rater=ada", "/api/results"):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"cookie": "dina_lrm_label=wrong"}):
            assert guarded.get(path, headers=headers).status_code == 401, path
    assert guarded.post("/api/votes", json={}).status_code == 401
    page = guarded.get("/", headers={"accept": "text/html"})
    assert page.status_code == 401
    assert 'name="token"' in page.text
    assert guarded.get("/page.css").status_code == 401  # the form has its style with it


def test_the_token_opens_as_a_header(guarded: TestClient) -> None:
    headers = {"authorization": "Bearer a secret ü".encode()}
    assert guarded.get("/api/next?rater=ada", headers=headers).status_code == 200  # type: ignore[arg-type]


def test_the_token_opens_in_a_form(guarded: TestClient) -> None:
    wrong = guarded.post("/login", data={"token": "a secret"})
    assert wrong.status_code == 401
    assert "This is not the token." in wrong.text
    assert "set-cookie" not in wrong.headers
    right = guarded.post("/login", data={"token": "a secret ü"}, headers={"origin": HERE})
    assert right.status_code == 303
    assert "HttpOnly" in right.headers["set-cookie"]
    assert "samesite=strict" in right.headers["set-cookie"].lower()
    assert "secret" not in right.headers["set-cookie"]
    assert guarded.get("/api/next?rater=ada").status_code == 200


def test_the_form_is_refused_from_another_site(guarded: TestClient) -> None:
    reply = guarded.post(
        "/login", data={"token": "a secret ü"}, headers={"origin": "http://elsewhere.example"}
    )
    assert reply.status_code == 403
