"""duet plan: the facts' figures, the shipped configs on their card, and what is refused."""

import re
import shutil
from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.configs.policy_schema import Arithmetic, LoraConfig, SamplingConfig, SdeConfig
from duet.configs.reward_schema import RewardConfig
from duet.configs.turns import turns
from duet.inference import pictures
from duet.inference.adapters import add_adapter
from duet.inference.layout import Size
from duet.inference.shapes import Scale
from duet.launch import cost, plan
from duet.train.environment import Engine
from duet.train.fitting import Deployment, require_fit, savings
from duet.train.footprint import Kernel, without_values
from duet.train.geometry import changed, geometry, nearest_geometry
from duet.train.made_up import Batch, Scoring
from duet.train.memory import (
    GIB,
    engine_batches,
    peak,
    phases,
    step_of,
    subject_of,
    trained_of,
)
from duet.train.workload import (
    Subject,
    latents,
    tokens,
    trained_parameters,
    update,
    weight_bytes,
)
from tests.conftest import MODEL, ROOT

REAL = {stage: ROOT / "configs" / "glm_image" / f"{stage}.yaml" for stage in ("ar", "decoder")}
LORA = LoraConfig(rank=64, alpha=128)
AUTOCAST = Arithmetic("bfloat16", "bf16")
SAMPLING = {"AR tokens", "latents", "pixels", "rewards"}
TINY_DIT = Subject(MODEL, Arithmetic(), "decoder", LORA, False)


def dit_of(recomputed: bool, layers: int | None = None, arithmetic=AUTOCAST) -> Subject:
    return Subject(Scale(), arithmetic, "decoder", LORA, recomputed, layers)


def call_dit(dit, latent: tuple[int, int], glyphs: int):
    count = latent[0] * latent[1] // 4
    return dit(
        hidden_states=torch.ones(1, 16, *latent, dtype=dit.dtype),
        encoder_hidden_states=torch.ones(1, glyphs, dit.config.text_embed_dim, dtype=dit.dtype),
        prior_token_id=torch.zeros(1, count, dtype=torch.int64),
        prior_token_drop=torch.zeros(1, count, dtype=torch.bool),
        timestep=torch.ones(1),
        target_size=torch.ones(1, 2, dtype=dit.dtype),
        crop_coords=torch.ones(1, 2, dtype=dit.dtype),
        return_dict=False,
    )[0]


def call_ar(ar, count: int):
    ids = torch.zeros(1, count, dtype=torch.int64)
    positions = torch.arange(count).expand(3, 1, -1)
    return ar(input_ids=ids, position_ids=positions, use_cache=False).logits


def kept_without_values(module, call) -> int:
    with without_values(module) as meter:
        begun = meter.stretch().live
        out = call(module)
        kept = meter.stretch().live - begun
        assert out.requires_grad
    return kept


def kept_for_real(module, call) -> int:
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = call(module)
    storages[out.untyped_storage().data_ptr()] = out.untyped_storage().nbytes()
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    return sum(size for pointer, size in storages.items() if pointer not in weights)


def test_the_released_sizes_are_the_facts():
    subject = dit_of(False)
    assert weight_bytes(subject, "transformer") / GIB == pytest.approx(12.9, rel=0.01)
    assert trained_parameters(subject) / 1e6 == pytest.approx(142, rel=0.01)
    ar = weight_bytes(subject, "vision_language_encoder") / 2  # bytes in bfloat16
    assert ar / 1e9 == pytest.approx(9.0 + 1.1, rel=0.01)


@pytest.mark.parametrize(("recomputed", "facts"), [(False, 17.5), (True, 1.0)])
def test_a_forward_in_bfloat16_keeps_what_the_facts_say(recomputed, facts):
    """Of one unguided forward at 1024 px, 30 layers from 2 and 3."""
    kept = []
    for layers in (2, 3):
        dit = dit_of(recomputed, layers, Arithmetic("bfloat16")).build("transformer")
        for parameter in dit.parameters():
            parameter.data = parameter.data.bfloat16()  # the LoRA too
        kept.append(kept_without_values(dit, lambda dit: call_dit(dit, (128, 128), 32)))
    assert (kept[0] + 28 * (kept[1] - kept[0])) / GIB == pytest.approx(facts, rel=0.1)


