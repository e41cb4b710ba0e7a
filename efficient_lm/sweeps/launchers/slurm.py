"""Runs as jobs of SLURM, through submitit; for a trial without SLURM, as submitit's jobs of this machine."""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from efficient_lm.errors import ConfigError, ResourceError, nearest
from efficient_lm.spec import Count, Listing, Natural, Positive
from efficient_lm.sweeps.launchers.base import UNKNOWN, Handle, Job, Launcher, LauncherSpec
from efficient_lm.sweeps.launchers.local import alive, reference_of
from efficient_lm.sweeps.launchers.remote import INTERRUPTED, KILLED, Ending, Running, Task, written

log = logging.getLogger(__name__)

ASK_EVERY = 10.0
"""Seconds between two questions to SLURM, each about all jobs."""
HURRY = 2.0
"""The same when runs were asked to stop and a sweep waits for them."""
SAVE_SECONDS = 120
"""Before the time limit, in which a run saves and stops."""
IN_QUEUE = frozenset(
    "PENDING RUNNING CONFIGURING COMPLETING SUSPENDED REQUEUED REQUEUE_FED REQUEUE_HOLD RESIZING RESV_DEL_HOLD "
    "SIGNALING SPECIAL_EXIT STAGE_OUT STOPPED".split()
)
"""States of jobs that run, or may run again by themselves."""
GONE = "GONE"
"""That of a job which SLURM does not know any more."""
ASSUMED = {"COMPLETED": UNKNOWN, GONE: UNKNOWN, "FAILED": 1, "LAUNCH_FAILED": 1, "OUT_OF_MEMORY": ResourceError.status}
"""Exit statuses of jobs that wrote none down, by their last state; others were interrupted."""
OPTION = r"^[a-z][a-z0-9-]*$"


class SlurmLauncherSpec(LauncherSpec):
    """Jobs of SLURM. The file system with the sweep's folder and this environment is the machines' too.

    Attributes:
        concurrent: jobs in the queue at once, waiting or running.
        cluster: ``local``: jobs of submitit on this machine, to try a sweep without SLURM.
        partition, account, qos: as sbatch has them; None leaves them to the cluster.
        minutes: time limit of a job. A run that reaches it saves, queues again and goes on.
        requeues: how often.
        nodes: machines of a run.
        tasks: processes on each; one takes all GPUs of its machine, several take one each.
        gpus: of a machine.
        cpus: of a process.
        memory: bytes of a machine; None leaves them to the cluster.
        setup: lines of shell before the run, as ``module load cuda``.
        options: further ones of sbatch, ``{constraint: h100, exclusive: true}``.
    """

    kind: Literal["slurm"] = "slurm"
    concurrent: Count = 100
    cluster: Literal["slurm", "local"] = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    minutes: Count = 240
    requeues: Natural = 100
    nodes: Count = 1
    tasks: Count = 1
    gpus: Natural = 1
    cpus: Count = 8
    memory: Positive | None = None
    setup: Listing[str] = ()
    options: dict[Annotated[str, Field(pattern=OPTION)], str | int | bool] = {}

    @property
    def remote(self) -> bool:
        return self.cluster == "slurm"

    def build(self) -> Launcher:
        try:
            import submitit  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"launcher: slurm needs the package submitit, which is not installed ({error}); install the extra: "
                "pip install 'efficient-lm[cluster]'"
            ) from error
        missing = [name for name in ("sbatch", "srun", "squeue", "scancel") if shutil.which(name) is None]
        if self.cluster == "slurm" and missing:
            raise ConfigError(
                f"launcher: this machine has no {missing[0]}; start the sweep where SLURM is, or try "
                "it here with launcher.cluster=local"
            )
        for key in ("nodes", "setup") if self.cluster == "local" else ():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ConfigError(f"launcher.{key}: cannot be given with launcher.cluster=local, which is this machine")
        taken = sorted({name.replace("-", "_") for name in self.options} & set(_PARAMETERS))
        if taken:
            raise ConfigError(f"launcher.options.{taken[0]}: is a key of its own; {nearest(taken[0], self.keys())}")
        return SlurmLauncher(self)

    def parameters(self, name: str) -> dict[str, Any]:
        """What submitit's executors are told of a job."""
        options = {key: value for key, value in self.options.items() if value is not False}
        return {
            "name": name,
            "timeout_min": self.minutes,
            "nodes": self.nodes,
            "tasks_per_node": self.tasks,
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus or None,
            "mem_gb": None if self.memory is None else self.memory / 2**30,
            "stderr_to_stdout": True,
            "slurm_setup": list(self.setup) or None,
            "slurm_signal_delay_s": min(SAVE_SECONDS, 30 * self.minutes),
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_qos": self.qos,
            # Processes of a run tell one another what happened and end by themselves, once they have saved.
            "slurm_srun_args": ["--kill-on-bad-exit=0"],
            "slurm_additional_parameters": {"requeue": True, **options},
        }


