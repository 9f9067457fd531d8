"""Where the parts of a study run: on this machine, or each as a job of a Slurm cluster.

    launcher = Launcher.parse("slurm", "partition=gpu,gpus_per_node=1,time=120", folder)
    launcher.script("one cell")                 # what sbatch would get
    for result in launcher.run(measure, points): ...

submitit (extra `slurm`) submits the jobs; each calls a function of this package on a machine that
sees the same files.  A folder's journal and finished cells are the same whoever did the work.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vlmamba_core.errors import UserError, shortened
from vlmamba_core.names import choose

Given = TypeVar("Given")
Result = TypeVar("Result")
LOCAL, SLURM = "local", "slurm"
LAUNCHERS = (LOCAL, SLURM)
WAITING = ("PENDING", "CONFIGURING", "REQUEUED")  # of Slurm's states
DEFAULTS = {"time": 720, "nodes": 1, "ntasks_per_node": 1}  # time: minutes
ONE = ("nodes", "ntasks_per_node", "ntasks")  # of a job, which one process does


@dataclass(frozen=True)
class Launcher:
    """cluster: local (no jobs), slurm, or submitit's own stand-ins for one: see `executor`."""

    cluster: str
    folder: Path  # of scripts, pickled calls and logs
    parameters: dict[str, Any] = field(default_factory=dict)  # of sbatch, - written as _

    @classmethod
    def parse(cls, name: str, parameters: str | None, folder: Path) -> Launcher:
        """The launcher that the flags name. Raises UserError for what sbatch could not be given."""
        cluster = choose("launcher", name, LAUNCHERS)
        if cluster == LOCAL:
            if parameters:
                raise UserError(f"--slurm {parameters} needs --launcher slurm")
            return cls(cluster, folder)
        found = dict(DEFAULTS)
        for pair in (parameters or "").split(",") if parameters else ():
            key, equals, value = pair.partition("=")
            if not equals or not key.strip():
                raise UserError(f"--slurm {pair!r} is no KEY=VALUE, such as partition=gpu")
            found[key.strip().lstrip("-").replace("-", "_")] = _value(value.strip())
        for key in ONE:
            if found.get(key, 1) != 1:
                raise UserError(f"--slurm {key}={found[key]}: a job here is one process; leave it")
        made = cls(cluster, folder, found)
        made.script("")
        return made

    @property
    def here(self) -> bool:
        """Whether the work is done on this machine, without jobs."""
        return self.cluster == LOCAL

    def script(self, name: str) -> str:
        """The sbatch script of one job. Raises UserError for parameters that there are not."""
        slurm = _submitit().slurm.slurm
        try:
            return slurm._make_sbatch_string(
                command=f"python -m submitit.core._submit {self.folder}  # {name}",
                folder=self.folder,
                **_known(self.parameters, slurm._get_default_parameters()),
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"--slurm: {shortened(error)}") from error

    def run(self, call: Callable[[Given], Result], given: Sequence[Given]) -> Iterator[Result]:
        """`call` of each, one job each, all submitted at once; the results in the same order.

        Raises UserError for a job that ended without a result.  Where the caller gives up, jobs
        that still wait are cancelled; those that run go on, unless it was interrupted.
        """
        executor = self.executor()
        jobs = [executor.submit(_answer, call, one) for one in given]
        which: tuple[str, ...] = WAITING
        try:
            for job in jobs:
                yield _result(job)
        except KeyboardInterrupt:
            which = ()
            raise
        finally:
            for job in jobs:
                if not job.done() and (not which or job.state in which):
                    job.cancel(check=False)

    def executor(self) -> Any:
        """submitit's: of Slurm, or of processes here ("processes") or this very one ("debug")."""
        submitit = _submitit()
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.cluster == "processes":
            return submitit.LocalExecutor(self.folder)
        if self.cluster == "debug":
            return submitit.DebugExecutor(self.folder)
        try:
            executor = submitit.SlurmExecutor(self.folder)
        except RuntimeError as error:
            raise UserError(f"--launcher slurm: no srun and sbatch here ({error})") from error
        known = submitit.slurm.slurm._get_default_parameters()
        executor.update_parameters(**_known(self.parameters, known))
        return executor


def add_arguments(add: Callable[..., Any]) -> None:
    """The flags of a command whose parts may be jobs."""
    add("--launcher", default=LOCAL, help="local (default), or slurm: one job each (submitit)")
    add(
        "--slurm",
        metavar="KEY=VALUE,...",
        help="for sbatch: partition=gpu,time=60, ...",
    )
    add("--dry-run", action="store_true", help="show what would be run, and sbatch's script; stop")


def _answer(call: Callable[[Given], Result], given: Given) -> tuple[Result | None, str]:
    """In the job: the result, or what the user must know of why there is none."""
    try:
        return call(given), ""
    except UserError as error:
        return None, str(error)


def _result(job: Any) -> Any:
    submitit = _submitit()
    try:
        result, why = job.result()
    except (submitit.core.utils.UncompletedJobError, OSError) as error:
        raise UserError(
            f"job {job.job_id} ended without a result: {shortened(error)}; its log is "
            f"{os.path.relpath(job.paths.stderr)}; the same command goes on"
        ) from error
    if why:
        raise UserError(why)
    return result


def _submitit() -> Any:
    try:
        import submitit
        import submitit.slurm.slurm
    except ImportError:
        raise UserError("--launcher slurm needs: pip install 'vlmamba-harness[slurm]'") from None
    return submitit


def _known(parameters: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """As submitit takes them: what it has no name for is handed to sbatch as it is."""
    found = {name: value for name, value in parameters.items() if name in known}
    rest = {name: value for name, value in parameters.items() if name not in known}
    return found | ({"additional_parameters": rest} if rest else {})


def _value(text: str) -> Any:
    """A number or truth value where it is one, else text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, (int, float, bool)) else text
