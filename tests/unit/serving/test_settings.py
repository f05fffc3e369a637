"""Settings from the command line, a file and the environment."""

import re
from pathlib import Path

import pytest

from dina_lrm.cli.serve import read
from dina_lrm.errors import InvalidInputError
from dina_lrm.serving.settings import ServerSettings, settings_from


def test_settings_come_from_a_file_and_the_environment_goes_before_it(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('model = ["a=bundled", "b=/runs/b"]\nmax_rows = 7\npage = false\nmax_wait_ms = 3\n')
    environment = {
        "DINA_LRM_MAX_ROWS": "9",
        "DINA_LRM_HOSTS": "a.example, b.example",
        "DINA_LRM_TOKEN": "s3cret",
        "DINA_LRM_DTYPE": "bfloat16",
        "DINA_LRM_PORT": "",
    }
    found = settings_from(file, environment)
    assert found.models == (("a", "bundled"), ("b", "/runs/b"))
    assert (found.max_rows, found.page, found.max_wait_ms) == (9, False, 3.0)
    assert (found.hosts, found.token, found.dtype) == (("a.example", "b.example"), "s3cret", "bfloat16")
    assert found.port == ServerSettings.port


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("max_row = 7", {}, "'max_row' is no setting; max_rows is one"),
        ("weather = 7", {}, "'weather' is no setting; there are model, pipeline"),
        ("", {"DINA_LRM_MAX_ROW": "7"}, "DINA_LRM_MAX_ROW is no setting; DINA_LRM_MAX_ROWS is one"),
        ("", {"DINA_LRM_max_rows": "7"}, "DINA_LRM_max_rows is no setting; DINA_LRM_MAX_ROWS is one"),
        ("", {"DINA_LRM_TOKEN": " "}, "DINA_LRM_TOKEN is empty"),
        ("", {"DINA_LRM_TOKEN": ""}, "DINA_LRM_TOKEN is empty"),
        ("", {"DINA_LRM_HOSTS": "a b"}, "hosts: 'a b' is no name of a host"),
        ('hosts = ["a:8000"]', {}, "hosts: 'a:8000' is no name of a host"),
        ("max_rows = true", {}, "max_rows = true: true and false are for page alone"),
        ("max_wait_ms = inf", {}, "max_wait_ms = inf: must be a finite number, at least 0"),
        ("", {"DINA_LRM_BODY_SECONDS": "inf"}, "body_seconds = inf: must be a finite number, above 0"),
        ("max_body_mib = nan", {}, "max_body_mib = nan: must be a finite number, above 0"),
        ('hosts = ["10.0.0.0/8"]', {}, "hosts: '10.0.0.0/8' is no name of a host"),
        ('cors_origins = ["*"]', {}, "cors_origins: '*' is no origin"),
        ('cors_origins = ["https://a.example/"]', {}, "is no origin, such as https://friend.example"),
        ('root_path = "/.."', {}, "root_path = '/..'"),
        ("", {"DINA_LRM_HOST": " "}, "host is empty"),
        ('proxies = ["10.1.2.3/8"]', {}, "'10.1.2.3/8' is neither an address nor a network"),
        ('model = ["a b=bundled"]', {}, "model: 'a b' cannot name 'bundled'"),
        ('root_path = "//evil"', {}, "root_path = '//evil'"),
        ('root_path = "/a b"', {}, "root_path = '/a b'"),
        ('token = "x"', {}, "give the token in the environment, as DINA_LRM_TOKEN"),
        ("max_rows = 'many'", {}, "max_rows = 'many': input should be a valid integer"),
        ("max_rows = ", {}, "cannot be read"),
        ("", {"DINA_LRM_DTYPE": "float8"}, "DINA_LRM_DTYPE: dtype = 'float8'"),
        ("max_rows = 0", {}, "max_rows = 0: must be a whole number, at least 1"),
        ("max_queue_tokens = 5", {}, "max_queue_tokens = 5: must be at least max_request_tokens"),
        ('proxies = ["example.org"]', {}, "'example.org' is neither an address nor a network"),
        ('root_path = "reward/"', {}, "root_path = 'reward/'"),
        ("model = []", {}, "one model or more"),
        ('model = ["a=x", "a=y"]', {}, "a name of its own"),
    ],
)
def test_wrong_settings_are_named(
    tmp_path: Path, text: str, environment: dict[str, str], message: str
) -> None:
    (tmp_path / "serve.toml").write_text(text)
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        settings_from(tmp_path / "serve.toml", environment)


def test_what_kubernetes_puts_beside_the_settings_is_none_of_them() -> None:
    environment = {
        "DINA_LRM_PORT": "tcp://10.96.0.7:8000",
        "DINA_LRM_SERVICE_HOST": "10.96.0.7",
        "DINA_LRM_SERVICE_PORT": "8000",
        "DINA_LRM_SERVICE_PORT_HTTP": "8000",
        "DINA_LRM_PORT_8000_TCP": "tcp://10.96.0.7:8000",
        "DINA_LRM_PORT_8000_TCP_ADDR": "10.96.0.7",
        "DINA_LRM_TRACEBACK": "1",
        "DINA_LRM_GOLDEN": "tensors",
        "DINA_LRM_CONFIG": "elsewhere.toml",
    }
    assert settings_from(None, environment) == ServerSettings()


def test_the_environment_may_name_the_file_of_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "serve.toml").write_text("max_rows = 7\n")
    (tmp_path / "typed.toml").write_text("max_rows = 8\n")
    monkeypatch.setenv("DINA_LRM_CONFIG", str(tmp_path / "serve.toml"))
    assert read([]).settings.max_rows == 7
    assert read(["--config", str(tmp_path / "typed.toml")]).settings.max_rows == 8


def test_localhost_alone_is_known_where_anybody_may_call() -> None:
    assert "localhost" in (ServerSettings().known_hosts or ())
    assert ServerSettings(token="x").known_hosts is None
    assert ServerSettings(host="0.0.0.0").known_hosts is None
    assert ServerSettings(host="0.0.0.0", hosts=("r.example",)).known_hosts == ("r.example",)
