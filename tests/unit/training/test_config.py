"""Configs and recipes: complete, serialisable, strict about names, true to the paper."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dina_lrm.errors import InvalidInputError
from dina_lrm.files import json_types
from dina_lrm.recipes.training import recipe, recipe_names
from dina_lrm.runs.config import OptimizerConfig
from dina_lrm.training.config import DataConfig, LossConfig, TrainConfig, ValidationConfig


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_survives_json(name: str) -> None:
    config = recipe(name)
    assert json.loads(json.dumps(json_types(config))) == json_types(config)
    assert config.output is not None
    assert Path(config.output).name == name


def test_the_published_recipe_has_the_published_values() -> None:
    config = recipe("sd35m-12-layers")
    model = config.model
    assert (model.num_blocks, model.image_taps, model.text_taps) == (12, (4, 8, 12), (4, 8, 12))
    assert (model.tuning, model.lora_rank, model.lora_alpha) == ("lora", 64, 128.0)
    assert (model.head.num_queries, model.head.num_attention_heads, model.head.width) == (4, 8, None)
    assert (config.optimizer.learning_rate, config.optimizer.ema_decay) == (5e-5, 0.995)
    assert config.noise.distribution == "uniform"
    loss = config.loss
    assert (loss.likelihood, loss.loss, loss.slope, loss.floor) == ("thurstone", "fidelity", 2.0, 0.05)


@pytest.mark.parametrize("name", recipe_names())
def test_no_recipe_names_pairs_of_its_own_beside_shapes(name: str) -> None:
    """A user who gives --data.train alone is validated on a part of it."""
    data = recipe(name).data
    assert data.train == ("shapes" if name.startswith("shapes") else None)
    assert data.validation == "auto"


def test_a_variant_differs_only_where_it_says() -> None:
    base, variant = recipe("shapes"), recipe("shapes-constant-variance")
    assert variant.loss.likelihood == "thurstone_constant"
    assert dataclasses.replace(variant, loss=base.loss, output=base.output) == base


def test_an_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(InvalidInputError, match=r"'shape'; known: shapes, .*sd35m-12-layers"):
        recipe("shape")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, r"num_steps = 0: must be in \[1, "),
        ({"batch_size": 10, "accumulation_steps": 4}, "multiple of accumulation_steps = 4"),
        ({"ensemble_fraction": 1.5}, r"ensemble_fraction = 1.5: must be in \[0, 1\]"),
        ({"ensemble_fraction": 0.5, "ensemble_sizes": (1,)}, "sizes of at least 2"),
        ({"time_budget_seconds": 0.0}, "must be positive"),
        ({"validation": ValidationConfig(noise_levels=(1.2,))}, r"noise level = 1.2: must be in \[0, 1\]"),
        ({"validation": ValidationConfig(noise_levels=(), ensembles=())}, "at least one level"),
        ({"optimizer": OptimizerConfig(learning_rate=0.0)}, "must be positive"),
        ({"optimizer": OptimizerConfig(learning_rate=float("inf"))}, "must be positive"),
        ({"num_steps": 10**30}, r"num_steps = 10+: must be in \[1, 1,000,000,000\]"),
        ({"seed": -1}, "seed = -1: must be at least 0"),
        ({"data": DataConfig(validation_fraction=1.0)}, r"data\.validation_fraction = 1\.0: must be between"),
        ({"data": DataConfig(max_validation_pairs=0)}, r"data\.max_validation_pairs = 0: must be at least 1"),
        ({"validation": ValidationConfig(max_pairs=0)}, r"validation\.max_pairs = 0: must be at least 1"),
        ({"optimizer": OptimizerConfig(ema_decay=1.0)}, r"in \[0, 1\)"),
    ],
)
def test_values_out_of_range_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        TrainConfig(**change)


def test_every_field_explains_itself() -> None:
    """A string under each field: it is the help of the command line."""
    import ast

    import dina_lrm.training.config as module

    tree = ast.parse(Path(module.__file__).read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    assert documented, f"{node.name}.{ast.unparse(field.target)}"


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LossConfig().slope = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        ("DEEPSPEED", None, "DEEPSPEED.*use FSDP with fsdp_version: 2"),
        ("FSDP", {"fsdp_version": 1}, "use fsdp_version: 2"),
        ("FSDP", {"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading: false"),
        ("FSDP", {"activation_checkpointing": True}, "fsdp_activation_checkpointing: false"),
        ("FSDP", {"compile": True}, "compile = false"),
        ("FSDP", {"model": True}, "this model has eta3, eta4"),
    ],
)
def test_configurations_that_cannot_work_are_refused_by_name(
    kind: str, settings: dict[str, Any] | None, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from dina_lrm.models.head import LogisticSquash
    from dina_lrm.runs.distribution import check_distribution

    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin writes to the environment
    settings = None if settings is None else {"fsdp_version": 2, **settings}
    compiled = settings is not None and settings.pop("compile", False)
    model = LogisticSquash() if settings and settings.pop("model", False) else torch.nn.Linear(2, 2)
    plugin = None if settings is None else FullyShardedDataParallelPlugin(**settings)
    with pytest.raises(InvalidInputError, match=named):
        check_distribution(DistributedType(kind), plugin, model, compile=compiled)


@pytest.mark.parametrize(("kind", "version"), [("NO", None), ("MULTI_CPU", None), ("FSDP", 2)])
def test_one_process_ddp_and_fsdp2_are_taken(kind: str, version: int | None) -> None:
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from dina_lrm.runs.distribution import check_distribution

    plugin = None if version is None else FullyShardedDataParallelPlugin(fsdp_version=version)
    check_distribution(DistributedType(kind), plugin, torch.nn.Linear(2, 2), compile=False)
