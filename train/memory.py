"""Memory on the device by phase and by what holds it, counted before any weight is read."""

from collections import ChainMap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from duet.configs.errors import UserError
from duet.configs.schema import RunConfig
from duet.inference.batching import pack
from duet.inference.model import COMPONENTS
from duet.inference.shapes import Sizes
from duet.rewards.sizes import reward_sizes
from duet.train import workload
from duet.train.environment import Engine
from duet.train.geometry import changed, geometry, sizes_on_first
from duet.train.workload import Scoring, Subject, Work

GIB = 2**30
RESERVE = 2 * GIB  # assumed: CUDA context, workspaces of cuBLAS and cuDNN, fragments
_ZERO_BUCKET = 500_000_000  # gradients; DeepSpeed's reduce_bucket_size
DECODER_PARTS = ("transformer", "vae", "text_encoder")


@dataclass(frozen=True)
class Trained:
    """What of a module is trained, as memory counts it."""

    parameters: int
    bytes_each: int = 4  # of a master and of its gradient: float32
    states: int = 2  # copies that the optimizer holds: AdamW's two moments
    copies: int = 0  # others on the device: an average
    replaced: int = 0  # bytes of frozen weights in whose place the masters stand

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

    @classmethod
    def of(cls, engine: Engine, processes: int) -> "Parts":
        match engine:
            case "zero2":
                return cls(processes, masters=1)
            case "zero3":
                return cls(processes, processes, masters=1)
            case "fsdp2":
                return cls(processes, processes)
            case _:
                return cls()


@dataclass(frozen=True)
class Phase:
    name: str
    held: dict[str, int]  # bytes at its peak, by what holds them

    @property
    def total(self) -> int:
        return sum(self.held.values())


@dataclass(frozen=True)
class Step:
    """The pieces of a process's step, and how often each is done."""

    subject: Subject
    tokens: Work
    token_batches: int
    latents: Work
    latent_batches: int
    pixels: Work
    pictures: int
    update: Work
    updates: int  # forward and backward passes
    rescore: Work
    rescores: int  # forwards for old log-probs


def subject_of(config: RunConfig, sizes: Sizes) -> Subject:
    recomputed = config.optim.gradient_checkpointing
    lora = config.lora if config.tuning == "lora" else None
    return Subject(sizes, config.arithmetic, config.stage, lora, recomputed)


def trained_of(config: RunConfig, subject: Subject) -> Trained:
    """Full weights stand in the place of the part's own; its idle submodules are float32 too."""
    replaced = 0
    if subject.lora is None:
        whole = workload.weight_bytes(subject, subject.part.component)
        replaced = whole - workload.idle_bytes(subject)
    copies = 0 if config.average is None else 1
    return Trained(workload.trained_parameters(subject), copies=copies, replaced=replaced)


