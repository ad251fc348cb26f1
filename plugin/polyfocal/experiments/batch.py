"""Carries out the runs of a study: here, one after another, or each as a job of Slurm."""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from polyfocal.errors import UserError
from polyfocal.experiments.report import remarks, study_tables, write_study
from polyfocal.experiments.study import Run, Study, finished, run_study


@dataclass(frozen=True)
class Slurm:
    """How a run becomes a job.

    Attributes:
        partition: The partition of the cluster.
        gpus: GPUs of a job; eight per machine.
        arguments: More arguments for sbatch, as on a command line.
        command: The tool and its options. A job drops those of jobs, and adds run and launcher.
    """

    partition: str
    gpus: int
    arguments: str
    command: Sequence[str]

    @classmethod
    def of(cls, args: argparse.Namespace, command: Sequence[str]) -> "Slurm | None":
        """What the tool's options ask for, None without ``--slurm``.

        Raises:
            UserError: They contradict each other.
        """
        if args.slurm is None:
            return None
        if args.launcher != "none":
            raise UserError(
                "--slurm starts jobs and --launcher is for the processes of one: give one of them."
            )
        if args.gpus < 1:
            raise UserError(f"--gpus {args.gpus}: expected at least 1.")
        return cls(args.slurm, args.gpus, args.sbatch_args, command)

    def job(self, study: str, run: Run, place: Path, after: Sequence[str] = ()) -> list[str]:
        """The command that submits one run.

        If a run is submitted twice, the second job waits for the first, finds its result and ends.

        Args:
            study: The name of the study.
            run: The run.
            place: Folder of the run.
            after: Jobs that must have ended well.
        """
        on_a_machine = min(self.gpus, 8)
        dependency = ",".join(["singleton", *(f"afterok:{job}" for job in after)])
        own = argparse.ArgumentParser(add_help=False)
        own.add_argument("--only", nargs="+")
        own.add_argument("--dry-run", action="store_true")
        for option in ("--slurm", "--gpus", "--sbatch-args"):
            own.add_argument(option)
        command = [sys.executable, "-u", *own.parse_known_args(self.command)[1]]
        command += ["--only", f"{run.name}/{run.seed}", "--launcher", "slurm"]
        # Two jobs on one machine must not meet at the same port.
        port = "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))"
        srun = f"srun --cpus-per-task 5 --kill-on-bad-exit=1 {shlex.join(command)}"
        return [
            *("sbatch", "--parsable", "--partition", self.partition),
            *("--job-name", f"{study}-{run.name}-{run.seed}", "--dependency", dependency),
            *("--ntasks", str(self.gpus), "--ntasks-per-node", str(on_a_machine)),
            *("--gres", f"gpu:{on_a_machine}", "--cpus-per-task", "5"),
            *("--output", str(place / "slurm-%j.txt"), *shlex.split(self.arguments)),
            *("--wrap", f"{port}; {srun}"),
        ]

    def submit(
        self, study: str, runs: Sequence[Run], folder: Path, say: Callable[[str], None]
    ) -> None:
        """Submit a job for each run; a run that needs the scores of another waits for that run.

        Raises:
            UserError: There is no Slurm here, or it refuses.
        """
        if shutil.which("sbatch") is None:
            raise UserError("--slurm submits with sbatch, and there is none on this machine.")
        jobs: dict[tuple[str, int], str] = {}
        for run in runs:
            place = run.folder(folder)
            place.mkdir(parents=True, exist_ok=True)
            after = [jobs[key] for name in run.needs if (key := (name, run.seed)) in jobs]
            command = self.job(study, run, place, after)
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UserError(
                    f"sbatch refuses {run.name}, seed {run.seed}: {done.stderr.strip()}"
                )
            jobs[run.name, run.seed] = done.stdout.strip()
            say(f"{run.name}, seed {run.seed}: job {jobs[run.name, run.seed]}")
        say(f"The table grows in {folder / 'table.md'} as the jobs end.")


def carry_out(
    study: Study,
    runs: Sequence[Run],
    wanted: Sequence[Run],
    folder: Path,
    measure: Callable[[Run, Path], dict[str, float]],
    latest_checkpoint: Callable[[Path], Path | None],
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
    seeds = len({run.seed for run in runs})
    say(
        f"{study.name}: {len(study.rows)} rows x {seeds} seeds = {len(runs)} runs, "
        f"{len(done)} done, {len(missing)} to do now; in {folder}"
    )
    for run in missing:
        checkpoint = latest_checkpoint(run.folder(folder) / "run")
        after = f" (goes on after {checkpoint.name})" if checkpoint else ""
        say(f"  {run.name}, seed {run.seed}: {run.settings['config']}{after}")
        if dry_run and slurm:
            say(f"    {shlex.join(slurm.job(study.name, run, run.folder(folder)))}")
    if dry_run:
        return
    if slurm:
        slurm.submit(study.name, missing, folder, say)
        return
    if missing:
        say(f"What a run says while it trains: {missing[0].folder(folder) / 'console.log'}")
    run_study(wanted, measure, folder, say, shown=study.columns, writes=main_process)
    if not main_process:
        return
    outcomes = finished(runs, folder)
    files = write_study(study, runs, outcomes, folder)
    console = Console()
    for table in study_tables(study, outcomes, grouped=True):
        console.print(table.console(study.title))
    for remark in remarks(study, runs, len(outcomes)):
        console.print(f"- {remark}", highlight=False, markup=False)
    print(f"written to {folder}: {', '.join(file.name for file in files)}")
