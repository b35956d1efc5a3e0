"""A schedule of pruning needs training behind it: recipes that end before it does are refused before the work."""

from __future__ import annotations

from pathlib import Path

import pytest
from awkward import noise_task
from test_run import BUILD, SHAPE

from compress.errors import ConfigError
from compress.run import run
from compress.stage import Stage, order_problems
from compress.stages import FineTune, Prune, Quantize, SparsifyChannels

CUBIC = Prune(amount=0.5, schedule="cubic", epochs=3)


@pytest.mark.parametrize(
    ("stages", "trained"),
    [
        ({"prune": CUBIC}, 0),
        ({"prune": CUBIC, "recover": FineTune(epochs=2)}, 2),
        ({"before": FineTune(epochs=9), "prune": CUBIC, "recover": FineTune(epochs=1), "q": Quantize()}, 1),
    ],
)
def test_a_schedule_that_cannot_end_is_refused(stages: dict[str, Stage], trained: int, tmp_path: Path) -> None:
    said = (
        rf"`stages.prune.epochs` \(=3\) is the length of a schedule .* train {trained} epochs; lower it, train longer, "
        "or take `schedule: one_shot`"
    )
    with pytest.raises(ConfigError, match=said):
        run(stages, noise_task(SHAPE), build=BUILD, out=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "stages",
    [
        {"prune": CUBIC, "recover": FineTune(epochs=3)},
        {"prune": CUBIC, "one": FineTune(epochs=1), "other": SparsifyChannels(epochs=2)},
        {"prune": Prune(amount=0.5)},
    ],
)
def test_one_that_ends_is_not(stages: dict[str, Stage]) -> None:
    assert order_problems(stages) == []


def test_what_a_schedule_will_reach_is_called_planned(tmp_path: Path) -> None:
    stages: dict[str, Stage] = {"prune": CUBIC, "recover": FineTune(epochs=3)}
    result = run(stages, noise_task(SHAPE), build=BUILD, out=tmp_path, measure="none", export=[])
    rows = {row["name"]: row for row in result.report["rows"]}
    notes = rows["prune"]["notes"]
    assert "achieved" not in notes and abs(notes["planned"] - 0.5) < 1e-3
    assert rows["recover"]["nonzero"] < 0.6 * rows["prune"]["nonzero"]
