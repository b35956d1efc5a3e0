"""`python -m compress`: what it says and how it ends, for good input and bad. The run itself is stood in for."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from compress import config
from compress.__main__ import main
from compress.errors import CheckpointError, TrainingError

RECIPES = sorted(file.stem for file in (Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))

TOYS = """\
# Two toys.
stages:
  toy: {_target_: test_config.Toy, taps: 3}
  polish: {_target_: test_config.Polish}
export: [onnx]
"""
MODEL = ["model._target_=test_config.net", "model.train._target_=test_config.Polish", "~model.train.epochs",
         "~model.train.lr", "~model.train.weight_decay"]  # fmt: skip
ASK = ["recipe=toys", "hydra.searchpath=[recipes://mine]", *MODEL]


class Runs(list[dict[str, Any]]):
    """The runs that were started; `raises` is raised by each of them."""

    raises: BaseException | None = None


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runs:
    """An empty working directory with a recipe of one's own, and a stand-in for `compress.run.run`."""
    started = Runs()

    def run(stages: Any, task: Any, **rest: Any) -> None:
        started.append({"stages": stages, "task": task, **rest})
        if started.raises is not None:
            raise started.raises
        (rest["out"] / "report.json").write_text("{}")

    module = ModuleType("compress.run")
    module.run = run  # type: ignore[attr-defined]  # a stand-in
    monkeypatch.setitem(sys.modules, "compress.run", module)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "toys.yaml").write_text(TOYS)
    return started