@pytest.mark.parametrize(("recomputed", "kept"), [(False, 24.0), (True, 1.0)])
def test_an_update_as_configs_train_keeps_more(recomputed, kept):
    """Autocast, LoRA in float32."""
    asked = Scoring(SamplingConfig(guidance_scale=1.0), SdeConfig(), 1, 1)
    alone = update(dit_of(recomputed), asked)
    assert alone.held["activations"] / GIB == pytest.approx(kept, rel=0.03)
    if recomputed:
        guided = Scoring(SamplingConfig(), SdeConfig(), 1, 2)
        assert update(dit_of(recomputed), guided).held["activations"] == pytest.approx(
            4 * alone.held["activations"], rel=0.03
        )


@pytest.mark.parametrize(
    ("stage", "component", "call"),
    [
        ("ar", "vision_language_encoder", lambda ar: call_ar(ar, 300)),
        ("decoder", "transformer", lambda dit: call_dit(dit, (32, 48), 20)),
    ],
)
def test_what_is_counted_is_what_autograd_saves(stage, component, call, pipeline):
    """The tiny model, by its config.json alone and with its weights."""
    subject = Subject(MODEL, Arithmetic(), stage, LORA, False)
    counted = kept_without_values(subject.build(component), call)
    module = getattr(pipeline, component)
    real = type(module).from_pretrained(MODEL / component).requires_grad_(False).eval()
    assert weight_bytes(subject, component) == sum(
        t.nbytes for t in (*module.parameters(), *module.buffers())
    )
    add_adapter(real, subject.part, LORA.rank, LORA.alpha)
    assert trained_parameters(subject) == sum(
        p.numel() for p in real.parameters() if p.requires_grad
    )
    assert counted == pytest.approx(kept_for_real(real, call), rel=0.05)


@pytest.mark.parametrize("piece", [tokens, latents])
def test_a_piece_that_samples_is_counted_once_whatever_learns(piece):
    asked = Batch(SamplingConfig(height=64, width=96), 2)
    recomputed = replace(TINY_DIT, recomputed=True)
    assert piece(TINY_DIT, asked) is piece(recomputed, asked)
    one, other = (piece.__wrapped__(s, asked) for s in (TINY_DIT, recomputed))
    assert one == other, "counted anew it is the same"
    other = replace(TINY_DIT, lora=replace(LORA, rank=8))
    shows = piece is latents  # the LoRA is the decoder's
    assert (piece(TINY_DIT, asked) != piece(other, asked)) == shows


def test_a_picture_at_a_time_leaves_the_vae_where_the_plan_counts_one(monkeypatch):
    at_once = []

    def decode(vae, latents):
        at_once.append(tuple(latents.shape))
        height, width = latents.shape[-2:]
        return torch.zeros(len(latents), 3, 8 * height, 8 * width)

    monkeypatch.setattr(pictures, "decode", decode)
    assert pictures.decode_pixels(None, torch.zeros(3, 16, 128, 128)).shape == (3, 1024, 1024, 3)
    assert at_once == 3 * [(1, 16, 128, 128)]
    pictures.decode_pixels(None, torch.zeros(3, 16, 8, 12))
    assert at_once[3:] == [(3, 16, 8, 12)], "small ones leave together"


@pytest.mark.parametrize("stage", REAL)
def test_a_shipped_config_fits_and_says_its_peak(stage, capsys):
    plan.main([str(REAL[stage])])
    printed = capsys.readouterr().out
    [peak] = re.findall(r"peak (\d+\.\d) GiB in phase '[\w -]+': fits in 80 GiB", printed)
    assert f"peak {peak} GiB" in REAL[stage].read_text()
    assert 1.1 * float(peak) < 80
    for named in ("AR tokens", "latents", "pixels", "rewards", "old log-probs", "update"):
        assert named in printed.partition("\n\n")[2].splitlines()[0]
    for holder in ("frozen weights", "trained weights", "optimizer state", "gradients",
                   "activations", "KV cache", "VAE decode", "working set"):  # fmt: skip
        assert f"\n{holder} " in printed
    assert ("logits" in printed) == (stage == "ar")
    assert "128 samples a GPU; 8 updates" in printed and "= 16 samples over all GPUs" in printed
    assert "H100" in printed and "an estimate" in printed and "reward models" in printed


