"""What a process holds of weights, optimizer and buckets, by the engine that spreads a run."""

from collections.abc import Collection
from dataclasses import dataclass

from duet.train import workload
from duet.train.environment import Engine
from duet.train.workload import Subject
from duet.train.zero import BUCKET

_RESERVE = 2 * 2**30  # assumed: CUDA context, workspaces of cuBLAS and cuDNN, fragments


@dataclass(frozen=True)
class Trained:
    """What of a part is trained, as memory counts it."""

    component: str
    parameters: int
    frozen: int  # bytes of the part's weights that are not trained
    bytes_each: int = 4  # of a master and of its gradient: float32
    states: int = 2  # copies that the optimizer holds: AdamW's two moments
    copies: int = 0  # others on the device: an average

    @property
    def copy(self) -> int:
        """Bytes of all parameters once."""
        return self.parameters * self.bytes_each


@dataclass(frozen=True)
class Parts:
    """Into how many parts an engine cuts what is trained; a process holds one of each."""

    state: int = 1  # the optimizer's, and gradients
    weights: int = 1  # of the whole module
    masters: int = 0  # copies of the weights that the engine's optimizer works on
    gradients_stay: bool = False  # between updates too

    @classmethod
    def of(cls, engine: Engine, processes: int) -> "Parts":
        match engine:
            case "zero2":
                return cls(processes, masters=1)
            case "zero3":
                return cls(processes, processes, masters=1, gradients_stay=True)
            case "fsdp2":
                return cls(processes, processes)
            case _:
                return cls()


def held_weights(
    subject: Subject,
    trained: Collection[Trained],
    present: Collection[str],
    parts: Parts,
    learns: bool,
    stay: bool,
) -> dict[str, int]:
    """The model's, of the components that are `present`, and the trained ones of others too where
    they `stay`. What is cut is gathered whole to sample, and a block at a time to learn.
    """
    here = [t for t in trained if t.component in present]
    others = set(present) - {t.component for t in here}
    frozen = sum(workload.weight_bytes(subject, c) for c in others)
    held = {"frozen weights": frozen}
    if parts.weights == 1 or not learns:
        held["frozen weights"] += sum(t.frozen for t in here)
        held["trained weights"] = sum(t.copy for t in (trained if stay else here))
    if parts.weights > 1:
        cut = sum(t.frozen + t.copy for t in here)
        held["shards of the trained parts"] = cut // parts.weights
    if parts.weights > 1 and learns:  # the one that runs, the next, and a gradient
        held["gathered blocks"] = 3 * workload.block_bytes(subject)
    return held


def always_held(trained: Collection[Trained], processes: int, engine: Engine) -> dict[str, int]:
    """What is there in every phase."""
    parts, gradients = Parts.of(engine, processes), {}
    if parts.gradients_stay:
        gradients["gradients"] = sum(t.copy for t in trained) // parts.state
    return gradients | {
        "optimizer state": sum((t.states + parts.masters) * t.copy for t in trained) // parts.state,
        "copies of the trained weights": sum(t.copies * t.copy for t in trained) // parts.weights,
        **_buckets(trained, processes, engine),
        "CUDA context, workspaces (assumed)": _RESERVE,
    }


def _buckets(trained: Collection[Trained], processes: int, engine: Engine) -> dict[str, int]:
    """What gradients are sent in; FSDP2 sends them block by block."""
    if processes == 1 or engine == "fsdp2":
        return {}
    if engine == "ddp":
        return {"DDP buckets": sum(t.copy for t in trained)}
    return {"ZeRO's buckets": sum(min(t.parameters, BUCKET) * t.bytes_each for t in trained)}