Ask = Callable[..., tuple[int, str]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run the command line in this process: its exit code and what it printed to stderr."""

    def ask(*arguments: str) -> tuple[int, str]:
        code = main(arguments)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.err

    return ask


def test_a_run_gets_what_was_asked_for(runs: Runs, ask: Ask, tmp_path: Path) -> None:
    assert ask(*ASK, "stages.toy.taps=2", "stages.toy.rate=2", "seed=5", "cache=off", "measure=none") == (0, "")
    (run,) = runs
    assert list(run["stages"]) == ["toy", "polish"]
    assert (run["stages"]["toy"].taps, run["stages"]["toy"].rate) == (2, 2.0)
    assert run["build"] == ("test_config.net", {"classes": 10, "channels": 1})
    assert (run["task"].seed, run["export"], run["measure"], run["cache"]) == (5, ("onnx",), "none", None)
    assert run["out"] == Path("outputs/runs/toys-small-digits")
    assert run["recipe"] == "toys"
    assert run["command"].startswith("python -m compress recipe=toys ")
    assert " stages.toy.taps=2 " in run["command"]
    assert "'hydra.searchpath=[recipes://mine]'" in run["command"]
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()) == [
        "mine/toys.yaml",
        "outputs/runs/toys-small-digits/report.json",
    ]


def test_the_command_in_the_report_asks_for_the_same(runs: Runs, ask: Ask) -> None:
    import shlex

    ask(*ASK, "stages.toy.taps=2")
    ask(*shlex.split(runs[0]["command"])[3:])
    assert runs[0]["stages"] == runs[1]["stages"]
    assert runs[0]["command"] == runs[1]["command"]


def test_runs_do_not_write_over_each_other(runs: Runs, ask: Ask) -> None:
    for _ in range(3):
        ask(*ASK, "out=here")
    assert [str(run["out"]) for run in runs] == ["here", "here-2", "here-3"]


def test_a_sweep_is_one_run_after_another(runs: Runs, ask: Ask, tmp_path: Path) -> None:
    code, said = ask("-m", *ASK, "stages.toy.taps=1,2,3")
    assert code == 0
    assert [run["stages"]["toy"].taps for run in runs] == [1, 2, 3]
    assert len({run["out"] for run in runs}) == 3
    assert "run 2 of 3: python -m compress recipe=toys" in said and "stages.toy.taps=2" in said
    assert not list(tmp_path.rglob("multirun.yaml"))


def test_a_sweep_over_recipes(runs: Runs, ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "mine" / "toys2.yaml").write_text(TOYS)
    code, _ = ask("-m", "recipe=glob(toys*)", *ASK[1:])
    assert code == 0
    assert [run["recipe"] for run in runs] == ["toys", "toys2"]
    assert [run["out"].name for run in runs] == ["toys-small-digits", "toys2-small-digits"]


def test_a_sweep_is_checked_whole_before_it_starts(runs: Runs, ask: Ask) -> None:
    code, said = ask("-m", *ASK, "stages.toy.taps=3,0")
    assert (code, runs) == (2, [])
    assert said.startswith("error: `stages.toy`: `taps` (=0) must be at least 1. [python -m compress recipe=toys")


BAD = {
    "no recipe": ([], f"`recipe` must be given; choose from {', '.join(RECIPES)}"),
    "unknown recipe": (["recipe=nope"], f"`recipe` (=nope) is not known; choose from {', '.join(RECIPES)}"),
    "unknown model": ([*ASK, "model=nope"], "`model` (=nope) is not known; choose from alexnet, "),
    "unknown data": ([*ASK, "data=nope"], "`data` (=nope) is not known; choose from cifar10, digits"),
    "unknown setting": ([*ASK, "sed=1"], "`sed` is not a setting; --help lists them."),
    "added setting": ([*ASK, "+sed=1"], "`sed` is not a setting; see --help."),
    "unknown stage": ([*ASK, "stages.tyo.taps=1"], "`stages.tyo` (={'taps': 1}) is not a stage: it has no `_target_`"),
    "unknown stage setting": ([*ASK, "stages.toy.tap=1"], "`stages.toy.tap` is not a setting of Toy; did you mean"),
    "unknown stage class": ([*ASK, "stages.toy._target_=test_config.Tyo"], "(=test_config.Tyo) does not exist"),
    "wrong type": ([*ASK, "stages.toy.taps=x"], "`stages.toy.taps` (=x) must be of type int"),
    "removed twice": ([*ASK, "~stages.none"], "Could not delete from config. 'stages.none' does not exist."),
    "no stages": ([*ASK, "~stages.toy", "~stages.polish"], "`stages` must name at least one stage"),
    "pattern": ([*ASK, "stages.toy.exclude=[x*]"], "`exclude` has the pattern 'x*', which matches no layer"),
    "syntax": ([*ASK, "seed=[1"], "the argument 'seed=[1' cannot be read: "),
    "no equals sign": ([*ASK, "fast"], "the argument 'fast' cannot be read: "),
    "empty sweep": (["-m", "recipe=glob(nope*)"], "the sweep has no runs: a glob(...) in it matches nothing."),
    "sweep without -m": ([*ASK, "seed=1,2"], "--multirun"),
    "missing folder": (["recipe=x", "hydra.searchpath=[recipes://no]"], "there is no folder 'no'"),
    "no root": ([*ASK, "data=folder"], "`data.root` (=None) is not a folder; set `data.root`"),
    "no model": ([*ASK, "model=null"], "`model` (=null) must be a name; --help lists them."),
    "no data": ([*ASK, "data=null"], "`data` (=null) must be a name; --help lists them."),
    "recipe null": (["recipe=null"], "`recipe` (=null) must be a name; --help lists them."),
    "no model in a sweep": (["-m", *ASK, "model=small,null"], "`model` (=small,null) must be a name"),
    "a number for a model": ([*ASK, "model=3"], "`model` (=3) must be a name; --help lists them."),
    "two models": ([*ASK, "model=[small,resnet20]"], "`model` (=[small,resnet20]) must be a name"),
    "no launcher": ([*ASK, "hydra/launcher=null"], "`hydra/launcher` (=null) must be a name"),
    "out is here": ([*ASK, "out=."], "`out` (=.) must be the name of a folder, such as outputs/runs/mine."),
    "out is nothing": ([*ASK, "out="], "`out` (=) must be the name of a folder"),
    "out is null": ([*ASK, "out=null"], "`out` (=None) must be the name of a folder"),
    "cache is true": ([*ASK, "cache=true"], "`cache` (=True) must be the name of a folder, such as outputs/cache, or"),
    "weights": ([*ASK, "model.weights=nope.th"], "`model.weights` (='nope.th') does not exist"),
    "limit": ([*ASK, "data.limit=1"], "`data.limit` (=1) leaves digits with 1 training image(s)"),
    "annotation": ([*ASK, "model.return=3"], "`model.return` is not a setting of test_config.net; It has: classes, ch"),
    "interpolation": ([*ASK, "seed=${nothing}"], "nothing"),
    "missing value": ([*ASK, "stages.toy.taps=???"], "`stages.toy.taps` must be given."),
    "out is a file": ([*ASK, "out=mine/toys.yaml/x"], "`out` (=mine/toys.yaml/x) cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_clear_message(case: str, runs: Runs, ask: Ask, tmp_path: Path) -> None:
    arguments, message = BAD[case]
    before = sorted(tmp_path.rglob("*"))
    code, said = ask(*arguments)
    assert (code, runs) == (2, [])
    assert message in said
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert sorted(tmp_path.rglob("*")) == before


def test_all_problems_are_told_at_once(runs: Runs, ask: Ask) -> None:
    code, said = ask(*ASK, "stages.toy.taps=x", "target=y", "device=z", "stages.toy.tap=1")
    assert (code, runs) == (2, [])
    assert len(said.splitlines()) == 4
    assert all(line.startswith("error: ") for line in said.splitlines())


def test_a_recipe_of_the_same_name_in_two_folders(runs: Runs, ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "mine" / "int8.yaml").write_text(TOYS)
    code, said = ask("recipe=int8", "hydra.searchpath=[recipes://mine]")
    assert code == 2
    assert said == f"error: `recipe` (=int8) stands in {config.RECIPES} and in mine; rename one of the two.\n"


def test_a_recipe_that_is_not_yaml(runs: Runs, ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "mine" / "toys.yaml").write_text("stages: {a: [}\n")
    code, said = ask(*ASK)
    assert code == 2
    assert said.startswith("error: the recipe mine/toys.yaml cannot be read: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (CheckpointError("it is cut short."), 2, "error: it is cut short.\n"),
        (TrainingError("the loss is NaN at step 3."), 1, "error: the loss is NaN at step 3.\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on where this one stopped.\n"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "error: a file cannot be written: No space left on device; make room there, or move `out` (=here) and "
            "`cache` (=outputs/cache).\n",
        ),
    ],
)
def test_how_a_run_can_end(runs: Runs, ask: Ask, error: BaseException, code: int, message: str) -> None:
    runs.raises = error
    assert ask(*ASK, "out=here") == (code, message)
    assert not Path("here").exists()


def test_an_interrupted_run_that_keeps_nothing(runs: Runs, ask: Ask) -> None:
    runs.raises = KeyboardInterrupt()
    said = "interrupted; the same command begins anew, since `cache` is off.\n"
    assert ask(*ASK, "cache=off") == (130, said)
    assert ask("-m", *ASK, "cache=off", "seed=1,2")[1].endswith(said)


def test_a_mistake_of_ours_keeps_its_traceback(runs: Runs) -> None:
    runs.raises = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(ASK)


def test_a_sweep_goes_on_after_a_run_that_failed(runs: Runs, ask: Ask) -> None:
    runs.raises = TrainingError("the loss is NaN.")
    code, said = ask("-m", *ASK, "seed=1,2")
    assert (code, len(runs), said.count("error: the loss is NaN.")) == (1, 2, 2)


def test_the_environment_is_left_as_it_was(runs: Runs, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    before = list(sys.argv)
    ask(*ASK)
    assert "HYDRA_FULL_ERROR" not in os.environ
    assert sys.argv == before


def in_a_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "compress", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_help_lists_recipes_with_what_they_do(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "toys.yaml").write_text(TOYS)
    done = in_a_process("--help", "hydra.searchpath=[recipes://mine]", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "  toys           Two toys.\n" in done.stdout
    assert "  shift_quant    Shift convolutions whose displacements are learned" in done.stdout
    assert f"recipe: {', '.join(sorted([*RECIPES, 'toys']))}\n" in done.stdout


def test_bad_input_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = in_a_process("recipe=nope", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: `recipe` (=nope) is not known; choose from {', '.join(RECIPES)}.\n"
    assert list(tmp_path.iterdir()) == []
