"""Memory on the device by phase and by what holds it, counted before any weight is read."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from duet.configs.reward_schema import RewardConfig
from duet.configs.schema import RunConfig
from duet.inference.batching import pack
from duet.inference.model import COMPONENTS
from duet.inference.shapes import Sizes
from duet.rewards.sizes import reward_sizes
from duet.train import workload
from duet.train.engines import sharding_of
from duet.train.environment import Engine
from duet.train.geometry import geometry, sizes_on_first
from duet.train.holdings import Parts, Trained, always_held, held_weights
from duet.train.kinds import Datasets, Kinds
from duet.train.made_up import Batch, Scoring
from duet.train.prior_cache import PriorCache
from duet.train.workload import Subject, Work

GIB = 2**30
DECODER_PARTS = ("transformer", "vae", "text_encoder")


@dataclass(frozen=True)
class Phase:
    name: str
    held: dict[str, int]  # bytes at its peak, by what holds them
    needs: tuple[str, ...]  # components
    learns: bool = False  # else it samples

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
    source: Work | None  # of the largest, into the VAE; None: there are no edits
    sources: int
    update: Work
    updates: int  # forward and backward passes
    reference: Work | None  # None: no KL is asked for
    references: int  # forwards for it, once a step for all passes
    rescore: Work
    rescores: int  # forwards for old log-probs
    held_out: tuple[Work, Work] | None  # tokens and latents of an evaluation within the run

    @property
    def read(self) -> tuple[str, ...]:
        """The components whose weights are read."""
        return COMPONENTS if self.tokens or self.held_out else DECODER_PARTS


def subject_of(config: RunConfig, sizes: Sizes) -> Subject:
    recomputed = config.optim.gradient_checkpointing
    lora = config.lora if config.tuning == "lora" else None
    return Subject(sizes, config.arithmetic, config.stage, lora, recomputed)


def trained_of(config: RunConfig, subject: Subject) -> Trained:
    """Full weights stand in the place of the part's own; its idle submodules are float32 too."""
    component, full = subject.part.component, subject.lora is None
    frozen = workload.idle_bytes(subject) if full else workload.weight_bytes(subject, component)
    copies = 0 if config.average is None else 1
    return Trained(component, workload.trained_parameters(subject), frozen, copies=copies)


