"""``hydra/launcher=slurm``: runs in arrays on a SLURM cluster; what each gets is said by ``hardware``.

No annotations from the future here: Hydra runs this file before dataclasses could look up what they mean.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftrun.errors import ConfigError, Problem
from ftrun.fields import ranged
from ftrun.launcher import Launcher, Settings, register

if TYPE_CHECKING:
    from ftrun.config import Config


@dataclass(kw_only=True)
class SlurmSettings(Settings):
    """Where and on what terms runs are submitted."""

    partition: str | None = None
    """Partition, or several with commas between. Default: the cluster's."""

    account: str | None = None
    """Account that is charged."""

    qos: str | None = None
    """Quality of service."""

    constraint: str | None = None
    """Features that nodes must have, such as ``a100``."""

    reservation: str | None = None
    """Reservation to run in."""

    exclude: str | None = None
    """Nodes not to use."""

    flags: list[str] = field(default_factory=list)
    """Further options of sbatch, each ``--NAME=VALUE``. One that asks for accelerators (``--gres``, ``--gpus...``)
    stands in place of ftrun's own ``--gpus-per-node``."""

    setup: list[str] = field(default_factory=list)
    """Shell lines before each run, such as ``module load cuda``; a failing one ends nothing unless it says so."""

    parallel: int | None = ranged(None, ge=1)
    """Runs of one array that run at once. Default: as many as SLURM has room for."""

    wait: bool = False
    """Wait for the runs to end instead of returning once they are submitted."""

    signal_seconds: int = ranged(120, ge=1, le=65535)
    """Seconds before the time limit at which a run is told to save, stop and go back into the queue."""

    poll_seconds: float = ranged(10.0, gt=0)
    """Seconds between two looks at the queue while waiting."""

    max_failures: int | None = ranged(5, ge=1)
    """Once so many runs of an array have failed for one reason and none has completed, no more of them start; null
    never stops."""

    def check(self) -> Iterator[Problem]:
        """Yield what sbatch could not be told, or that ftrun tells it itself."""
        values = {name: getattr(self, name) for name in _OPTIONS} | {"flags": "".join(self.flags)}
        for name, value in values.items():
            if value is not None and (not value.isprintable() or (name in _OPTIONS and not value.strip())):
                yield Problem(f"hydra.launcher.{name}", f"{value!r} is no value for sbatch", "one line of plain text")
        for line in self.setup:
            if "\n" in line or "\0" in line:
                message = f"{line!r} is not one line"
                yield Problem("hydra.launcher.setup", message, "one item of the list for each line")
        for flag in self.flags:
            name = flag.removeprefix("--").partition("=")[0]
            if not flag.startswith("--") or " " in name or not name:
                fix = "--NAME=VALUE, each an item of the list"
                yield Problem("hydra.launcher.flags", f"{flag!r} is no long option of sbatch", fix)
            elif ours := next((each for each in _OURS if each.startswith(name)), None):  # sbatch takes beginnings, too
                message = f"--{ours} is what ftrun tells sbatch itself"
                yield Problem("hydra.launcher.flags", message, _OURS[ours] or "leave it out")

    def options(self) -> tuple[str, ...]:
        """Return the words for sbatch."""
        given = {name: getattr(self, name) for name in _OPTIONS}
        return (*(f"--{name}={value}" for name, value in given.items() if value is not None), *self.flags)


_OPTIONS = ("partition", "account", "qos", "constraint", "reservation", "exclude")

_OURS = {
    **{name: f"hydra.launcher.{name}=..." for name in _OPTIONS},
    "nodes": "hardware.num_nodes=...",
    "cpus-per-task": "hardware.cpus=...",
    "mem": "hardware.memory_gb=...",
    "time": "hardware.minutes=...",
    "signal": "hydra.launcher.signal_seconds=...",
    "wait": "hydra.launcher.wait=true",
    **dict.fromkeys(("array", "job-name", "output", "error", "open-mode", "chdir", "requeue", "no-requeue"), ""),
    **dict.fromkeys(("ntasks", "ntasks-per-node", "parsable", "wrap", "test-only", "quiet", "clusters", "input"), ""),
}
"""Options of sbatch that ftrun sets, and what to type instead."""


class Slurm(Launcher):
    """Runs in arrays on a SLURM cluster."""

    settings_class = SlurmSettings
    has_nodes = True
    reads = ("minutes", "memory_gb")

    def setup(self, **given: Any) -> None:
        """Read the settings.

        Raises:
            ConfigError: There is no SLURM here, or a search could not go on.
        """
        import shutil

        super().setup(**given)
        problems = []
        if not shutil.which("sbatch"):
            message = "sbatch is not on this machine's PATH, and it is what submits jobs"
            problems.append(Problem("hydra/launcher", message, "a login node of the cluster, or hydra/launcher=local"))
        sweeper = str(given["config"].hydra.sweeper.get("_target_", ""))
        if not self.settings.wait and sweeper.startswith("hydra_plugins.ftrun.") and ".grid." not in sweeper:
            message = "a search asks for runs by what became of those before, so it must wait for them"
            problems.append(Problem("hydra.launcher.wait", message, "hydra.launcher.wait=true"))
        if problems:
            raise ConfigError(problems)

    def check(self, cfg: "Config") -> Iterator[Problem]:
        """Yield what it cannot start of a run."""
        from ftrun import hardware
        from ftrun.hardware import Device
        from ftrun.train import Precision

        yield from super().check(cfg)
        device = cfg.hardware.device
        is_here = device is Device.cpu or bool(hardware.find(device).names)
        if device is Device.auto and not is_here:
            message = "auto takes what this machine has, which is no accelerator; the cluster's nodes may have some"
            yield Problem("hardware.device", message, "hardware.device=cuda, or hardware=cpu")
        elif not is_here and cfg.train.precision is Precision.auto:
            message = f"which precision suits the {device} devices of the nodes cannot be seen from this machine"
            yield Problem("train.precision", message, "train.precision=bf16, or fp16 for old GPUs")
        minutes, seconds = cfg.hardware.minutes, self.settings.signal_seconds
        if minutes is not None and seconds >= 60 * minutes:
            message = f"{seconds} s before a limit of {minutes} minutes is before the run starts"
            yield Problem("hydra.launcher.signal_seconds", message, "fewer seconds, or more hardware.minutes")

    def work(self, folders: Sequence[Path]) -> None:
        """Submit runs that are not in SLURM's hands already, and wait for all of them if that is wanted."""
        from ftrun.slurm import work
        from ftrun.slurm.submission import Terms
        from ftrun.slurm.waiting import Waiting

        settings = self.settings
        terms = Terms(
            options=settings.options(),
            setup=tuple(settings.setup),
            parallel=settings.parallel,
            signal_seconds=settings.signal_seconds,
            max_failures=settings.max_failures,
        )
        waiting = Waiting(settings.poll_seconds, self.on_end) if settings.wait else None
        self.is_stopped = not work.work(folders, terms, waiting)
        self.told = waiting.told if waiting else None


register("hydra/launcher", "slurm", Slurm, SlurmSettings)
