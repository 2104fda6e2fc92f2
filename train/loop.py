"""GRPO on one module of GLM-Image: rollout, reward, advantage, update, checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from configs.errors import UserError
from configs.rows import load_rows
from configs.schema import RunConfig
from inference.engine import Engine
from inference.model import add_adapter, load_adapter, load_pipeline, module_of, pick_device
from inference.rollout import Rollout
from rewards.base import Reward, RewardInput, score
from rewards.registry import load_rewards
from train import checkpoint, gate
from train.advantages import group_advantages
from train.loss import policy_loss
from train.metrics import Means, MetricsLog, Stopwatch, prepare_trackers, reward_metrics
from train.prompts import Group, draw_groups, shard
from train.stages import STAGES, ArStage, DecoderStage, select_samples


@dataclass
class Run:
    """Everything a step needs."""

    config: RunConfig
    accelerator: Accelerator
    stage: ArStage | DecoderStage
    policy: torch.nn.Module  # wrapped by accelerate
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    rewards: dict[str, Reward]
    weights: torch.Tensor  # [R]
    rows: list[dict]


def train(config: RunConfig) -> Path:
    """Run the config to its last step; returns the newest checkpoint.

    Raises UserError for anything the user can mend.
    """
    run, start = prepare(config)
    log = MetricsLog(run.accelerator, Path(config.output_dir), start)
    newest = None
    steps = tqdm(
        range(start, config.train.max_steps),
        initial=start,
        total=config.train.max_steps,
        desc=f"train {config.stage}",
        disable=not run.accelerator.is_local_main_process,
    )
    for step in steps:
        metrics, images = train_step(run, step, first=step == start)
        log.write(metrics, step + 1)
        steps.set_postfix(reward=f"{metrics['reward']:.3f}")
        if step % config.train.logging_images_steps == 0:
            log.write_images(images, config.rollout.num_generations, step + 1)
        if (step + 1) % config.train.save_steps == 0 or step + 1 == config.train.max_steps:
            policy = module_of(run.stage.engine.pipeline, config.stage)
            newest = checkpoint.save_checkpoint(run.accelerator, config, step + 1, policy)
    run.accelerator.end_training()
    return newest or checkpoint.complete_checkpoints(Path(config.output_dir))[-1]


def train_step(run: Run, step: int, first: bool = False) -> tuple[dict, list]:
    """One rollout and its updates: metrics of all processes, pictures of this one."""
    config, accelerator = run.config, run.accelerator
    clock = Stopwatch()
    groups = draw_groups(
        run.rows, config.seed, step, config.rollout.prompts_per_step, config.rollout.num_generations
    )
    mine = shard(groups, accelerator.process_index, accelerator.num_processes)
    samples = len(mine) * config.rollout.num_generations
    with clock.phase("rollout", samples), torch.no_grad(), accelerator.autocast():
        rollouts = run.stage.rollout(mine, step)
    with clock.phase("reward", samples):
        scores = score_rollouts(run.rewards, mine, rollouts, _shows(run))
    group_ids = torch.tensor([g.id for g in mine for _ in g.seeds])
    advantages = group_advantages(
        scores,
        run.weights,
        group_ids,
        config.grpo.scale_rewards,
        config.grpo.multi_objective_aggregation == "sum_then_normalize",
    )
    if first:
        with accelerator.autocast():
            gate.check_ratio(run.stage, rollouts, run.policy, _precision(config))
    with clock.phase("update", samples):
        metrics = update(run, rollouts, advantages.values, step)
    all_scores, all_ids = _gather(scores), _gather(group_ids)
    metrics |= reward_metrics(all_scores, run.weights, list(run.rewards), all_ids)
    zero_std = _gather(torch.tensor([advantages.frac_reward_zero_std]))
    metrics["frac_reward_zero_std"] = float(zero_std.mean())
    return metrics | clock.metrics, [i for r in rollouts for i in r.images]


def score_rollouts(
    rewards: dict[str, Reward], groups: Sequence[Group], rollouts: Sequence[Rollout], show: bool
) -> torch.Tensor:
    """Every reward on every sample: float32 [B, R], NaN where not scored."""
    inputs = [
        RewardInput(image, group.row["prompt"], group.row)
        for group, rollout in zip(groups, rollouts, strict=True)
        for image in rollout.images
    ]
    bar = tqdm(rewards.items(), desc="scoring", leave=False, disable=not show)
    return torch.tensor([score(reward, name, inputs) for name, reward in bar]).T


def update(run: Run, rollouts: Sequence[Rollout], advantages: torch.Tensor, step: int) -> dict:
    """`num_iterations` passes over the rollout in micro-batches; metrics over all processes."""
    config, accelerator = run.config, run.accelerator
    means, ratios = Means(), []
    batches = micro_batches(rollouts, config.optim.per_device_train_batch_size)
    passes = config.grpo.num_iterations
    bar = tqdm(total=passes * len(batches), desc="update", leave=False, disable=not _shows(run))
    for _ in range(passes):
        for parts, sample_ids in batches:
            with accelerator.accumulate(run.policy):
                with accelerator.autocast():
                    scored = run.stage.score(parts, run.policy, with_kl=config.grpo.beta > 0)
                gain = advantages[sample_ids].to(scored.logprobs.device)
                result = policy_loss(scored.logprobs, scored.old, gain, config.grpo, scored.kl)
                accelerator.backward(result.loss)
                if accelerator.sync_gradients:
                    trained = [p for p in run.policy.parameters() if p.requires_grad]
                    norm = accelerator.clip_grad_norm_(trained, config.optim.max_grad_norm)
                    means.add("grad_norm", torch.as_tensor(norm))
                run.optimizer.step()
                if accelerator.sync_gradients:
                    run.scheduler.step()
                run.optimizer.zero_grad()
            ratios.append(result.ratio.flatten())
            means.add("loss", result.loss.detach())
            means.add("clip_ratio/low_mean", result.clipped_low)
            means.add("clip_ratio/high_mean", result.clipped_high)
            means.add("clip_ratio/region_mean", result.clipped_low | result.clipped_high)
            if scored.kl is not None:
                means.add("kl", scored.kl.detach())
            if scored.entropy is not None:
                means.add("entropy", scored.entropy)
            bar.update()
    bar.close()
    ratio = accelerator.gather(torch.cat(ratios))
    metrics = means.reduce(accelerator) | {
        "ratio/mean": float(ratio.mean()),
        "ratio/min": float(ratio.min()),
        "ratio/max": float(ratio.max()),
        "learning_rate": run.scheduler.get_last_lr()[0],
    }
    return metrics


def micro_batches(rollouts: Sequence[Rollout], size: int) -> list[tuple[list[Rollout], list[int]]]:
    """Consecutive samples, `size` at a time: their rollout slices and sample indices."""
    places = [(r, n) for r, rollout in enumerate(rollouts) for n in range(len(rollout.images))]
    batches = []
    for start in range(0, len(places), size):
        chosen = places[start : start + size]
        slices = []
        for r in sorted({r for r, _ in chosen}):
            slices.append(select_samples(rollouts[r], [n for q, n in chosen if q == r]))
        batches.append((slices, list(range(start, start + len(chosen)))))
    return batches


def prepare(config: RunConfig) -> tuple[Run, int]:
    """Build the run, resume it if asked, and pass the gate; returns it and its first step."""
    rows = load_rows(config.data.train)
    load_rows(config.data.eval)
    resume = checkpoint.find_resume(config)
    start = checkpoint.load_position(resume, config.stage) if resume else 0
    rewards = load_rewards(config.rewards)
    accelerator = Accelerator(
        mixed_precision=config.train.mixed_precision,
        gradient_accumulation_steps=config.optim.gradient_accumulation_steps,
        log_with=prepare_trackers(config) or None,
        project_dir=config.output_dir,
        cpu=pick_device(config.model.device).type == "cpu",
        step_scheduler_with_optimizer=False,
    )
    _check_batches(config, accelerator.num_processes)
    set_seed(config.seed)
    pipeline = load_pipeline(config.model.path, config.model.dtype, str(accelerator.device))
    engine = Engine(
        pipeline,
        config.sampling,
        config.sde,
        config.rollout.batch_size,
        progress=accelerator.is_local_main_process,
    )
    gate.check_schedule(engine, config.sampling.height, config.sampling.width)
    gate.check_reference(
        engine, rows[0]["prompt"], config.sampling.height, config.sampling.width, config.model.dtype
    )
    module = module_of(pipeline, config.stage)
    if resume:
        load_adapter(pipeline, resume)
        _require_lora_gradients(module)
    else:
        lora = config.lora
        add_adapter(module, config.stage, lora.rank, lora.alpha, lora.target_modules)
    run = _assemble(config, accelerator, engine, module, rewards, rows)
    if resume:
        checkpoint.load_state(accelerator, resume)
    if accelerator.is_main_process:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("duet")
    return run, start


def _assemble(config, accelerator, engine, module, rewards, rows) -> Run:
    optim = config.optim
    optimizer = AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=optim.learning_rate,
        betas=(optim.adam_beta1, optim.adam_beta2),
        weight_decay=optim.weight_decay,
    )
    scheduler = LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / (optim.warmup_steps + 1)))
    policy, optimizer, scheduler = accelerator.prepare(module, optimizer, scheduler)
    checkpoint.leave_weights_to_the_adapter(accelerator)
    return Run(
        config,
        accelerator,
        STAGES[config.stage](engine, config),
        policy,
        optimizer,
        scheduler,
        rewards,
        torch.tensor([r.weight for r in config.rewards]),
        rows,
    )


def _require_lora_gradients(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def _check_batches(config: RunConfig, processes: int) -> None:
    groups, size = config.rollout.prompts_per_step, config.rollout.num_generations
    if groups % processes:
        raise UserError(
            f"rollout.prompts_per_step = {groups} does not divide over {processes} processes: "
            f"give a multiple of {processes}"
        )
    local = groups // processes * size
    share = config.optim.per_device_train_batch_size * config.optim.gradient_accumulation_steps
    if local % share:
        raise UserError(
            f"{local} samples a process do not divide into updates of "
            f"per_device_train_batch_size * gradient_accumulation_steps = {share}: "
            f"give a divisor of {local}"
        )


def _precision(config: RunConfig) -> str:
    mixed = {"bf16": "bfloat16", "fp16": "float16"}
    return mixed.get(config.train.mixed_precision, config.model.dtype)


def _shows(run: Run) -> bool:
    return run.accelerator.is_local_main_process


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    """The processes' rows, one after another; unequal lengths are fine."""
    return torch.cat([torch.tensor(part) for part in gather_object([tensor.tolist()])])
