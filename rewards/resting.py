"""Where reward models are: on their device, or on the CPU while nothing is scored."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from duet.configs.errors import UserError
from duet.rewards.base import Reward


class Resting:
    """The rewards that wait on the CPU until they are to score: with `offload` phase those that
    have `device` and `to`, else none.

    Make it when their weights are read: where each one is then, it returns to, until it rests.
    """

    def __init__(self, rewards: Iterable[tuple[str, Reward]] = (), offload: str = "none") -> None:
        """`rewards`: with the names that messages give them."""
        moved = [pair for pair in rewards if offload == "phase" and _moves(pair[1])]
        self._homes = [(name, reward, reward.device) for name, reward in moved]

    @contextmanager
    def awake(self) -> Iterator[None]:
        """While open, all are on their own devices.

        Raises UserError, with its name, where one cannot be moved.
        """
        try:
            for name, reward, home in self._homes:
                _send(name, reward, home)
            yield
        finally:
            self.rest()

    def rest(self) -> None:
        """Send them to the CPU. Raises UserError as `awake`."""
        for name, reward, _ in self._homes:
            _send(name, reward, "cpu")


def _moves(reward: Reward) -> bool:
    return hasattr(reward, "device") and hasattr(reward, "to")


def _send(name: str, reward: Any, device: Any) -> None:
    try:
        reward.to(device)
    except (Exception, SystemExit) as error:  # a plug-in's own method may raise anything
        raise UserError(
            f"reward {name!r} cannot be moved to {str(device)!r}: {type(error).__name__}: {error}"
        ) from error
