"""What stands in deploy/ is valid, and says what the server understands."""

import configparser
import re
import shlex
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from dina_lrm.cli.serve import read
from dina_lrm.serving.metrics import Metrics
from dina_lrm.serving.settings import ENVIRONMENT, ServerSettings

DEPLOY = Path(__file__).parents[3] / "deploy"
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "reward.yaml").read_text()))


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda one: one["kind"])
def test_kubernetes_takes_the_manifests(manifest: dict) -> None:
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_the_manifests_fit_each_other_and_the_server() -> None:
    kinds = {one["kind"]: one for one in MANIFESTS}
    pod = kinds["Deployment"]["spec"]["template"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert kinds[kind]["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    assert kinds["Service"]["spec"]["selector"] == pod["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    read(container["args"])
    names = [one["name"].removeprefix(ENVIRONMENT).lower() for one in container["env"]]
    assert set(names) <= set(ServerSettings.__annotations__)
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] in ("/healthz", "/readyz")
    (metric,) = kinds["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"].encode() in Metrics().text()


def test_the_systemd_unit_is_complete() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string((DEPLOY / "dina-lrm.service").read_text())
    command = shlex.split(unit["Service"]["ExecStart"])
    assert command[1:3] == ["serve", "--config"]
    assert unit["Service"]["ExecReload"].endswith("-HUP $MAINPID")
    assert int(unit["Service"]["LimitNOFILE"]) > ServerSettings.max_connections


@pytest.mark.parametrize("name", ["nginx.conf", "traefik.yaml"])
def test_the_command_beside_a_proxy_is_one(name: str) -> None:
    text = (DEPLOY / "proxies" / name).read_text()
    found = re.search(r"dina-lrm serve (.*)", text)
    assert found
    settings = read(shlex.split(found[1])).settings
    assert settings.root_path == "/reward"
    assert settings.root_path in text.replace(found[0], "")
    assert settings.hosts[0] in text.replace(found[0], "")