def step_of(config: RunConfig, sizes: Sizes, processes: int) -> Step:
    """Of a geometry that divides."""
    subject, sampling, sde = subject_of(config, sizes), config.sampling, config.sde
    sizes_of_groups = sizes_on_first(config, processes)
    own = sum(sizes_of_groups)
    drawn = engine_batches(sizes_of_groups, config.rollout.batch_size)
    # the decoder's priors: one a prompt, all in one call
    priors = engine_batches([len(sizes_of_groups)], config.rollout.batch_size)
    written = drawn if config.stage == "ar" else priors
    samples = config.optim.per_device_train_batch_size
    micro = own // samples * config.grpo.num_iterations
    window = sde.window_size if config.stage == "decoder" else 1
    at_once = min(window, config.optim.steps_per_backward or window)
    return Step(
        subject,
        workload.tokens(subject, sampling, max(written)),
        len(written),
        workload.latents(subject, sampling, max(drawn)),
        len(drawn),
        workload.pixels(subject, sampling),
        own,
        workload.update(subject, Scoring(sampling, sde, samples, at_once), config.grpo.beta > 0),
        micro * (window // at_once),
        workload.scoring(subject, Scoring(sampling, sde, samples, window)),
        micro // config.grpo.num_iterations if _rescored(config, processes) else 0,
    )


def _rescored(config: RunConfig, processes: int) -> bool:
    """Whether every step has old log-probs of the trainer's own, and not the first one alone."""
    divided = geometry(config, processes, config.train.max_steps)
    single = divided.updates_per_rollout == 1 and config.dropout == 0
    return config.old_logprobs_of == "trainer" and not single


def engine_batches(sizes: Sequence[int], cap: int) -> list[int]:
    """Samples of each batch that the engine runs for groups of these sizes, as `collect` packs
    them."""
    together = pack(sizes, cap, weight=lambda n: n)
    return [len(b) for part in together for b in pack(range(sum(sizes[i] for i in part)), cap)]


def phases(config: RunConfig, step: Step, processes: int, engine: Engine = "ddp") -> list[Phase]:
    """In their order; rewards are scored beside the sampling of the next batch."""
    subject, rewards = step.subject, (*config.rewards, *config.watch.rewards)
    evaluates = config.train.eval_steps is not None
    if evaluates:
        rewards += config.eval.rewards
    trained, parts = trained_of(config, subject), Parts.of(engine, processes)
    always = {
        "optimizer state": (trained.states + parts.masters) * trained.copy // parts.state,
        "copies of the trained weights": trained.copies * trained.copy // parts.weights,
        **_buckets(engine, trained, processes),
        "reward models": reward_sizes(rewards).bytes,
        "CUDA context, workspaces (assumed)": RESERVE,
    }
    component = subject.part.component
    rest = workload.weight_bytes(subject, component) - trained.replaced  # of the trained part

    def phase(
        name: str, needed: Sequence[str], held: dict[str, int], learns: bool = False
    ) -> Phase:
        present = set(needed if config.model.offload == "phase" else COMPONENTS)
        if engine != "ddp":  # whose buffers hold the trained part
            present.add(component)
        frozen = sum(workload.weight_bytes(subject, c) for c in present - {component})
        weights = {"frozen weights": frozen}
        if parts.weights > 1:
            weights["shards of the trained part"] = (rest + trained.copy) // parts.weights
        if parts.weights > 1 and learns:  # the one that runs, the next, and a gradient
            weights["gathered blocks"] = 3 * workload.block_bytes(subject)
        elif component in present:  # sampling gathers all
            weights |= {"frozen weights": frozen + rest, "trained weights": trained.copy}
        return Phase(name, {k: v for k, v in (weights | held | always).items() if v})

    gradients = {"gradients": trained.copy // parts.state}
    own = (component,)
    held_out = []
    if evaluates:
        asked = subject, config.sampling, config.rollout.batch_size
        tokens, latents = workload.tokens(*asked).held, workload.latents(*asked).held
        held_out = [
            phase("held-out tokens", ("vision_language_encoder",), tokens),
            phase("held-out latents", DECODER_PARTS, latents),
        ]
    backward, forward = step.update.held, step.rescore.held
    return [
        phase("AR tokens", ("vision_language_encoder",), step.tokens.held),
        phase("latents", DECODER_PARTS, step.latents.held),
        phase("pixels", DECODER_PARTS, {"VAE decode": step.pixels.held["working set"]}),
        phase("rewards", DECODER_PARTS, {}),
        phase("old log-probs", own, forward, learns=True),
        phase("update", own, gradients | backward, learns=True),
        # AdamW works on all parameters at once, with one more copy of them
        phase(
            "optimizer step", own, gradients | {"working set": trained.copy // parts.state}, True
        ),
        *held_out,
    ]


def _buckets(engine: Engine, trained: Trained, processes: int) -> dict[str, int]:
    """What gradients are sent in; FSDP2 sends them block by block."""
    if processes == 1 or engine == "fsdp2":
        return {}
    if engine == "ddp":
        return {"DDP buckets": trained.copy}
    return {"ZeRO's bucket": min(trained.copy, _ZERO_BUCKET * trained.bytes_each)}


def peak(found: Sequence[Phase]) -> Phase:
    return max(found, key=lambda phase: phase.total)


def savings(
    config: RunConfig, sizes: Sizes, processes: int, memory: int, engine: Engine = "ddp"
) -> dict | None:
    """The settings that make it fit, the cheapest first; None: no setting does."""

    def fits(applied: Sequence[dict[str, Any]]) -> bool:
        now = changed(config, dict(ChainMap(*reversed(applied))))
        step = step_of(now, sizes, processes)
        return peak(phases(now, step, processes, engine)).total <= memory

    applied: list[dict[str, Any]] = []
    for saving in _savings(config):
        if fits(applied):
            break
        applied.append(saving)
    if not fits(applied):
        return None
    for saving in reversed(applied[:-1]):  # what it fits without, the dearest first
        fewer = [other for other in applied if other is not saving]
        applied = fewer if fits(fewer) else applied
    return {name: value for saving in applied for name, value in saving.items()}


def _savings(config: RunConfig) -> Iterator[dict[str, Any]]:
    optim, size = config.optim, config.rollout.batch_size
    share = optim.per_device_train_batch_size * optim.gradient_accumulation_steps
    yield {"optim.gradient_checkpointing": True}
    if config.stage == "decoder" and config.grpo.importance_sampling_level == "token":
        yield {"optim.steps_per_backward": 1}
    yield {"optim.per_device_train_batch_size": 1, "optim.gradient_accumulation_steps": share}
    yield {"model.offload": "phase"}
    while size > 1:
        size //= 2
        yield {"rollout.batch_size": size}


def require_fit(
    config: RunConfig, sizes: Sizes, processes: int, memory: int, engine: Engine = "ddp"
) -> None:
    """Raises UserError where a step needs more than the device's `memory` in bytes."""
    worst = peak(phases(config, step_of(config, sizes, processes), processes, engine))
    if worst.total <= memory:
        return
    largest = max(worst.held, key=worst.held.get)
    raise UserError(
        f"the GPU has {memory / GIB:.1f} GiB and the phase {worst.name!r} needs "
        f"{worst.total / GIB:.1f} GiB, {worst.held[largest] / GIB:.1f} of them {largest}: "
        f"`duet plan CONFIG --gpus {processes} --engine {engine} --memory-gib "
        f"{memory / GIB:.0f}` tells which settings fit"
    )
