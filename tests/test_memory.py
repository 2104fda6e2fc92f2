"""What saves memory changes no number: blocks computed again, positions in parts."""

import pytest
import torch

from duet.inference import autoregressive
from duet.inference.parts import PARTS
from duet.train.recompute import recompute_blocks
from duet.train.tiny.gaps import make_bench

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