_PARAMETERS = ("partition", "account", "qos", "time", "nodes", "ntasks_per_node", "gpus_per_node", "cpus_per_task",
               "mem", "requeue", "signal", "output", "error", "job_name", "array")  # fmt: skip


class SlurmLauncher(Launcher):
    """Hands runs over to SLURM, where they are found again by the numbers of their jobs."""

    def __init__(self, spec: SlurmLauncherSpec):
        self.spec = spec
        self._queue = Queue()
        self._handles: list[Handle] = []

    def room(self, job: Job) -> bool:
        self._handles = [handle for handle in self._handles if handle.poll() is None]
        return len(self._handles) < self.spec.concurrent

    def submit(self, job: Job) -> Handle:
        import submitit

        folder = folder_of(job)
        task = Task.of(job, folder / "status")
        try:
            executor = submitit.AutoExecutor(
                folder, cluster=self.spec.cluster, **{f"{self.spec.cluster}_max_num_timeout": self.spec.requeues}
            )
            executor.update_parameters(**self.spec.parameters(job.name))
            submitted = executor.submit(SubmititTask(task))
        except (OSError, RuntimeError, submitit.core.utils.FailedJobError) as error:
            words = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            refusal = next((line for line in words if "sbatch: error" in line), words[0])
            raise ResourceError(f"{job.name}: cannot be submitted: {refusal.strip()}") from error
        reference = f"slurm {submitted.job_id}"
        if self.spec.cluster == "local":
            reference = f"submitit {reference_of(int(submitted.job_id))}"
        return self._handle(job, reference)

    def attach(self, job: Job, reference: str) -> Handle | None:
        system, _, name = reference.partition(" ")
        known = {"slurm": name.isdecimal(), "submitit": bool(alive(name))}
        return self._handle(job, reference) if known.get(system) else None

    def _handle(self, job: Job, reference: str) -> Handle:
        system, _, name = reference.partition(" ")
        handle = _SlurmJob(job, name, self._queue) if system == "slurm" else _LocalJob(job, name)
        self._handles.append(handle)
        return handle


def folder_of(job: Job) -> Path:
    """The folder of submitit's files of a run."""
    return job.log.with_suffix(".submitit").absolute()


class SubmititTask:
    """What submitit runs in each process of a job: a process of the run."""

    def __init__(self, task: Task):
        self.task = task
        self._running: Running | None = None

    def __call__(self) -> None:
        import submitit

        here = submitit.JobEnvironment()
        task = Task(**{**vars(self.task), "status": status_of(self.task.status.parent, here.job_id)})
        self._running = task.start(here.global_rank)
        # submitit ignores SIGTERM, and SLURM may send it to this process alone.
        signal.signal(signal.SIGTERM, lambda number, frame: self._running.stop())
        try:
            code = self._running.wait()
        except Exception:
            # Interrupted at the time limit once too often.
            self._running.finish(INTERRUPTED)
            raise
        raise SystemExit(code)

    def checkpoint(self) -> Any:
        """Near the time limit, or before others take the machine: save, stop, and queue again as it was."""
        import submitit

        if self._running is not None:
            self._running.stop()
            self._running.ended()
        return submitit.helpers.DelayedSubmission(SubmititTask(self.task))

    __submitit_checkpoint__ = checkpoint


