"""The pieces of a training step, each run without values: what it holds and what it computes."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from duet.configs.policy_schema import Arithmetic, LoraConfig, SamplingConfig
from duet.inference import autoregressive, decoder, pictures
from duet.inference.adapters import adapter_disabled, add_adapter
from duet.inference.decoding import TokenDecoder
from duet.inference.engine import autocast_dtype
from duet.inference.layout import Size
from duet.inference.parts import PARTS, Part
from duet.inference.shapes import Sizes, build_part
from duet.inference.source_attention import Seen, see
from duet.train import made_up
from duet.train.dropout import lora_dropout
from duet.train.footprint import Kernel, repeated, without_values
from duet.train.made_up import Batch, Scoring
from duet.train.recompute import recompute_blocks
from duet.train.tuning import train_whole


@dataclass(frozen=True)
class Subject:
    """Whose shapes are run, and what of it is trained."""

    sizes: Sizes
    arithmetic: Arithmetic
    stage: str
    lora: LoraConfig | None  # None: full tuning
    recomputed: bool  # gradient checkpointing
    layers: int | None = None  # of each part; None: its own

    @property
    def part(self) -> Part:
        return PARTS[self.stage]

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.arithmetic.dtype)

    def sampled(self, component: str) -> "Subject":
        """The same without what the component does not show while none learns."""
        own = component == self.part.component
        return replace(self, lora=self.lora if own else None, recomputed=False)

    def build(self, component: str) -> Module:
        """On the meta device, as a run has it."""
        module = build_part(component, self.sizes, self.dtype, self.layers)
        if component == self.part.component:
            if self.lora is None:
                train_whole(module, self.part)
            else:
                lora = self.lora
                names, dropout = lora.target_modules, lora.dropout
                with torch.device("meta"):  # fresh values would be drawn for nothing
                    add_adapter(module, self.part, lora.rank, lora.alpha, names, dropout)
            if self.recomputed:
                recompute_blocks(module, self.part.block)
        return module

    @contextmanager
    def running(self) -> Iterator[None]:
        dtype = autocast_dtype(self.arithmetic)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            yield


@dataclass(frozen=True)
class Work:
    """A piece of a step."""

    kept: dict[str, int]  # bytes beside the weights that last, by what holds them
    peaks: tuple[int, ...]  # bytes beside the weights, of each of its parts
    kernels: Counter[Kernel]

    @property
    def held(self) -> dict[str, int]:
        """Bytes beside the weights at its peak."""
        return self.kept | {"working set": max(self.peaks) - sum(self.kept.values())}

    def towards(self, other: "Work", times: int) -> "Work":
        """So many times the way to the other."""
        kept = {k: v + times * (other.kept[k] - v) for k, v in self.kept.items()}
        peaks = (a + times * (b - a) for a, b in zip(self.peaks, other.peaks, strict=True))
        both = self.kernels.keys() | other.kernels.keys()
        counts = {k: self.kernels[k] + times * (other.kernels[k] - self.kernels[k]) for k in both}
        return Work(kept, tuple(peaks), Counter({k: n for k, n in counts.items() if n}))


FEW = 2  # layers
SOURCES = "keys, values of sources"


def by_layers(component: Callable[[Subject], str], learns: bool = False):
    """Run a piece with few layers of the component and with one more, and extend it to all: they
    are alike. Equal pieces are run once."""

    def extend(run: Callable[..., Work]) -> Callable[..., Work]:
        @cache
        def extended(subject: Subject, *args) -> Work:
            few, more = (run(replace(subject, layers=n), *args) for n in (FEW, FEW + 1))
            return few.towards(more, _depth(subject, component(subject)) - FEW)

        @wraps(run)
        def whole(subject: Subject, *args) -> Work:
            same = subject if learns else subject.sampled(component(subject))
            return extended(same, *args)

        return whole

    return extend


@cache
def _whole(component: str, sizes: Sizes, dtype: torch.dtype) -> Module:
    """On the meta device, without an adapter."""
    return build_part(component, sizes, dtype, None)


def _depth(subject: Subject, component: str) -> int:
    [block] = [part.block for part in PARTS.values() if part.component == component]
    module = _whole(component, subject.sizes, subject.dtype)
    return sum(isinstance(part, block) for part in module.modules())


def weight_bytes(subject: Subject, component: str) -> int:
    """Of the frozen weights."""
    return _bytes(component, subject.sizes, subject.dtype)


@cache
def _bytes(component: str, sizes: Sizes, dtype: torch.dtype) -> int:
    module = _whole(component, sizes, dtype)
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


@cache
def block_bytes(subject: Subject) -> int:
    """Of one repeated layer of the trained part, as it is trained."""
    component = subject.part.component
    few, more = (
        sum(p.nbytes for p in replace(subject, layers=n).build(component).parameters())
        for n in (FEW, FEW + 1)
    )
    return more - few


@cache
def idle_bytes(subject: Subject) -> int:
    """Of what full tuning leaves of the trained part, in float32."""
    module = subject.build(subject.part.component)
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()) if not t.requires_grad)


def _reference(subject: Subject, module: Module) -> AbstractContextManager[None]:
    """Full weights are swapped in their place: no value is held twice on the device."""
    return nullcontext() if subject.lora is None else adapter_disabled(module)


@cache
def trained_parameters(subject: Subject) -> int:
    component = subject.part.component
    few, more = (
        sum(p.numel() for p in _trained(replace(subject, layers=n).build(component)))
        for n in (FEW, FEW + 1)
    )
    return few + (more - few) * (_depth(subject, component) - FEW)


def _trained(module: Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


@by_layers(lambda subject: "vision_language_encoder")
def tokens(subject: Subject, batch: Batch) -> Work:
    """The AR writes the grids of so many samples: the prompts, then a token at a time."""
    ar = subject.build("vision_language_encoder")
    with without_values(ar) as meter, torch.no_grad():
        jobs = made_up.token_jobs(batch)
        uniform = torch.zeros(batch.samples, dtype=torch.float64)
        begun = meter.stretch().live
        with subject.running():
            made = TokenDecoder(ar, jobs)
            prefill = meter.stretch()
            for layer in made.cache.layers:  # a token of the middle stands for all
                layer.length += made.total // 2
            codebook = ar.config.vq_config.num_embeddings
            made.step(autoregressive.draw(made.logits, uniform, codebook, batch.sampling).token)
            step = meter.stretch()
        held = sum(x.nbytes for la in made.cache.layers for x in (la.keys, la.values))
        kernels = prefill.kernels + repeated(step.kernels, made.total)
        return Work({"KV cache": held}, (prefill.peak - begun, step.peak - begun), kernels)


@by_layers(lambda subject: "transformer")
def latents(subject: Subject, batch: Batch) -> Work:
    """All denoising steps of so many samples, behind a pass for each source."""
    dit, sampling = subject.build("transformer"), batch.sampling
    with without_values(dit) as meter, torch.no_grad():
        x, given = made_up.noise(dit, batch), made_up.conditions(dit, batch)
        begun = meter.stretch().live
        with subject.running():
            seen = see(dit, given)
            sources = meter.stretch()
            decoder.velocity(dit, x, torch.zeros(batch.samples), seen, sampling.guidance_scale)
        step = meter.stretch()
        kernels = sources.kernels + repeated(step.kernels, sampling.num_inference_steps)
        kept = {SOURCES: _held_by(seen)}
        return Work(kept, (sources.peak - begun, step.peak - begun), kernels)


@cache
def source_latents(subject: Subject, size: Size) -> Work:
    """A source into the VAE."""
    vae = subject.build("vae")
    pixels = torch.Size((1, vae.config.in_channels, size.height, size.width))
    return _through(subject, vae, pixels, pictures.encode_pixels)


@cache
def pixels(subject: Subject, sampling: SamplingConfig) -> Work:
    """A picture out of the VAE."""
    vae = subject.build("vae")
    latents = torch.Size((1, vae.config.latent_channels, *Size.of(sampling).latent))
    return _through(subject, vae, latents, pictures.decode)


def _through(
    subject: Subject, vae: Module, shape: torch.Size, run: Callable[[Module, Tensor], Tensor]
) -> Work:
    with without_values(vae) as meter:
        given = torch.zeros(shape)
        begun = meter.stretch().live
        with subject.running():
            run(vae, given)
        made = meter.stretch()
        return Work({}, (made.peak - begun,), made.kernels)


@by_layers(lambda subject: subject.part.component)
def scoring(subject: Subject, asked: Scoring, reference: bool) -> Work:
    """Log-probs without gradients, by the policy or its reference; the scores are kept."""
    module = subject.build(subject.part.component)
    with without_values(module) as meter, torch.no_grad():
        score = _scorer(subject, asked, module)
        begun = meter.stretch().live
        whose = _reference(subject, module) if reference else nullcontext()
        with whose, subject.running():
            scores = score()
        made = meter.stretch()
        del scores  # alive until here
        return Work({"scores": made.live - begun}, (made.peak - begun,), made.kernels)


@by_layers(lambda subject: subject.part.component, learns=True)
def update(subject: Subject, asked: Scoring) -> Work:
    """A forward and backward pass, the gradients of an earlier one being there."""
    module = subject.build(subject.part.component)
    with without_values(module) as meter:
        for parameter in _trained(module):
            parameter.grad = torch.zeros_like(parameter)
        named = _named(subject, module, asked)
        score = _scorer(subject, asked, module)
        begun = meter.stretch().live
        with lora_dropout(module):
            with subject.running():
                scored = score()
            parts = [meter.stretch()]
            scored.logprobs.sum().backward()
        parts.append(meter.stretch())
        kept = {"activations": parts[0].live - begun - sum(named.values()), **named}
        peaks = tuple(part.peak - begun for part in parts)
        return Work(kept, peaks, sum((part.kernels for part in parts), Counter()))


def _named(subject: Subject, module: Module, asked: Scoring) -> dict[str, int]:
    """Bytes of what a forward keeps for backward that has a name of its own."""
    if subject.stage == "ar":
        dtype = autocast_dtype(subject.arithmetic) or module.dtype
        outputs = module.config.text_config.vision_vocab_size
        count = asked.samples * made_up.scored_tokens(asked) * outputs
        return {"logits": count * dtype.itemsize}
    with torch.no_grad(), subject.running():
        return {SOURCES: _held_by(see(module, made_up.conditions(module, asked.batch)))}


def _held_by(seen: Seen) -> int:
    """Bytes of the sources' keys and values."""
    layers = [] if seen.sources is None else seen.sources.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def _scorer(subject: Subject, asked: Scoring, module: Module) -> Callable[[], Any]:
    make = {"ar": made_up.token_scorer, "decoder": made_up.step_scorer}[subject.stage]
    return make(asked, module)