OFFLOAD = {"model.offload": "phase"}
SMALLEST = OFFLOAD | {"lora.rank": 32, "lora.alpha": 64.0}
SINGLE = {"optim.per_device_train_batch_size": 1, "optim.gradient_accumulation_steps": 16}


@pytest.mark.parametrize(
    ("card", "settings"),
    [
        ("80 GB", {"ar": {}, "decoder": {}}),
        ("48 GB", {"ar": OFFLOAD, "decoder": OFFLOAD}),
        ("24 GB", {"ar": SMALLEST | SINGLE | {"rollout.batch_size": 8}, "decoder": SMALLEST}),
    ],
)
def test_the_readmes_table_is_the_plans(card, settings):
    [row] = re.findall(rf"^\| {card}.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    for stage, changes in settings.items():
        config = changed(load_config(REAL[stage]), changes)
        if "reward models on the CPU" in row:
            config = replace(config, rewards=(RewardConfig("brisque"),))
        total = peak(phases(config, step_of(config, Scale(), 1), 1)).total / GIB
        assert re.search(rf"[:|] {total:.1f} GiB \|", row), (stage, total)
        assert total < float(card.split()[0]) - 0.5


def test_processes_have_buckets_and_their_share():
    config = load_config(REAL["decoder"])
    alone, beside = (phases(config, step_of(config, Scale(), n), n) for n in (1, 8))
    buckets = 4 * trained_parameters(dit_of(True))
    for one, other in zip(alone, beside, strict=True):
        assert other.held.get("DDP buckets") == buckets
        kept = [phase.held.get("reference", 0) for phase in (one, other)]
        assert kept[0] == 8 * kept[1], "of a process's own samples"
        if one.name != "AR tokens":  # two prompts a process
            assert other.total - kept[1] == one.total - kept[0] + buckets


def test_the_readmes_many_gpus_are_the_plans():
    """The decoder's of eight: the others take their seconds too."""
    [row] = re.findall(r"^\| 8 \| .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    lora, full = re.findall(r"`(\w+)` \| [\d.]+ GiB \| ([\d.]+) GiB", row)
    tuned = ["tuning=full", "model.offload=phase"]
    for (engine, told), overrides in ((lora, []), (full, tuned)):
        asked = load_config(REAL["decoder"], overrides)
        config = changed(asked, nearest_geometry(asked, 8))
        most = peak(phases(config, step_of(config, Scale(), 8), 8, engine=engine)).total
        assert f"{most / GIB:.1f}" == told


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_an_engine_holds_its_part_of_what_it_shards(tuning):
    config = load_config(REAL["decoder"], [f"tuning={tuning}"])
    step, whole = step_of(config, Scale(), 8), trained_of(config, subject_of(config, Scale())).copy
    found = {e: phases(config, step, 8, engine=e) for e in get_args(Engine)}
    updates = {e: next(p for p in of if p.name == "update").held for e, of in found.items()}
    states = {e: held["optimizer state"] for e, held in updates.items()}
    # ZeRO's own copy of the weights is a third
    assert states == {"ddp": 2 * whole, "zero2": 3 * whole // 8, "zero3": 3 * whole // 8, "fsdp2": 2 * whole // 8}  # fmt: skip
    assert {e: h["gradients"] for e, h in updates.items()} == dict.fromkeys(found, whole // 8) | {"ddp": whole}  # fmt: skip
    assert updates["zero2"]["trained weights"] == updates["ddp"]["trained weights"] == whole
    for engine in ("zero3", "fsdp2"):
        held, sampling = updates[engine], next(p for p in found[engine] if p.name == "latents").held
        module = updates["ddp"]["frozen weights"] + whole - held["frozen weights"]
        assert held["shards of the trained parts"] == module // 8 and "trained weights" not in held
        # of 30 blocks three are there at once
        assert 3 * module / 35 < held["gathered blocks"] < 3 * module / 30
        assert sampling["trained weights"] == whole, "gathered for sampling"
    latents = {e: next(p for p in of if p.name == "latents").held for e, of in found.items()}
    # DeepSpeed's stage 3 makes room for them when it is built
    waiting = {e: held["gradients"] for e, held in latents.items() if "gradients" in held}
    assert waiting == {"zero3": whole // 8}
    if tuning == "full":
        total = {e: peak(of).total for e, of in found.items()}
        assert total["fsdp2"] < total["zero2"] < total["ddp"]


def test_the_plan_of_an_engine_is_asked_for_by_name(capsys):
    plan.main([str(REAL["decoder"]), "tuning=full", "--gpus", "8", "--engine", "fsdp2"])
    printed = capsys.readouterr().out
    assert "peak 75.9 GiB" in printed and "\nshards of the trained parts " in printed
    assert "gathered blocks" in printed and "DDP buckets" not in printed


def test_what_does_not_fit_is_refused_with_what_would():
    config = load_config(REAL["decoder"], ["optim.gradient_checkpointing=false"])
    with pytest.raises(UserError, match=r"GPU has 80\.0 GiB and the phase 'update' needs 8\d\.\d"):
        require_fit(config, Deployment(Scale(), 1, 80 * GIB))
    found = savings(config, Deployment(Scale(), 1, 80 * GIB))
    assert found == {"optim.gradient_checkpointing": True}
    better = changed(config, found)
    require_fit(better, Deployment(Scale(), 1, 80 * GIB))
    assert savings(better, Deployment(Scale(), 1, 80 * GIB)) == {}
    assert savings(better, Deployment(Scale(), 1, 40 * GIB)) == {"model.offload": "phase"}
    single = changed(better, {"rollout.batch_size": 1})  # else each half would be counted
    assert savings(single, Deployment(Scale(), 1, 15 * GIB)) is None
    # two phases are in the way
    ar = savings(load_config(REAL["ar"]), Deployment(Scale(), 1, 27 * GIB))
    assert ar["model.offload"] == "phase" and ar["optim.per_device_train_batch_size"] == 1
    assert ar["rollout.batch_size"] < 32 and "optim.gradient_checkpointing" not in ar


def test_turns_are_planned_each_by_itself(capsys):
    path = REAL["ar"].with_name("both.yaml")
    plan.main([str(path)])
    peaks = re.findall(r"peak ([\d.]+) GiB in phase '[\w ]+': fits", capsys.readouterr().out)
    assert len(peaks) == 2 and all(f"{peak} GiB in the" in path.read_text() for peak in peaks)


def tiny(name: str, *overrides: str, processes: int = 1, engine: Engine = "ddp"):
    """Phases by their names and costs by theirs; of turns by part."""
    parts = turns(load_config(ROOT / "configs" / "tiny" / f"{name}.yaml", overrides))
    made = {}
    for stage, own in parts.items():
        step, beside = step_of(own, MODEL, processes), [c for c in parts.values() if c is not own]
        held = {p.name: p.held for p in phases(own, step, processes, beside, engine)}
        made[stage] = held, {found.phase: found for found in cost.costs(own, step)}
    return made if len(made) > 1 else made.popitem()[1]


def test_without_an_ar_none_is_counted():
    cached = "rollout.prior_cache=runs/priors"
    (plain, spent), (held, less) = tiny("decoder"), tiny("decoder", cached)
    ar = weight_bytes(TINY_DIT, "vision_language_encoder")
    assert plain.keys() - held.keys() == spent.keys() - less.keys() == {"AR tokens"}
    for name, phase in held.items():
        assert phase["frozen weights"] == plain[name]["frozen weights"] - ar
    _, spent = tiny("decoder", cached, "model.offload=phase")
    moved = sum(weight_bytes(TINY_DIT, name) for name in ("vae", "text_encoder"))
    assert spent["parts to and from the CPU"].copied == 2 * moved


def test_reward_models_that_rest_are_not_counted_in_updates():
    for offload, expected in (("phase", SAMPLING), ("none", None)):
        held, _ = tiny("ar", f"model.offload={offload}")
        assert {n for n, h in held.items() if "reward models" in h} == (expected or set(held))


def test_a_turn_counts_what_the_other_part_trains():
    average = "average={decay: 0.5}"
    own = {stage: tiny(stage, average)[0]["update"] for stage in REAL}
    waits = {stage: own[stage]["optimizer state"] for stage in REAL}
    for stage, (held, _) in tiny("both", average).items():
        for phase in held.values():
            assert phase["optimizer state"] == sum(waits.values())
            assert phase["copies of the trained weights"] == sum(waits.values()) // 2
            assert phase["trained weights"] == sum(waits.values()) // 2
        assert held["update"]["gradients"] == waits[stage] // 2, "its own alone"
    for stage, (held, _) in tiny("both", average, "model.offload=phase").items():
        assert held["update"]["trained weights"] == waits[stage] // 2, "the other's is away"
        assert held["update"]["optimizer state"] == sum(waits.values()), "its moments stay"


@pytest.mark.parametrize("engine", get_args(Engine))
def test_an_engine_holds_both_turns(engine):
    offload, spread = "model.offload=phase", {"processes": 2, "engine": engine}
    own = {stage: tiny(stage, offload, **spread)[0]["update"] for stage in REAL}
    whole = {stage: tiny(stage)[0]["update"]["trained weights"] for stage in REAL}
    shared = ("optimizer state", "shards of the trained parts", "DDP buckets", "ZeRO's buckets")
    for stage, (held, _) in tiny("both", offload, **spread).items():
        for phase, holds in held.items():
            for name in shared:
                assert holds.get(name) == (sum(o.get(name, 0) for o in own.values()) or None)
            assert ("reward models" in holds) == (phase in SAMPLING)
        # what is trained over processes stays where it is, and is gathered to sample
        assert held["latents"]["trained weights"] == sum(whole.values())
        assert held["update"].get("gathered blocks") == own[stage].get("gathered blocks")
        waits = own if engine == "zero3" else [stage]
        assert held["update"]["gradients"] == sum(own[s]["gradients"] for s in waits)
        cut = engine in ("zero3", "fsdp2")
        assert ("gathered blocks" in held["update"]) == cut != ("trained weights" in held["update"])


def test_what_is_refused_has_its_turns_and_its_engine():
    parts = turns(load_config(ROOT / "configs" / "tiny" / "both.yaml", ["rollout.batch_size=2"]))
    # what an update saves stands already, and need not be counted with and without
    saved = {"gradient_checkpointing": True, "steps_per_backward": 1}
    saved |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 32}
    own = changed(parts["decoder"], {f"optim.{name}": value for name, value in saved.items()})
    told = [parts["ar"]], "fsdp2"
    most = peak(phases(own, step_of(own, MODEL, 2), 2, *told)).total
    require_fit(own, Deployment(MODEL, 2, most, *told))
    assert savings(own, Deployment(MODEL, 2, most, *told)) == {}
    found = savings(own, Deployment(MODEL, 2, most - 1, *told))
    with pytest.raises(UserError, match="plan CONFIG --gpus 2 --engine fsdp2 --memory-gib"):
        require_fit(own, Deployment(MODEL, 2, most - 1, *told))
    page = list(plan.page(own, told[0], 2, cost.CARDS["h100"], (most - 1) / GIB, told[1]))
    assert (
        found and f"it would with {' '.join(f'{k}={v}'.lower() for k, v in found.items())}" in page
    )


def test_the_reference_is_counted_once_a_step():
    beta, window = "grpo.beta=0.1", ["sde.window_size=2", "optim.steps_per_backward=1"]
    once, thrice = (tiny("decoder", beta, *window, f"grpo.num_iterations={n}") for n in (1, 3))
    assert thrice[1]["update"].flops == 3 * once[1]["update"].flops
    assert thrice[1]["reference"].flops == once[1]["reference"].flops
    assert 2 < once[1]["update"].flops / once[1]["reference"].flops < 4, "forward and backward"
    config = load_config(ROOT / "configs" / "tiny" / "decoder.yaml")
    size = Size.of(config.sampling)
    samples = config.rollout.prompts_per_step * config.rollout.num_generations
    means = samples * 2 * 16 * size.latent[0] * size.latent[1] * 4
    assert once[0]["update"]["reference"] == pytest.approx(means, rel=0.02), "of the whole step"
    held, spent = tiny("decoder", "grpo.beta=0")
    assert "reference" not in held.keys() | spent.keys() | held["update"].keys()


def test_full_tuning_that_does_not_fit_is_told_of_lora(capsys):
    path = str(ROOT / "configs" / "tiny" / "decoder.yaml")
    plan.main([path, "tuning=full", "rollout.batch_size=2", "--memory-gib", "2.2"])
    assert re.search("it would with optim.*, or with tuning=lora optim", capsys.readouterr().out)


def test_the_tiny_configs_need_little():
    config = load_config(ROOT / "configs" / "tiny" / "decoder.yaml")
    require_fit(config, Deployment(plan.sizes_of(config), 1, 4 * GIB))
    with pytest.raises(UserError, match="CUDA context"):
        require_fit(config, Deployment(MODEL, 1, GIB))
    assert plan.sizes_of(load_config(REAL["ar"])) == Scale()


def test_dropout_keeps_what_it_dropped():
    asked = Scoring(SamplingConfig(height=64, width=96), SdeConfig(), 2, 1)
    plain, thinned = (
        update(Subject(MODEL, Arithmetic(), "decoder", lora, False), asked)
        for lora in (LORA, replace(LORA, dropout=0.1))
    )
    assert thinned.held["activations"] > 1.02 * plain.held["activations"]


def test_a_folder_that_tells_no_sizes_is_a_users_fault(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "model" / "transformer" / "config.json").unlink()
    subject = Subject(tmp_path / "model", Arithmetic(), "decoder", LORA, False)
    assert weight_bytes(subject, "vae")
    with pytest.raises(UserError, match="transformer of '.*model': "):
        weight_bytes(subject, "transformer")


@pytest.mark.parametrize(
    ("processes", "overrides", "nearest"),
    [
        (1, {}, {}),
        (8, {}, {}),
        (3, {}, {"rollout.prompts_per_step": 15, "optim.gradient_accumulation_steps": 20}),
        (32, {}, {"optim.gradient_accumulation_steps": 4}),  # half a group each
        (48, {}, {"rollout.prompts_per_step": 18, "optim.gradient_accumulation_steps": 3}),
        (1, {"optim.gradient_accumulation_steps": 15}, {"optim.gradient_accumulation_steps": 16}),
        (1, {"optim.per_device_train_batch_size": 3, "optim.gradient_accumulation_steps": 1},
         {"optim.per_device_train_batch_size": 2}),
    ],
)  # fmt: skip
def test_the_nearest_geometry_divides(processes, overrides, nearest):
    config = changed(load_config(REAL["decoder"]), overrides)
    assert nearest_geometry(config, processes) == nearest
    if nearest:
        with pytest.raises(UserError):
            geometry(config, processes, 1)
    geometry(changed(config, nearest), processes, 1)


@pytest.mark.parametrize(
    ("groups", "samples", "cap", "batches"),
    [(16, 8, 8, [8] * 16), (16, 8, 32, [32] * 4), (2, 8, 5, [4] * 4), (1, 16, 8, [8, 8])],
)
def test_the_engines_batches(groups, samples, cap, batches):
    assert engine_batches([samples] * groups, cap) == batches


def test_a_kernel_takes_the_longest_of_what_it_does():
    card = cost.CARDS["h100"]
    for kernel, seconds in (
        (Kernel(int(card.flops), 1), 1 / cost.COMPUTE),
        (Kernel(1, int(card.bandwidth)), 1 / cost.MEMORY),
        (Kernel(1, 1), cost.LAUNCH_SECONDS),
    ):
        spent = cost.Cost("any", Counter({kernel: 3}))
        assert spent.seconds(card) == pytest.approx(3 * seconds)
    assert cost.Cost("any", Counter(), int(cost.COPY_BANDWIDTH)).seconds(card) == pytest.approx(1)


def test_offloading_moves_the_parts_once_a_batch_of_the_ar():
    copied = {}
    for stage in REAL:
        config = load_config(REAL[stage], ["model.offload=phase"])
        found = cost.costs(config, step_of(config, Scale(), 1))
        [copied[stage]] = [c.copied for c in found if c.copied]
    batches = len(engine_batches([8] * 16, load_config(REAL["ar"]).rollout.batch_size))
    assert copied["ar"] == batches * copied["decoder"]