def status_of(folder: Path, job_id: str) -> Path:
    """Where the exit status of a job is written."""
    return folder / f"{job_id}.status"


class Queue:
    """What SLURM says of this user's jobs, asked for all of them at once and not too often.

    Attributes:
        every: seconds between two questions.
    """

    def __init__(self) -> None:
        self.every = ASK_EVERY
        self._states: dict[str, str] = {}
        self._asked_at = float("-inf")
        self._answers = True

    def state(self, job_id: str, submitted_at: float) -> str | None:
        """A job's state, or `GONE`; None: SLURM does not answer."""
        if time.monotonic() - self._asked_at >= self.every or self._asked_at < submitted_at:
            self._ask()
        if not self._answers:
            return None
        return self._states.get(job_id) or _from_accounting(job_id)

    def _ask(self) -> None:
        # `--states=all`: also those that ended minutes ago.
        said = _said("squeue", "--me", "--states=all", "--noheader", "--format=%i %T")
        if said is None and self._answers:
            log.warning("squeue does not answer; waiting until it does")
        self._answers = said is not None
        self._states = dict(line.split()[:2] for line in (said or "").splitlines() if line.strip())
        self._asked_at = time.monotonic()


def _from_accounting(job_id: str) -> str:
    """The state of a job that the controller has forgotten, where the cluster keeps accounts."""
    said = _said("sacct", "--jobs", job_id, "--allocations", "--noheader", "--parsable2", "--format=State") or ""
    return next(iter(said.split()), GONE)


def _said(*command: str) -> str | None:
    """What a command of SLURM prints; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


class _SlurmJob:
    """A job of SLURM."""

    def __init__(self, job: Job, job_id: str, queue: Queue):
        self._job, self._id, self._queue = job, job_id, queue
        self._since, self._asked = time.monotonic(), False
        self._status, self._state = status_of(folder_of(job), job_id), ""
        self._ending = Ending(self._status, self._assumed)
        self._code: int | None = None
        self.reference = f"slurm {job_id}"

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._ending.poll()
            if self._code is not None and written(self._status) is None:
                self._explain()
        return self._code

    def cancel(self) -> None:
        if not self._asked:
            # Processes of a run that goes on save and stop; what waits has nothing to save.
            _said("scancel", "--signal=TERM", self._id)
            _said("scancel", "--state=PENDING", self._id)
        else:
            _said("scancel", self._id)
        self._asked, self._ending.patience, self._queue.every = True, 0.0, HURRY

    def _assumed(self) -> int | None:
        state = self._queue.state(self._id, self._since)
        if state is None or state in IN_QUEUE:
            return None
        self._state = state
        return ASSUMED.get(state, INTERRUPTED)

    def _explain(self) -> None:
        """Say in the run's log what the run could not."""
        with contextlib.suppress(OSError), open(self._job.log, "a") as file:
            file.write(f"error: SLURM's job {self._id}: {self._state}; see {folder_of(self._job)}\n")


class _LocalJob:
    """A job of submitit on this machine."""

    def __init__(self, job: Job, reference: str):
        self._process_reference, self._process, self._asked = reference, int(reference.split()[1]), False
        self._ending = Ending(status_of(folder_of(job), str(self._process)), self._assumed, patience=0)
        self.reference = f"submitit {reference}"

    def poll(self) -> int | None:
        return self._ending.poll()

    def cancel(self) -> None:
        if alive(self._process_reference):
            # submitit passes SIGTERM on, and ends all of it on SIGINT.
            os.kill(self._process, signal.SIGINT if self._asked else signal.SIGTERM)
        self._asked = True

    def _assumed(self) -> int | None:
        return None if alive(self._process_reference) else KILLED
