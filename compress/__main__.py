"""`python -m compress recipe=NAME ...`: compose settings, check everything, run.

Exit codes: 0 all is well; 1 the training failed; 2 something was asked for that cannot be done; 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import hydra
from omegaconf import DictConfig

from compress import config, folders, plan, sweep
from compress.errors import ConfigError, TrainingError, UserError
from compress.files import UNFINISHED
from compress.sweep import Run

_MULTIRUN = {"-m", "--multirun"}
TRAINING_FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
# The user's folder, not our mistake: full, not theirs, read-only.
_FOLDER_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; gives back the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    jobs: list[config.Job] = []
    try:
        jobs = compose(given)
        check(jobs)
        if len(jobs) > 1 or (jobs and _MULTIRUN & set(given)):
            return carry_out(jobs, "python -m compress " + shlex.join(given))
        return max((execute(job).code or 0 for job in jobs), default=0)
    except UserError as error:
        return complain(error, BAD_INPUT)
    except KeyboardInterrupt:
        goes_on = all(folders.stores(job.settings) for job in jobs)
        then = "goes on where this one stopped" if goes_on else "begins anew, since `cache` is off"
        print(f"interrupted; the same command {then}.", file=sys.stderr)
        return INTERRUPTED


def compose(arguments: Sequence[str]) -> list[config.Job]:
    """The runs that the command line asks for: one, or with `-m` one for each combination.

    Hydra's own launcher would run one after another while it composes them; collecting them first lets every
    combination be checked before the first one starts.

    Raises:
        ConfigError: settings that do not exist or cannot be read.
    """
    jobs: list[config.Job] = []
    troubles: list[str] = []

    def collect(cfg: DictConfig) -> None:
        try:
            jobs.append(config.job(cfg))
        except UserError as error:
            troubles.append(str(error))
        except config.COMPOSITION_ERRORS as error:
            troubles.append(config.explain(error))

    if os.getcwd() not in sys.path:
        # As `python -m` does, so that the console script finds a factory of the user's own too.
        sys.path.append(os.getcwd())
    wanted = os.environ.get("HYDRA_FULL_ERROR")
    # Hydra then hands its errors on, instead of printing them and leaving with exit code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    before, sys.argv = sys.argv, ["compress", *config.opened(arguments)]
    try:
        config.register(arguments)
        config.require_names(arguments)
        hydra.main(config_path=str(config.CONF), config_name="config", version_base="1.3")(collect)()
    except config.COMPOSITION_ERRORS as error:
        if wanted == "1":
            raise
        raise ConfigError(config.explain(error)) from error
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR")
        if wanted is not None:
            os.environ["HYDRA_FULL_ERROR"] = wanted
    if troubles:
        raise ConfigError("\n".join(dict.fromkeys(troubles)))
    if not jobs and _MULTIRUN & set(arguments):
        raise ConfigError("the sweep has no runs: a glob(...) in it matches nothing.")
    return jobs


def check(jobs: Sequence[config.Job]) -> None:
    """Check every run before the first one starts.

    Raises:
        ConfigError: every problem of every run, one a line; in a sweep with the command of the run that has it.
    """
    problems: dict[str, list[config.Job]] = {}
    for job in jobs:
        try:
            plan.make(job.settings)
        except UserError as error:
            for line in str(error).split("\n"):
                problems.setdefault(line, []).append(job)
    if problems:
        shared = len(jobs)
        raise ConfigError(
            "\n".join(line if len(at) == shared else f"{line} [{at[0].command}]" for line, at in problems.items())
        )


def carry_out(jobs: Sequence[config.Job], command: str) -> int:
    """Do the runs of a sweep one after another, and the report over them; gives back the worst exit code."""
    runs = [Run(job.command) for job in jobs]
    folder = folders.fresh(sweep.home([Path(str(job.settings["out"])) for job in jobs]))
    try:
        for number, job in enumerate(jobs, 1):
            print(f"run {number} of {len(jobs)}: {job.command}", file=sys.stderr)
            runs[number - 1] = execute(job)
            sweep.write(runs, folder, command)
    finally:
        (folder / UNFINISHED).rmdir()
        if any(run.code is not None for run in runs):
            sweep.show(sweep.write(runs, folder, command), folder)
        else:
            folder.rmdir()
    return max(run.code or 0 for run in runs)


def execute(job: config.Job) -> Run:
    """Do one run that has been checked; gives back how it ended, after complaining where it did not end well."""
    from compress.run import run  # not before the settings are known to be good: it is slow to import

    out = None
    try:
        ready = plan.make(job.settings)
        out = folders.fresh(ready.out)
        run(
            ready.stages,
            ready.task,
            build=ready.build,
            weights=ready.weights,
            train=ready.train,
            out=out,
            export=ready.export,
            target=ready.target,
            measure=ready.measure,
            forms=ready.forms,
            floor=ready.floor,
            cache=ready.cache,
            recipe=job.recipe,
            command=job.command,
        )
    except UserError as error:
        return Run(job.command, complain(error, BAD_INPUT), error=str(error))
    except TrainingError as error:
        return Run(job.command, complain(error, TRAINING_FAILED), error=str(error))
    except OSError as error:
        if error.errno not in _FOLDER_TROUBLE:
            raise
        told = no_place(error, job)
        return Run(job.command, complain(told, BAD_INPUT), error=str(told))
    finally:
        if out is not None:
            with suppress(OSError):
                (out / UNFINISHED).rmdir()  # each only where nothing was written
                out.rmdir()
    return Run(job.command, 0, out)


def no_place(error: OSError, job: config.Job) -> ConfigError:
    """What to say where a file cannot be written."""
    where = f"{error.filename}: " if error.filename else ""
    folders = f"`out` (={job.settings['out']}) and `cache` (={job.settings['cache']})"
    return ConfigError(f"a file cannot be written: {where}{error.strerror}; make room there, or move {folders}.")


def complain(error: Exception, code: int) -> int:
    """Print an error, each of its lines as an error of its own unless it is indented; gives back `code`."""
    for line in str(error).split("\n"):
        print(line if line.startswith(" ") else f"error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
