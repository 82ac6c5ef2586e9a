"""report_to: programs that a run reports its metrics to, with the names of transformers' callbacks.

A reporter that fails ends no run: it is named once, and the run goes on without it.
"""

import importlib
import os
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from longlora.errors import UserError
from longlora.training.options import TrainOptions

STEP = "train/global_step"  # the axis of wandb's charts, as transformers names it


class Reporter(Protocol):
    """An open report of one run."""

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Take the metrics of a step."""

    def close(self, failed: bool) -> None:
        """End the report."""


class TensorBoard:
    """A file of events in $TENSORBOARD_LOGGING_DIR, or else output_dir/runs/TIME_HOST, as in transformers.

    It is written at once and by this thread, so a full disk is seen here.
    """

    def __init__(self, o: TrainOptions):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        host = socket.gethostname()
        default = os.path.join(o.output_dir, "runs", time.strftime("%b%d_%H-%M-%S_") + host)
        directory = os.path.expanduser(os.environ.get("TENSORBOARD_LOGGING_DIR") or default)
        os.makedirs(directory, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{host}.{os.getpid()}"
        self._file = open(os.path.join(directory, name), "xb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")

    def _write(self, **fields):
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()

    def log(self, step: int, scalars: dict[str, float]) -> None:
        value = self._summary.Value
        values = [value(tag=name, simple_value=number) for name, number in scalars.items()]
        self._write(step=step, summary=self._summary(value=values))

    def close(self, failed: bool) -> None:
        self._file.close()


class Wandb:
    """The run of wandb that the program has open, or else a new one, run_name in $WANDB_PROJECT."""

    def __init__(self, o: TrainOptions):
        import wandb

        self._run: Any = wandb.run
        self._ours = self._run is None
        if self._ours:
            self._run = wandb.init(project=os.environ.get("WANDB_PROJECT") or "longlora", name=o.run_name)
        self._run.config.update(o.to_dict(), allow_val_change=True)
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP, step_sync=True)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log({**scalars, STEP: step})

    def close(self, failed: bool) -> None:
        if self._ours:
            self._run.finish(exit_code=int(failed))


# Each program: its Reporter, and an attribute of its package; a folder of that name has none.
REPORTERS: dict[str, tuple[Callable[[TrainOptions], Reporter], str]] = {
    "tensorboard": (TensorBoard, "__version__"),
    "wandb": (Wandb, "init"),
}


def chosen(report_to: Iterable[str]) -> list[str]:
    """The programs that report_to names; "all" means all that are installed. UserError for a missing one."""
    if "all" in report_to:
        return [name for name in REPORTERS if _missing(name) is None]
    for name in report_to:
        why = _missing(name)
        if why is not None:
            raise UserError(f"report_to {name} needs the package {name}: pip install 'longlora[{name}]'{why}")
    return list(dict.fromkeys(report_to))


def _missing(name):
    """Why a package cannot be imported, or None."""
    try:
        getattr(importlib.import_module(name), REPORTERS[name][1])
    except (ImportError, AttributeError):
        return ""
    except Exception as error:  # such as protobuf's, which is too new for a package
        return f" ({error})"
    return None


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """A row of metrics as transformers' callbacks name it: eval_loss is eval/loss, loss is train/loss."""
    found = {}
    for name, value in row.items():
        if name != "step" and isinstance(value, (int, float)):
            found[f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"] = float(value)
    return found


class Reports:
    """The open reporters of a run. As a context it closes them where an error ends the run.

    say: receives a line for each reporter that fails.
    """

    def __init__(self, o: TrainOptions, names: Iterable[str], say: Callable[[str], object]):
        self._say = say
        self._open: dict[str, Reporter] = {}
        for name in names:
            self._attempt(name, lambda name=name: self._open.update({name: REPORTERS[name][0](o)}))

    def _attempt(self, name, call):
        try:
            call()
        except Exception as error:
            self._open.pop(name, None)
            said = str(error) or type(error).__name__
            self._say(str(UserError(f"{name} fails, the run goes on without it: {said}")))

    def log(self, row: dict[str, Any]) -> None:
        """Report a row of metrics."""
        values = scalars(row)
        for name, reporter in list(self._open.items()):
            self._attempt(name, lambda reporter=reporter: reporter.log(row["step"], values))

    def close(self, failed: bool = False) -> None:
        """End the reports. A second call does nothing."""
        for name, reporter in list(self._open.items()):
            self._attempt(name, lambda reporter=reporter: reporter.close(failed))
        self._open.clear()

    def __enter__(self) -> "Reports":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None and issubclass(kind, Exception):  # a KeyboardInterrupt waits for no network
            self.close(failed=True)
