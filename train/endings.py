"""What ends a run before its last step: the last finished step's checkpoint is left, where one
can be written, and one line with how to go on."""

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from duet.configs.errors import UserError, first_line, memory_fault
from duet.inference.lost import Lost, named, naming_the_lost
from duet.inference.together import from_main
from duet.rewards.answers import LARGEST
from duet.train.advantages import NOT_APPLICABLE
from duet.train.best import Best
from duet.train.checkpoint import save_checkpoint
from duet.train.collect import Collected
from duet.train.journal import LOG_FILE, Journal
from duet.train.randomness import RandomState
from duet.train.retention import remove_old
from duet.train.run import Run, Training
from duet.train.signals import Stopped
from duet.train.watch import Watch


class Endings:
    """Around the loop: whatever ends it leaves as a UserError, with the command's exit status."""

    def __init__(self, training: Training, journal: Journal, best: Best) -> None:
        """`best`: what the main process spares when it removes old checkpoints."""
        self.training, self.journal, self.best = training, journal, best
        self.done = training.start.step  # steps whose updates are all made
        self.newest = training.start.checkpoint  # whole
        self._random = RandomState.now()  # as the last finished step left it
        self._whole_step = True  # the weights are those of `done` steps
        self._writable = True  # False: a checkpoint was tried, and it will not go better now
        self._listening = training.signals.listening()

    def __enter__(self) -> "Endings":
        self._listening.__enter__()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                raise self._ended(named(error), error) from error
            self.training.accelerator.end_training()
        finally:
            self._listening.__exit__(None, None, None)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """The updates of one step: what fails within leaves weights of no step."""
        self._whole_step = False
        yield
        self.done += 1
        self._random, self._whole_step = RandomState.now(), True

    def save(self) -> Path:
        """The checkpoint after the last finished step, written unless it is there already.

        Raises OSError where it cannot be, and UserError where another process has ended.
        """
        training, start, self._writable = self.training, self.training.start, False
        try:
            with naming_the_lost():
                from_main(training.accelerator, self._require_folder)
                self.newest = save_checkpoint(
                    training.policies, training.config, start.run_id, start.inputs, self.done
                )
        except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk raises
            for partial in Path(training.config.output_dir).glob(".checkpoint-*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
            told = f"checkpoint-{self.done} could not be written ({first_line(error)})"
            raise OSError(told) from error
        self._writable = True
        self.remove_old()
        return self.newest

    def _require_folder(self) -> None:
        """What is gone, as an unmounted disk is, is not made anew: nobody would look there."""
        folder = Path(self.training.config.output_dir)
        if not (folder / LOG_FILE).is_file():
            raise FileNotFoundError(f"output_dir = {str(folder)!r} is gone")

    def remove_old(self) -> None:
        """But for the newest ones, the best one and the one resumed from."""
        training, best = self.training, self.best.held
        if training.accelerator.is_main_process:
            kept = [training.start.checkpoint, best and best.checkpoint]
            limit = training.config.train.save_total_limit
            remove_old(self.newest.parent, limit, [path for path in kept if path])

    def _ended(self, error: BaseException, cause: BaseException) -> UserError:
        text, status = _told(error)
        # raised on all processes
        shared = isinstance(error, UserError | Stopped) and not isinstance(error, Lost)
        if shared or self.training.accelerator.num_processes == 1:
            text = f"{text}; {self._kept()}"
            with contextlib.suppress(OSError):  # a tracker on a full disk
                for tracker in self.training.accelerator.trackers:
                    tracker.finish()
        else:
            text = f"{text}; {self._way_on()}"
        if status == 1:
            text += f" (a fault of Duet or of a plug-in: {LOG_FILE} has where)"
        with contextlib.suppress(OSError):
            self.journal.record(text, cause)
        return UserError(text, status)

    def _kept(self) -> str:
        """Leave a checkpoint of the last finished step; says what there is to go on from."""
        if self._whole_step and self._writable and self.done > self.training.start.step:
            try:
                self._random.restore()
                self.save()
            except (OSError, UserError) as error:
                return f"{error}; {self._way_on()}"
        return self._way_on()

    def _way_on(self) -> str:
        if self.newest is None:
            return "no checkpoint was written yet: begin again with train.resume=latest"
        resume = "latest"
        if self.newest.parent.resolve() != Path(self.training.config.output_dir).resolve():
            resume = str(self.newest)
        return f"{self.newest} is whole: go on from it with train.resume={resume}"


def _told(error: BaseException) -> tuple[str, int]:
    """One line, and the exit status: 2 for what a user can mend, 128 + a signal's number."""
    line = " ".join(str(error).split())
    if memory := memory_fault(error):
        return f"{memory}: `duet plan` tells the settings that need less", 2
    match error:
        case Stopped() | UserError():
            return line, error.status
        case SystemExit():
            return f"a reward or another plug-in called sys.exit({error.code!r})", 2
        case OSError():
            return f"{type(error).__name__}: {line}", 2
        case _:
            return f"{type(error).__name__}: {line}", 1


def require_scores(run: Run, collected: Collected) -> None:
    """Raises UserError when a trained reward fails on too many of the samples to which it
    applies, or when a weighted score is too large for float32."""
    allowed = run.config.train.max_not_scored
    trained = collected.all_scores.trained.items()
    for (name, column), weight in zip(trained, run.weights, strict=True):
        if weight == 0:
            continue  # nothing is trained on it
        applies = column[column != NOT_APPLICABLE]
        if not (applies.isnan() | ((applies * weight).abs() <= LARGEST)).all():
            raise UserError(
                f"reward {name!r}: its scores times its weight {float(weight):g} are "
                f"beyond {LARGEST:g}: give a smaller weight"
            )
        share = float(applies.isnan().float().mean()) if len(applies) else 0.0
        if share > allowed:
            raise UserError(
                f"reward {name!r} left {share:.0%} of a step's samples without a score "
                f"(train.max_not_scored allows {allowed:.0%}): mend it"
            )


def heed_alarm(run: Run, watch: Watch, journal: Journal, metrics: dict[str, float]) -> None:
    """Tell that the alarm rang. Raises UserError with `watch.stop`."""
    # one process decides for all: only its metrics file is sure to be whole
    rang = broadcast_object_list([metrics["watch/alarm"] > 0])[0]
    if not rang:
        return
    told = f"reward hacking? {watch.alarm_text(metrics)}"
    if run.config.watch.stop:
        raise UserError(f"watch.stop ended the run: {told}")
    journal.tell(f"alarm: {told}")
