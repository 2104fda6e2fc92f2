"""What saves memory changes no number: blocks computed again, positions in parts."""

import json

import pytest
import torch

from duet.configs.errors import UserError
from duet.configs.policy_schema import ModelConfig
from duet.configs.schema import GrpoConfig
from duet.inference import autoregressive
from duet.inference.model import COMPONENTS, load_pipeline
from duet.inference.parts import PARTS
from duet.inference.placement import Placement
from duet.train import setup
from duet.train.loss import NORMALISED, Actions, Counts, policy_loss
from duet.train.recompute import recompute_blocks
from duet.train.tiny import gaps
from duet.train.tiny.double_precision import in_double_precision
from duet.train.tiny.gaps import make_bench
from tests.conftest import MODEL, train

STAGES = ["ar", "decoder"]
SMALL = ["rollout.prompts_per_step=1", "rollout.num_generations=2"]


@pytest.fixture(scope="module", params=STAGES)
def bench(request):
    return make_bench(request.param, "float32", *SMALL)


def gradients(bench) -> dict[str, torch.Tensor]:
    bench.module.zero_grad()
    bench.stage.score(bench.rollouts, bench.module).logprobs.sum().backward()
    return {n: p.grad.clone() for n, p in bench.module.named_parameters() if p.grad is not None}


def kept_bytes(bench) -> int:
    """What a scoring forward keeps for backward, each storage once."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scored = bench.stage.score(bench.rollouts, bench.module)
    weights = {p.untyped_storage().data_ptr() for p in bench.module.parameters()}
    assert scored.logprobs.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def test_blocks_computed_again_give_the_same_gradients_from_less(bench):
    module = bench.module
    assert not module.training, "transformers' own switch would do nothing here"
    whole, kept = gradients(bench), kept_bytes(bench)
    recompute_blocks(module, PARTS[bench.config.stage].block)
    again, fewer = gradients(bench), kept_bytes(bench)
    assert whole.keys() == again.keys() and any(g.abs().max() > 0 for g in whole.values())
    for name, gradient in whole.items():
        assert torch.equal(gradient, again[name]), name
    assert fewer < 0.6 * kept
    with torch.no_grad():
        sampled = bench.stage.engine.rollout(
            [r.request for r in bench.rollouts], bench.stage.window(0)
        )
    assert torch.equal(bench.stage.sampled(sampled[0]), bench.stage.sampled(bench.rollouts[0]))


def test_the_codebook_is_never_held_whole_in_float32(monkeypatch):
    """Bits of the scores and gradients do not depend on how many positions stand at once."""
    bench = make_bench("ar", "bfloat16", *SMALL)
    count, codebook = bench.rollouts[0].tokens.tokens.shape[1], bench.stage.engine.codebook_size
    true, at_once, held = autoregressive.policy_logprobs, [], []

    def spy(logits, *args):
        at_once.append(logits.shape[1])
        return true(logits, *args)

    def keep(tensor):
        if tensor.dtype == torch.float32 and tensor.shape[-1] == codebook:
            held.append(tensor.shape)
        return tensor

    monkeypatch.setattr(autoregressive, "policy_logprobs", spy)
    found = []
    for positions in (count, 64):
        monkeypatch.setattr(autoregressive, "POSITIONS", positions)
        bench.module.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scored = bench.stage.score(bench.rollouts, bench.module)
        scored.logprobs.sum().backward()
        assert max(at_once) == positions and not held, "nothing waits for backward"
        at_once.clear()
        grads = [p.grad.clone() for p in bench.module.parameters() if p.grad is not None]
        found.append((scored.logprobs.detach(), scored.entropy, grads))
    (one, entropy, whole), (other, same, parts) = found
    assert torch.equal(one, other) and torch.equal(entropy, same)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.fixture
def double():
    with in_double_precision():
        yield


@pytest.mark.parametrize("loss_type", NORMALISED)
def test_a_window_step_by_step_gives_the_gradient_of_all_at_once(loss_type, double, monkeypatch):
    """In float64: float32's rounding alone is a millionth of the largest gradient."""
    monkeypatch.setattr(gaps, "load_pipeline", setup.load_pipeline)
    grpo = GrpoConfig(loss_type=loss_type, beta=0.1)
    bench = make_bench("decoder", "float32", *SMALL, "optim.steps_per_backward=1")
    (rollout,) = bench.rollouts
    sampled, gain = bench.stage.sampled(rollout), torch.tensor([1.0, -0.5])
    counts = Counts(sampled.shape[1], 5.0)
    assert counts.sample == bench.config.sde.window_size > 1

    def backward(rollouts, actions: slice) -> float:
        scored = bench.stage.score(rollouts, bench.module)
        old = sampled[:, actions] - 0.001  # off ratio 1
        kl = (scored.logprobs - old) ** 2
        loss = policy_loss(Actions(scored.logprobs, old, gain, kl), grpo, counts).loss
        loss.backward()
        return float(loss.detach())

    bench.module.zero_grad()
    whole = backward([rollout], slice(None))
    expected = {n: p.grad.clone() for n, p in bench.module.named_parameters() if p.grad is not None}
    bench.module.zero_grad()
    pieces = bench.stage.pieces([rollout])
    assert [p.actions for p in pieces] == [slice(0, 1), slice(1, 2)]
    parts = [backward(piece.rollouts, piece.actions) for piece in pieces]
    assert sum(parts) == pytest.approx(whole, rel=1e-5)
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, parameter in bench.module.named_parameters():
        if name in expected:
            assert torch.allclose(parameter.grad, expected[name], rtol=0, atol=1e-12 * largest)


