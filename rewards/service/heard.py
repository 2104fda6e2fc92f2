"""Whether the servers of a reward answer at all."""

from dataclasses import dataclass


@dataclass
class Heard:
    """What became of requests since `silence` was asked last."""

    answers: int = 0
    failure: str = ""  # why the latest request without an answer has none

    def silence(self) -> str | None:
        """Why not one request had an answer; None where one had, or none was made. Begins anew."""
        told = self.failure if self.failure and not self.answers else None
        self.answers, self.failure = 0, ""
        return told
