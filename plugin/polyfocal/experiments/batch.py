"""Carries out the runs of a study: here, one after another, or each as a job of Slurm."""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from polyfocal.errors import UserError
from polyfocal.experiments.fair import fair_tables
from polyfocal.experiments.report import remarks, study_tables, write_study
from polyfocal.experiments.study import FACTORS, Run, Study, finished, run_study
from polyfocal.experiments.trained import TrainedRun

if TYPE_CHECKING:
    import submitit


@dataclass(frozen=True)
class Slurm:
    """How a run becomes a job.

    Attributes:
        partition: The partition of the cluster.
        gpus: GPUs of a job; eight per machine. 0 for one process on a CPU.
        options: More of sbatch's long options.
        command: The tool and its options. A job drops those of jobs, and adds run and launcher.
        cluster: What runs the jobs: ``slurm``, or ``local``, submitit's processes on this machine.
    """

    partition: str
    gpus: int
    options: Mapping[str, str | bool]
    command: Sequence[str]
    cluster: str = "slurm"

    @classmethod
    def of(cls, args: argparse.Namespace, command: Sequence[str]) -> "Slurm | None":
        """What the tool's options ask for, None without ``--slurm``.

        Raises:
            UserError: They contradict each other, or submitit is not installed.
        """
        if args.slurm is None:
            for option in ("gpus", "sbatch_args"):
                if getattr(args, option) is not None:
                    raise UserError(f"--{option.replace('_', '-')} is for the jobs of --slurm.")
            return None
        if args.launcher != "none":
            raise UserError(
                "--slurm starts jobs and --launcher is for the processes of one: give one of them."
            )
        gpus = 8 if args.gpus is None else args.gpus
        if gpus < 0:
            raise UserError(f"--gpus {gpus}: expected 0, for a CPU, or more.")
        if find_spec("submitit") is None:
            raise UserError("--slurm needs submitit: pip install 'polyfocal[slurm]'")
        return cls(args.slurm, gpus, _long_options(args.sbatch_args or ""), command)

    def job(self, run: Run) -> list[str]:
        """The command line that does one run, in each process of its job."""
        own = argparse.ArgumentParser(add_help=False)
        own.add_argument("--only", nargs="+")
        own.add_argument("--dry-run", action="store_true")
        for option in ("--slurm", "--gpus", "--sbatch-args"):
            own.add_argument(option)
        command = [sys.executable, "-u", *own.parse_known_args(self.command)[1]]
        command += ["--only", f"{run.name}/{run.seed}"]
        return [*command, "--launcher", "slurm"] if self.gpus else command

    def submit(
        self, study: str, runs: Sequence[Run], folder: Path, say: Callable[[str], None]
    ) -> "list[submitit.Job[Any]]":
        """Submit a job for each run; a run that needs another one waits for it.

        If a run is submitted twice, the second job waits for the first, finds its result and ends.

        Returns:
            The jobs.

        Raises:
            UserError: There is no Slurm here, or it refuses.
        """
        import submitit
        from submitit.core.utils import FailedJobError

        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise UserError("--slurm submits with sbatch, and there is none on this machine.")
        on_a_machine = min(self.gpus, 8)
        jobs: dict[tuple[str, int], submitit.Job[Any]] = {}
        for run in runs:
            needed = [jobs[key] for key in run.needs if key in jobs]
            after = ["singleton", *(f"afterok:{job.job_id}" for job in needed)]
            executor = submitit.AutoExecutor(run.folder(folder) / "job", cluster=self.cluster)
            executor.update_parameters(
                name=f"{study}-{run.name}-{run.seed}",
                nodes=-(-self.gpus // 8) or 1,
                tasks_per_node=on_a_machine or 1,
                gpus_per_node=on_a_machine or None,
                cpus_per_task=5,
                slurm_partition=self.partition,
                slurm_time=None,  # the partition's
                # Two jobs on one machine must not meet at the same port.
                slurm_setup=["export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))"],
                slurm_srun_args=["--kill-on-bad-exit=1"],
                slurm_additional_parameters={
                    "dependency": ",".join(after),
                    **self.options,
                },
            )
            try:
                job = executor.submit(subprocess.run, self.job(run), check=True)
            except FailedJobError as error:
                reason = str(error).strip().splitlines()[-1]
                raise UserError(f"sbatch refuses {run.name}, seed {run.seed}: {reason}") from None
            jobs[run.name, run.seed] = job
            say(f"{run.name}, seed {run.seed}: job {job.job_id}")
        say(f"The table grows in {folder / 'table.md'} as the jobs end.")
        return list(jobs.values())


def _long_options(line: str) -> dict[str, str | bool]:
    """The options of ``--sbatch-args``: ``--time=2-0 --exclusive``; a value may follow a space.

    Raises:
        UserError: Something else stands there.
    """
    found: dict[str, str | bool] = {}
    last = None
    for word in shlex.split(line):
        if word.startswith("--"):
            last, equals, value = word[2:].partition("=")
            found[last] = value if equals else True
        elif last is not None and found[last] is True and not word.startswith("-"):
            found[last] = word
        else:
            raise UserError(
                f"--sbatch-args {line!r}: {word!r} is not one of sbatch's long options, such as "
                "--account=lab."
            )
    return found


def carry_out(
    study: Study,
    runs: Sequence[Run],
    wanted: Sequence[Run],
    folder: Path,
    measure: Callable[[Run, Path], dict[str, float]],
    latest_checkpoint: Callable[[Path], Path | None],
    read: Callable[[Path], TrainedRun],
    *,
    slurm: Slurm | None = None,
    dry_run: bool = False,
    main_process: bool = True,
) -> None:
    """Do what a study still needs, write its tables and show them.

    Args:
        study: The study.
        runs: All runs of the study.
        wanted: The runs to do now.
        folder: The folder of the results.
        measure: Does a run, see :func:`polyfocal.experiments.study.run_study`.
        latest_checkpoint: Finds the newest checkpoint of a work directory; None if there is none.
        read: Reads the work directory of a run; see
            :func:`polyfocal.experiments.comparing.compare`.
        slurm: Submit jobs instead.
        dry_run: Only say what there is to do.
        main_process: Whether this process prints and writes. Of several processes that train
            together, one does.

    Raises:
        UserError: A run or Slurm refuses something, or a result in the folder has other settings.
    """

    def say(line: str) -> None:
        if main_process:
            print(line, flush=True)

    done = {outcome.run.folder(folder) for outcome in finished(runs, folder)}
    missing = [run for run in wanted if run.folder(folder) not in done]
    seeds = len({run.seed for run in runs if not run.tunes})
    tunings = f"{len(study.rows)} tunings and " if study.fair else ""
    say(
        f"{study.name}: {tunings}{len(study.rows)} rows x {seeds} seeds = {len(runs)} runs, "
        f"{len(done)} done, {len(missing)} to do now; in {folder}"
    )
    for run in missing:
        checkpoint = latest_checkpoint(run.folder(folder) / "run")
        after = f" (goes on after {checkpoint.name})" if checkpoint else ""
        say(f"  {run.name}, seed {run.seed}: {run.settings['config']}{after}")
        if dry_run and slurm:
            say(f"    {shlex.join(slurm.job(run))}")
    if dry_run:
        return
    if slurm:
        slurm.submit(study.name, missing, folder, say)
        return
    if missing:
        first = missing[0].folder(folder)
        place = first / "*" / first.name if missing[0].tunes else first
        say(f"What a run says while it trains: {place / 'console.log'}")
    shown = {*study.columns, *FACTORS}
    run_study(wanted, measure, folder, say, shown=shown, writes=main_process)
    if not main_process:
        return
    outcomes = finished(runs, folder)
    study = study.at_the_limit_of(outcomes)
    more = fair_tables(study, outcomes, folder, read)
    files = write_study(study, runs, outcomes, folder, more)
    console = Console()
    for table in [*study_tables(study, outcomes, grouped=True), *more]:
        console.print(table.console(study.title))
    for remark in remarks(study, runs, len(outcomes)):
        console.print(f"- {remark}", highlight=False, markup=False)
    print(f"written to {folder}: {', '.join(file.name for file in files)}")