@pytest.mark.parametrize(
    ("stage", "saving"),
    [
        ("ar", ["optim.gradient_checkpointing=true", "lora.dropout=0.1"]),
        ("decoder", ["optim.gradient_checkpointing=true", "lora.dropout=0.1"]),
        ("decoder", ["optim.steps_per_backward=1", "grpo.beta=0.01"]),
    ],
)
def test_a_run_that_saves_memory_is_the_same_run(stage, saving, small_run, tmp_path):
    """With dropout: what backward computes again is thinned as the forward was."""
    logged = []
    for name, overrides in (("plain", saving[1:]), ("saving", saving)):
        folder = tmp_path / name
        train(small_run(stage, *overrides, "train.max_steps=1", f"output_dir={folder}"))
        logged.append(json.loads((folder / "metrics.jsonl").read_text()))
    for key in ("loss", "grad_norm", "ratio/mean", "ratio/max"):
        assert logged[0][key] == pytest.approx(logged[1][key], rel=1e-5, abs=1e-7), key


def test_steps_per_backward_that_cannot_be_is_refused(small_run):
    for overrides, reason in (
        (["sde.window_size=3"], "a divisor of sde.window_size = 3"),
        (
            [
                "grpo.importance_sampling_level=sequence",
                "sde.window_size=4",
                "sde.window_start_max=0",
            ],
            "0 where",
        ),
    ):
        with pytest.raises(UserError, match=reason):
            train(small_run("decoder", "optim.steps_per_backward=2", *overrides))


class Places:
    """Where each part was last sent; forwards on the CPU while it should be away are told."""

    def __init__(self, monkeypatch) -> None:
        self.at: dict[str, str] = {}
        self.most: list[set[str]] = []
        true = load_pipeline

        def load(*args):
            pipeline = true(*args)
            for name in COMPONENTS:
                self._follow(name, getattr(pipeline, name))
            return pipeline

        monkeypatch.setattr(setup, "load_pipeline", load)

    def _follow(self, name: str, module: torch.nn.Module) -> None:
        self.at[name], true = "away", module.to

        def to(*where, **others):
            if where:
                self.at[name] = "away" if where[0] == "cpu" else "here"
                self.most.append({n for n, place in self.at.items() if place == "here"})
            return true(*where, **others)

        module.to = to
        for method in ("forward", "encode", "decode"):
            if hasattr(module, method):
                setattr(module, method, self._checked(name, getattr(module, method)))

    def _checked(self, name: str, method):
        def call(*args, **kwargs):
            assert self.at[name] == "here", f"{name} runs while it waits on the CPU"
            return method(*args, **kwargs)

        return call


@pytest.mark.parametrize("stage", STAGES)
def test_parts_wait_on_the_cpu_until_their_phase(stage, small_run, monkeypatch, tmp_path):
    """There is no second device here: what is sent where, and that the run is the same."""
    logged = []
    for offload in ("none", "phase"):
        folder = tmp_path / offload
        config = small_run(
            stage, f"model.offload={offload}", f"output_dir={folder}", "train.max_steps=1"
        )
        if offload == "phase":
            places = Places(monkeypatch)
        train(config)
        logged.append(json.loads((folder / "metrics.jsonl").read_text()))
    for key in ("loss", "grad_norm", "reward"):
        assert logged[0][key] == logged[1][key]
    assert {"vision_language_encoder"} in places.most
    assert {"text_encoder", "transformer", "vae"} in places.most
    assert not any({"vision_language_encoder", "transformer"} <= here for here in places.most)


@pytest.mark.parametrize("processes", [1, 2])
def test_over_processes_what_is_trained_stays(processes, monkeypatch):
    """A parameter that changes its device has another gradient accumulator behind it, without the
    hook by which DDP shares the gradient. The device is one that there is none of here."""
    monkeypatch.setattr("duet.inference.placement.is_initialized", lambda: processes > 1)
    pipeline = load_pipeline(str(MODEL))
    placement = Placement(pipeline, ModelConfig(path=str(MODEL), offload="phase"))
    placement.device = torch.device("meta")
    dit = pipeline.transformer
    dit.transformer_blocks[0].attn1.to_q.weight.requires_grad_()
    placement.bring("transformer")
    stayed = [n for n, p in dit.named_parameters() if not p.is_meta]
    assert stayed == (["transformer_blocks.0.attn1.to_q.weight"] if processes > 1 else [])
    assert not any(p.is_meta for p in pipeline.vision_language_encoder.parameters())
