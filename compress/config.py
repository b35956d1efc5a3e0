"""All of Hydra: where settings and recipes are found, how recipes become a group, what its errors mean.

Recipes are plain files in a folder, without any header; `RecipeSource` shows such a folder to Hydra as the group
`recipe` whose content belongs at the top of the configuration. Users add folders of their own by
`hydra.searchpath=[recipes://FOLDER]`.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from compress.errors import ConfigError

GROUP = "recipe"
SCHEME = "recipes"
# What composing settings raises when the user asked for something that is not there.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError)


def _home(name: str) -> Path:
    """A folder of settings: inside the package where it was installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


CONF = _home("conf")
RECIPES = _home("recipes")


class RecipeSource(ConfigSource):
    """A folder of recipes as Hydra's group `recipe`; a relative path counts from the working directory."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider=provider, path=path)
        self.folder = Path(self.path).expanduser()
        if not self.folder.is_dir():
            raise ConfigError(f"`hydra.searchpath` has {SCHEME}://{self.path}, but there is no folder {self.path!r}.")

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        path = self._path(config_path)
        return config_path.strip("/") == "" or (path is not None and path.is_dir())

    def is_config(self, config_path: str) -> bool:
        path = self._path(self._normalize_file_name(config_path))
        return path is not None and path.is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        path = self._path(config_path)
        if path is None:
            at_top = config_path.strip("/") == "" and results_filter in (None, ObjectType.GROUP)
            return [GROUP] if at_top else []
        names: set[str] = set()
        for file in path.iterdir():
            if results_filter in (None, ObjectType.CONFIG) and file.suffix == ".yaml" and file.is_file():
                names.add(file.stem)
            if results_filter in (None, ObjectType.GROUP) and file.is_dir():
                names.add(file.name)
        return sorted(names)

    def load_config(self, config_path: str) -> ConfigResult:
        path = self._path(self._normalize_file_name(config_path))
        if path is None or not path.is_file():
            raise ConfigLoadError(f"there is no recipe {config_path!r} in {self.folder}.")
        try:
            config = OmegaConf.load(path)
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
            raise ConfigError(f"the recipe {path} cannot be read: {_one_line(str(error))}") from error
        if not isinstance(config, DictConfig):
            raise ConfigError(f"the recipe {path} must be a mapping such as `stages: ...`.")
        header: dict[str, str | None] = {"package": "_global_"}
        return ConfigResult(provider=self.provider, path=self.full_path(), config=config, header=header)

    def _path(self, config_path: str) -> Path | None:
        head, _, rest = config_path.strip("/").partition("/")
        return self.folder / rest if head == GROUP else None


class RecipeSearchPath(SearchPathPlugin):
    """Puts the recipes that come with the package, and then those of the user's folders, on Hydra's search path."""

    # Hydra makes the plugin without arguments. It knows `hydra.searchpath` itself, but too late for glob(*) and --help.
    added: ClassVar[tuple[str, ...]] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for path in (f"{SCHEME}://{RECIPES}", *self.added):
            search_path.append(provider="compress", path=path)


def register(arguments: Iterable[str]) -> None:
    """Make the recipes known to Hydra, those in the `hydra.searchpath` of these arguments too; before `hydra.main`."""
    searchpaths = [argument for argument in arguments if argument.startswith("hydra.searchpath=")]
    values = [override.value() for override in OverridesParser.create().parse_overrides(searchpaths)]
    paths = [path for value in values if isinstance(value, list) for path in value]
    RecipeSearchPath.added = tuple(str(path) for path in paths if str(path).startswith(f"{SCHEME}://"))
    Plugins.instance().register(RecipeSource)
    Plugins.instance().register(RecipeSearchPath)
    OmegaConf.register_new_resolver("compress.recipes", _recipe_list, replace=True)
    OmegaConf.register_new_resolver("compress.scratch", lambda: _scratch().name, replace=True)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    # Hydra's sweeper insists on leaving a multirun.yaml somewhere; this folder vanishes with the process.
    return tempfile.TemporaryDirectory(prefix="compress-")


def recipes(folders: Iterable[Path] = ()) -> dict[str, str]:
    """Each recipe's name, and what it does: the first comment line of its file."""
    found: dict[str, str] = {}
    for folder in (RECIPES, *folders):
        for file in sorted(folder.glob("*.yaml")):
            first = file.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
            found.setdefault(file.stem, first.lstrip("# ").strip() if first.startswith("#") else "")
    return found


