"""Memory on the device by phase and by what holds it, counted before any weight is read."""

from collections import ChainMap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from duet.configs.errors import UserError
from duet.configs.schema import RunConfig
from duet.inference.batching import pack
from duet.inference.model import COMPONENTS
from duet.inference.shapes import Sizes
from duet.rewards.sizes import reward_sizes
from duet.train import workload
from duet.train.geometry import changed, geometry
from duet.train.prior_cache import PriorCache
from duet.train.workload import Scoring, Subject, Work

GIB = 2**30
RESERVE = 2 * GIB  # assumed: CUDA context, workspaces of cuBLAS and cuDNN, fragments
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
    tokens: Work | None  # None: prior tokens are read from a cache, and no AR
    token_batches: int
    latents: Work
    latent_batches: int
    pixels: Work
    pictures: int
    update: Work
    updates: int  # forward and backward passes
    reference: Work | None  # None: no KL is asked for
    references: int  # forwards for it, once a step for all passes
    rescore: Work
    rescores: int  # forwards for old log-probs

    @property
    def read(self) -> tuple[str, ...]:
        """The components whose weights are read."""
        return COMPONENTS if self.tokens else DECODER_PARTS


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
    groups, count = config.rollout.prompts_per_step // processes, config.rollout.num_generations
    drawn = engine_batches(groups, count, config.rollout.batch_size)
    # the decoder's priors: one a prompt, all in one call
    priors = engine_batches(1, groups, config.rollout.batch_size)
    written = drawn if config.stage == "ar" else priors
    samples = config.optim.per_device_train_batch_size
    micro = groups * count // samples
    window = sde.window_size if config.stage == "decoder" else 1
    at_once = min(window, config.optim.steps_per_backward or window)
    piece, whole = (Scoring(sampling, sde, samples, steps) for steps in (at_once, window))
    pieces = micro * (window // at_once)
    return Step(
        subject,
        workload.tokens(subject, sampling, max(written)) if PriorCache.of(config) is None else None,
        len(written),
        workload.latents(subject, sampling, max(drawn)),
        len(drawn),
        workload.pixels(subject, sampling),
        groups * count,
        workload.update(subject, piece),
        pieces * config.grpo.num_iterations,
        workload.scoring(subject, piece, True) if config.grpo.beta > 0 else None,
        pieces,
        workload.scoring(subject, whole, False),
        micro if _rescored(config, processes) else 0,
    )


def _rescored(config: RunConfig, processes: int) -> bool:
    """Whether every step has old log-probs of the trainer's own, and not the first one alone."""
    divided = geometry(config, processes, config.train.max_steps)
    single = divided.updates_per_rollout == 1 and config.dropout == 0
    return config.old_logprobs_of == "trainer" and not single


def engine_batches(groups: int, samples: int, cap: int) -> list[int]:
    """Samples of each batch that the engine runs for so many groups, as `collect` packs them."""
    together = pack([samples] * groups, cap, weight=lambda n: n)
    return [len(b) for part in together for b in pack(range(len(part) * samples), cap)]


def phases(
    config: RunConfig, step: Step, processes: int, beside: Sequence[RunConfig] = ()
) -> list[Phase]:
    """In their order; rewards are scored beside the sampling of the next batch.

    `beside`: the configs of the run's other turns, whose weights, optimizer and rewards wait.
    """
    subject, offloads = step.subject, config.model.offload == "phase"
    trained = {
        each.part.component: trained_of(turn, each)
        for turn, each in ((c, subject_of(c, subject.sizes)) for c in (config, *beside))
    }
    own = trained[subject.part.component]
    turns = (config,) if offloads else (config, *beside)
    rewards = reward_sizes(r for t in turns for r in (*t.rewards, *t.watch.rewards))
    always = _always(trained.values(), processes)

    def phase(name: str, needed: Sequence[str], held: dict[str, int], judged: bool) -> Phase:
        present = needed if offloads else step.read
        here = [t for component, t in trained.items() if component in present]
        frozen = sum(workload.weight_bytes(subject, c) for c in present)
        weights = {
            "frozen weights": frozen - sum(t.replaced for t in here),
            "trained weights": sum(t.copy for t in here),
        }
        judges = {"reward models": rewards.bytes if judged or not offloads else 0}
        return Phase(name, {k: v for k, v in (weights | held | always | judges).items() if v})

    part = (subject.part.component,)
    gradients = {"gradients": own.copy}
    compared = {}
    if step.reference:
        compared["reference"] = step.references * step.reference.kept["scores"]
    found = [
        phase("latents", DECODER_PARTS, step.latents.held, True),
        phase("pixels", DECODER_PARTS, {"VAE decode": step.pixels.held["working set"]}, True),
        phase("rewards", DECODER_PARTS, {}, True),
        phase("old log-probs", part, {"working set": max(step.rescore.peaks)}, False),
        phase("update", part, gradients | compared | step.update.held, False),
        # AdamW works on all parameters at once, with one more copy of them
        phase("optimizer step", part, gradients | compared | {"working set": own.copy}, False),
    ]
    if step.tokens:
        found.insert(0, phase("AR tokens", ("vision_language_encoder",), step.tokens.held, True))
    if step.reference:
        forward = {"working set": step.reference.held["working set"]}
        found.insert(-2, phase("reference", part, compared | forward, False))
    return found


def _always(trained: Collection[Trained], processes: int) -> dict[str, int]:
    """What is there in every phase."""
    return {
        "optimizer state": sum(t.states * t.copy for t in trained),
        "copies of the trained weights": sum(t.copies * t.copy for t in trained),
        "DDP buckets": sum(t.copy for t in trained) if processes > 1 else 0,
        "CUDA context, workspaces (assumed)": RESERVE,
    }


def peak(found: Sequence[Phase]) -> Phase:
    return max(found, key=lambda phase: phase.total)


def savings(
    config: RunConfig,
    sizes: Sizes,
    processes: int,
    memory: int,
    beside: Sequence[RunConfig] = (),
) -> dict[str, Any] | None:
    """The settings that make it fit, the cheapest first; None: no setting does.

    `beside`: as in `phases`.
    """

    def fits(applied: Sequence[dict[str, Any]]) -> bool:
        now = changed(config, dict(ChainMap(*reversed(applied))))
        step = step_of(now, sizes, processes)
        return peak(phases(now, step, processes, beside)).total <= memory

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
    config: RunConfig,
    sizes: Sizes,
    processes: int,
    memory: int,
    beside: Sequence[RunConfig] = (),
) -> None:
    """Raises UserError where a step needs more than the device's `memory` in bytes.

    `beside`: as in `phases`.
    """
    worst = peak(phases(config, step_of(config, sizes, processes), processes, beside))
    if worst.total <= memory:
        return
    largest = max(worst.held, key=worst.held.get)
    raise UserError(
        f"the GPU has {memory / GIB:.1f} GiB and the phase {worst.name!r} needs "
        f"{worst.total / GIB:.1f} GiB, {worst.held[largest] / GIB:.1f} of them {largest}: "
        f"`duet plan CONFIG --memory-gib {memory / GIB:.0f}` tells which settings fit"
    )