def step_of(
    config: RunConfig, sizes: Sizes, processes: int, datasets: Datasets = Datasets()
) -> Step:
    """Of a geometry that divides, with those rows that need most."""
    subject, kinds = subject_of(config, sizes), datasets.train
    groups, cap = sizes_on_first(config, processes), config.rollout.batch_size
    own, drawn = sum(groups), engine_batches(groups, cap)
    together = max(map(len, pack(groups, cap, weight=lambda n: n)))  # groups in a batch
    # the decoder's priors: one a prompt, all in one call
    written = drawn if config.stage == "ar" else engine_batches([len(groups)], cap)
    prompts = together if config.stage == "ar" else max(written)
    cached = PriorCache.of(config) is not None
    micro = own // config.optim.per_device_train_batch_size
    window = config.sde.window_size if config.stage == "decoder" else 1
    at_once = min(window, config.optim.steps_per_backward or window)
    pieces = micro * (window // at_once)

    def scored(run: Callable[..., Work], steps: int, *more: bool) -> Work:
        asked = _scorings(config, groups, steps, kinds)
        return _heaviest(run(subject, each, *more) for each in asked)

    return Step(
        subject,
        None if cached else _tokens(subject, config, max(written), prompts, kinds),
        len(written),
        _latents(subject, config, max(drawn), together, kinds),
        len(drawn),
        workload.pixels(subject, config.sampling),
        own,
        _source(subject, kinds),
        len(groups) * len(kinds.edit),
        scored(workload.update, at_once),
        pieces * config.grpo.num_iterations,
        scored(workload.scoring, at_once, True) if config.grpo.beta > 0 else None,
        pieces,
        scored(workload.scoring, window, False),
        micro if _rescored(config, processes) else 0,
        _held_out(config, subject, datasets.eval),
    )


def _tokens(subject: Subject, config: RunConfig, samples: int, prompts: int, kinds: Kinds) -> Work:
    batches = (Batch(config.sampling, samples, prompts, kind) for kind in kinds.single())
    return _heaviest(workload.tokens(subject, batch) for batch in batches)


def _latents(subject: Subject, config: RunConfig, samples: int, groups: int, kinds: Kinds) -> Work:
    return workload.latents(subject, Batch(config.sampling, samples, groups, kinds.single()[-1]))


def _source(subject: Subject, kinds: Kinds) -> Work | None:
    largest = max(kinds.edit, key=lambda size: size.grid.count, default=None)
    return None if largest is None else workload.source_latents(subject, largest)


def _scorings(config: RunConfig, groups: Sequence[int], steps: int, kinds: Kinds) -> list[Scoring]:
    """Alternatives of what one training forward scores: the AR's takes text and edits together,
    the DiT's one kind.
    """
    samples = config.optim.per_device_train_batch_size
    owners = [group for group, size in enumerate(groups) for _ in range(size)]
    at_once = max(len({owners[i] for i in batch}) for batch in pack(owners, samples))
    ways = [kinds] if config.stage == "ar" and samples > 1 else kinds.single()
    return [Scoring(config.sampling, config.sde, samples, steps, at_once, way) for way in ways]


def _heaviest(works: Iterable[Work]) -> Work:
    return max(works, key=lambda work: max(work.peaks))


def _held_out(config: RunConfig, subject: Subject, kinds: Kinds) -> tuple[Work, Work] | None:
    if config.train.eval_steps is None:
        return None
    samples = config.rollout.batch_size
    asked = subject, config, samples, -(-samples // config.eval.images_per_prompt), kinds
    return _tokens(*asked), _latents(*asked)


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


def phases(
    config: RunConfig,
    step: Step,
    processes: int,
    beside: Sequence[RunConfig] = (),
    engine: Engine = "ddp",
) -> list[Phase]:
    """In their order; rewards are scored beside the sampling of the next batch.

    `beside`: the configs of the run's other turns, whose weights, optimizer and rewards wait;
    `engine`: what spreads the trained parts over the processes.
    """
    offloads, turns = config.model.offload == "phase", (config, *beside)
    trained = [trained_of(turn, subject_of(turn, step.subject.sizes)) for turn in turns]
    parts = Parts.of(engine, processes)
    always = always_held(trained, processes, engine)
    stays = () if sharding_of(engine).movable else tuple(t.component for t in trained)
    judges = turns[:1] if offloads else turns
    rewards = reward_sizes(r for turn in judges for r in _rewards(turn))

    def whole(phase: Phase) -> Phase:
        present = {*phase.needs, *stays} if offloads else set(step.read)
        learns, stay = phase.learns, processes > 1  # as inference/placement.py has it
        weights = held_weights(step.subject, trained, present, parts, learns, stay)
        judging = {} if offloads and phase.learns else {"reward models": rewards.bytes}
        # gradients that always stay are those of all turns
        held = weights | phase.held | always | judging
        return replace(phase, held={name: size for name, size in held.items() if size})

    return [whole(phase) for phase in (*_sampling(step), *_learning(step, trained[0], parts))]


def _rewards(config: RunConfig) -> Iterator[RewardConfig]:
    """Those that are loaded."""
    yield from (*config.rewards, *config.watch.rewards)
    if config.train.eval_steps is not None:
        yield from config.eval.rewards


def _sampling(step: Step) -> Iterator[Phase]:
    """Each with what its work holds alone."""
    if step.tokens:
        yield Phase("AR tokens", step.tokens.held, ("vision_language_encoder",))
    if step.source:
        yield Phase("sources", {"VAE encode": step.source.held["working set"]}, DECODER_PARTS)
    yield Phase("latents", step.latents.held, DECODER_PARTS)
    yield Phase("pixels", {"VAE decode": step.pixels.held["working set"]}, DECODER_PARTS)
    yield Phase("rewards", {}, DECODER_PARTS)
    if step.held_out:
        tokens, latents = step.held_out
        yield Phase("held-out tokens", tokens.held, ("vision_language_encoder",))
        yield Phase("held-out latents", latents.held, DECODER_PARTS)


def _learning(step: Step, own: Trained, parts: Parts) -> Iterator[Phase]:
    """Each with what its work holds alone."""

    def phase(name: str, held: dict[str, int]) -> Phase:
        return Phase(name, held, (own.component,), learns=True)

    waiting, compared = {"gradients": own.copy // parts.state}, {}
    yield phase("old log-probs", {"working set": max(step.rescore.peaks)})
    if step.reference:
        compared["reference"] = step.references * step.reference.kept["scores"]
        forward = {"working set": step.reference.held["working set"]}
        yield phase("reference", compared | forward)
    yield phase("update", waiting | compared | step.update.held)
    # AdamW works on all parameters at once, with one more copy of them
    copy = {"working set": own.copy // parts.state}
    yield phase("optimizer step", waiting | compared | copy)


def peak(found: Sequence[Phase]) -> Phase:
    return max(found, key=lambda phase: phase.total)