def _recipe_list(searchpath: Sequence[str]) -> str:
    prefix = f"{SCHEME}://"
    folders = [Path(path[len(prefix) :]) for path in searchpath if path.startswith(prefix)]
    return "".join(f"  {name:<14} {text}\n" for name, text in sorted(recipes(folders).items()))


# Settings that a recipe leaves out are added instead of overridden, so that nobody has to know which ones it has;
# what does not exist is found later, when stages and factories are checked against their own signatures.
_OPEN = re.compile(r"(stages|model|data)\.[\w.]+=")


def opened(arguments: Iterable[str]) -> list[str]:
    """Command-line arguments, with "stages.shift.gate=macs" as Hydra's "++stages.shift.gate=macs"."""
    return [f"++{argument}" if _OPEN.match(argument) else argument for argument in arguments]


# Hydra answers `model=null` or `model=3` with a traceback, and lays the files of `model=[a,b]` over each other.
_GROUP = re.compile(r"(recipe|model|data|hydra/\w+)=")


def require_names(arguments: Iterable[str]) -> None:
    """Raise `ConfigError` where a group is given something other than a name, or names to sweep over."""
    groups = [argument for argument in arguments if _GROUP.match(argument)]
    for override in OverridesParser.create().parse_overrides(groups):
        value = override.value()
        given = value.list if isinstance(value, ChoiceSweep) else [value]
        if not all(isinstance(each, str | QuotedString | Glob) for each in given):
            shown = str(override.input_line).partition("=")[2]
            raise ConfigError(f"`{override.key_or_group}` (={shown}) must be a name; --help lists them.")


def _closed(argument: str) -> str:
    return argument[2:] if argument.startswith("++") and _OPEN.match(argument[2:]) else argument


@dataclass(frozen=True)
class Job:
    """One run as it was asked for: its plain settings, the recipe's name, the command that starts it again."""

    settings: dict[str, Any]
    recipe: str
    command: str


def job(cfg: DictConfig) -> Job:
    """The composed configuration as plain values, inside Hydra's task function.

    Raises:
        ConfigError: the recipe stands in two folders, or no recipe was chosen.
    """
    hydra = HydraConfig.get()
    recipe = hydra.runtime.choices.get(GROUP)
    folders = list(dict.fromkeys(Path(s.path) for s in hydra.runtime.config_sources if s.schema == SCHEME))
    homes = [folder for folder in folders if recipe and (folder / f"{recipe}.yaml").is_file()]
    if len(homes) > 1:
        raise ConfigError(f"`recipe` (={recipe}) stands in {homes[0]} and in {homes[1]}; rename one of the two.")
    if not recipe and not cfg.stages:
        raise ConfigError(f"`recipe` must be given; choose from {', '.join(sorted(recipes(folders)))}.")
    settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(settings, dict)
    asked = [*hydra.overrides.task, *(o for o in hydra.overrides.hydra if not o.startswith("hydra.mode="))]
    command = "python -m compress " + shlex.join(_closed(override) for override in asked)
    return Job({str(key): value for key, value in settings.items()}, recipe or "none", command.strip())


def explain(error: BaseException) -> str:
    """An error of composing settings as one clear line."""
    if isinstance(error, MissingMandatoryValue):
        return f"`{error.full_key}` must be given." if error.full_key else _one_line(str(error))
    if isinstance(error, OverrideParseException):
        return f"the argument {error.override!r} cannot be read: {_one_line(error.message.partition('See https')[0])}."
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if group:
            return f"`{group}` (={name}) is not known; choose from {', '.join(sorted(error.options))}."
    text = str(error).partition("Config search path:")[0]
    unknown = re.match(r"Could not override '([^']+)'", text)
    if unknown and "not in struct" in f"{text}{error.__cause__}":
        key = unknown.group(1)
        return f"`{key}` is not a setting; --help lists them."
    cause = f" {error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
    return _one_line(text + cause)


def _one_line(text: str) -> str:
    return "; ".join(line.strip().rstrip(":") for line in text.splitlines() if line.strip())
