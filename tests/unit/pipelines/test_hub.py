"""To the hub and back, against a hub of the test's own; one sentence for each fault on the way."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dina_lrm import CheckpointError, HubError, InvalidInputError, RewardModel
from tests.fake_hub import TOKEN, FakeHub, fake_hub, use_hub
from tests.tiny import make_tiny_reward, tiny_conditioning, tiny_latents

# huggingface_hub hands large files to its HTTP library in a way that this library asks it to change.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "someone/my-reward"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "cache")
        yield hub


def score(model: RewardModel) -> Tensor:
    return model.score_latents(tiny_latents(), tiny_conditioning(), seed=0).detach()


@pytest.mark.parametrize("layout", ["dina", "published"])
def test_round_trip(hub: FakeHub, tiny_backbone: Path, layout: str) -> None:
    model = make_tiny_reward(tiny_backbone)
    address = model.push_to_hub(NAME, layout=layout)
    sha = hub.repositories[NAME].refs["main"]
    assert address == f"{hub.url}/{NAME}/commit/{sha}"
    assert not hub.repositories[NAME].private
    assert torch.equal(score(RewardModel.from_pretrained(NAME, tiny_backbone)), score(model))


def test_revisions_of_a_reward(hub: FakeHub, tiny_backbone: Path) -> None:
    first, second = (make_tiny_reward(tiny_backbone, lora_rank=rank) for rank in (2, 0))
    first.push_to_hub(NAME, private=True, commit_message="the first")
    repository = hub.repositories[NAME]
    repository.refs["v1"] = repository.refs["main"]
    second.push_to_hub(NAME, token=TOKEN)
    assert repository.private
    assert list(repository.messages.values()) == ["initial commit", "the first", "DiNa-LRM reward"]
    assert torch.equal(score(RewardModel.from_pretrained(NAME, tiny_backbone, revision="v1")), score(first))
    assert torch.equal(score(RewardModel.from_pretrained(NAME, tiny_backbone)), score(second))
    paths = repository.commits[repository.refs["main"]]
    assert not [path for path in paths if path.startswith("backbone_adapter")], "of the first, and no more"
    assert ".gitattributes" in paths


def test_files_that_are_no_checkpoints_stay(hub: FakeHub, tiny_backbone: Path) -> None:
    model = make_tiny_reward(tiny_backbone)
    model.push_to_hub(NAME)
    repository = hub.repositories[NAME]
    _, files = repository.files("main") or ("", {})
    repository.commit(files | {"samples/a.png": b"a picture"}, "pictures")
    model.push_to_hub(NAME)
    assert repository.commits[repository.refs["main"]]["samples/a.png"] == b"a picture"


@pytest.mark.parametrize(
    ("backbone_id", "expected"),
    [("someone/pipeline", ["base_model: someone/pipeline"]), ("bundled", []), ("/a/folder", [])],
)
def test_the_card_names_the_base_model(
    hub: FakeHub, tiny_backbone: Path, backbone_id: str, expected: list[str]
) -> None:
    """Where it is one that the hub can show; it refuses a card that names something else."""
    from dataclasses import replace

    model = make_tiny_reward(tiny_backbone)
    model.config = replace(model.config, backbone_id=backbone_id)
    model.push_to_hub(NAME)
    card = hub.repositories[NAME].commits[hub.repositories[NAME].refs["main"]]["README.md"].decode()
    header = card.split("---")[1]
    assert [line for line in header.splitlines() if "base_model" in line] == expected


def readme(hub: FakeHub) -> str:
    return hub.repositories[NAME].commits[hub.repositories[NAME].refs["main"]]["README.md"].decode()


@pytest.mark.parametrize("layout", ["dina", "published"])
def test_measured_figures_go_along(hub: FakeHub, tiny_backbone: Path, tmp_path: Path, layout: str) -> None:
    """From the run's folder to the hub, from there to a folder, and to the hub again."""
    figures = "## Training\n\n- 12 steps\n\n## Validation\n\n| 0.4 (default) | 71.5 |"
    run = make_tiny_reward(tiny_backbone).save_pretrained(tmp_path / "run", layout, model_card=figures)
    RewardModel.from_pretrained(run, tiny_backbone).push_to_hub(NAME, layout=layout)
    assert readme(hub) == (run / "README.md").read_text()
    fetched = RewardModel.from_pretrained(NAME, tiny_backbone)
    assert fetched.card == figures
    fetched.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/README.md").read_text().count(figures) == 1
    fetched.card = None
    fetched.push_to_hub(NAME)
    assert "Validation" not in readme(hub)


# --- faults


def test_uploading_without_a_token(
    hub: FakeHub, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"write access.* `hf auth login`"):
        make_tiny_reward(tiny_backbone).push_to_hub(NAME)
    assert not hub.repositories


def test_uploading_with_a_token_that_is_not_accepted(hub: FakeHub, tiny_backbone: Path) -> None:
    with pytest.raises(HubError, match=f"'{NAME}'.* {hub.url} .*token"):
        make_tiny_reward(tiny_backbone).push_to_hub(NAME, token="hf_wrong")


@pytest.mark.parametrize("name", ["my-reward", "a/b/c", "", "some one/reward"])
def test_names_that_are_no_repository(hub: FakeHub, tiny_backbone: Path, name: str) -> None:
    with pytest.raises(InvalidInputError, match=f"repo_id = '{name}': it must be owner/name"):
        make_tiny_reward(tiny_backbone).push_to_hub(name)


def test_no_such_repository(hub: FakeHub) -> None:
    with pytest.raises(CheckpointError, match=f"there is no repository {NAME} at {hub.url}") as caught:
        RewardModel.from_pretrained(NAME)
    assert "\n" not in str(caught.value)


def test_no_such_revision(hub: FakeHub, tiny_backbone: Path) -> None:
    make_tiny_reward(tiny_backbone).push_to_hub(NAME)
    with pytest.raises(CheckpointError, match=f"{NAME} has no branch, tag or commit 'v7'"):
        RewardModel.from_pretrained(NAME, tiny_backbone, revision="v7")


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_backbone: Path) -> None:
    model = make_tiny_reward(tiny_backbone)
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path)
    with pytest.raises(CheckpointError, match=r"http://127.0.0.1:9 cannot be reached"):
        RewardModel.from_pretrained(NAME)
    with pytest.raises(HubError, match=rf"uploading to '{NAME}' failed: .*\(http://127.0.0.1:9\)$") as caught:
        model.push_to_hub(NAME)
    assert "\n" not in str(caught.value)


def test_a_loaded_reward_is_there_without_network(
    hub: FakeHub, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = make_tiny_reward(tiny_backbone)
    model.push_to_hub(NAME)
    RewardModel.from_pretrained(NAME, tiny_backbone)
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert torch.equal(score(RewardModel.from_pretrained(NAME, tiny_backbone)), score(model))
