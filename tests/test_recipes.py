"""Recipes as a Hydra group: folders of files, what is no recipe, and what the ones here say of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.object_type import ObjectType

from compress import config
from compress.errors import ConfigError


def test_a_recipe_folder_is_a_group(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("# Mine.\nstages: {a: {taps: 1}}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "deep.yaml").write_text("stages: {}\n")
    (tmp_path / "notes.txt").write_text("x")
    source = config.RecipeSource("test", f"recipes://{tmp_path}")
    assert source.is_group("recipe") and source.is_group("recipe/sub") and not source.is_group("model")
    assert source.is_config("recipe/mine") and source.is_config("recipe/sub/deep") and not source.is_config("mine")
    assert source.list("", None) == ["recipe"]
    assert source.list("recipe", ObjectType.CONFIG) == ["mine"]
    assert source.list("recipe", ObjectType.GROUP) == ["sub"]
    loaded = source.load_config("recipe/mine")
    assert loaded.header["package"] == "_global_"
    assert loaded.config.stages.a.taps == 1
    assert config.recipes([tmp_path])["mine"] == "Mine."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [", "cannot be read"),
        ("- a\n", "must be a mapping"),
        ("a: 1\na: 2\n", "found duplicate key a"),
        ("\x00", "cannot be read"),
    ],
)
def test_a_recipe_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    source = config.RecipeSource("test", f"recipes://{tmp_path}")
    with pytest.raises(ConfigError, match=message) as caught:
        source.load_config("recipe/bad")
    assert "bad.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_folder_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"`hydra.searchpath` has recipes://nope, but there is no folder 'nope'"):
        config.RecipeSource("test", "recipes://nope")


def test_settings_that_a_recipe_leaves_out_may_be_given() -> None:
    given = ["recipe=a", "stages.shift.gate=macs", "~stages.x", "+a=1", "model.weights=f", "model=b", "seed=1"]
    assert config.opened(given) == [
        "recipe=a",
        "++stages.shift.gate=macs",
        "~stages.x",
        "+a=1",
        "++model.weights=f",
        "model=b",
        "seed=1",
    ]


@pytest.mark.parametrize("name", sorted(file.stem for file in config.RECIPES.glob("*.yaml")))
def test_every_recipe_opens_with_what_it_does_and_its_command(name: str) -> None:
    lines = (config.RECIPES / f"{name}.yaml").read_text().splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert config.recipes()[name]
    assert any(f"python -m compress recipe={name}" in line for line in header)
    assert any(line.startswith("# Measured") for line in header)
