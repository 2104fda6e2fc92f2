"""Everything a run needs, built, resumed and checked before its first step."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from duet.configs.errors import UserError
from duet.configs.rows import load_rows
from duet.configs.schema import RunConfig
from duet.inference.engine import Engine
from duet.inference.model import add_adapter, load_pipeline, module_of, pick_device, resume_adapter
from duet.rewards.base import Reward
from duet.rewards.registry import load_rewards
from duet.train import checkpoint, gate
from duet.train.metrics import prepare_trackers
from duet.train.stages import STAGES, ArStage, DecoderStage
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


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
    watched: dict[str, Reward]  # never trained on
    rows: list[dict]

    @property
    def shows(self) -> bool:
        """Progress bars come from one process a machine."""
        return self.accelerator.is_local_main_process

    @property
    def precision(self) -> str:
        """The dtype that forward passes run in."""
        mixed = {"bf16": "bfloat16", "fp16": "float16"}
        return mixed.get(self.config.train.mixed_precision, self.config.model.dtype)


def prepare(config: RunConfig) -> tuple[Run, Path | None, int]:
    """Build the run, resume it if asked, and pass the gate.

    Returns it, the checkpoint it goes on from, and its first step.
    """
    rows = load_rows(config.data.train)
    load_rows(config.data.eval)
    accelerator = Accelerator(
        mixed_precision=config.train.mixed_precision,
        gradient_accumulation_steps=config.optim.gradient_accumulation_steps,
        log_with=prepare_trackers(config) or None,
        project_dir=config.output_dir,
        cpu=pick_device(config.model.device).type == "cpu",
        step_scheduler_with_optimizer=False,
    )
    _check_batches(config, accelerator.num_processes)
    resume, start = checkpoint.find_resume(config, accelerator.num_processes)
    rewards, watched = load_rewards(config.rewards), load_rewards(config.watch.rewards)
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
        resume_adapter(pipeline, resume)
    else:
        lora = config.lora
        add_adapter(module, config.stage, lora.rank, lora.alpha, lora.target_modules)
    run = _assemble(config, accelerator, engine, module, rewards, watched, rows)
    if resume:
        checkpoint.load_state(accelerator, resume)
    if accelerator.is_main_process:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("duet")
    return run, resume, start


def _assemble(config, accelerator, engine, module, rewards, watched, rows) -> Run:
    optim = config.optim
    optimizer = AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=optim.learning_rate,
        betas=(optim.adam_beta1, optim.adam_beta2),
        weight_decay=optim.weight_decay,
    )
    scheduler = LambdaLR(optimizer, partial(_learning_rate_factor, config, accelerator))
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
        watched,
        rows,
    )


def _learning_rate_factor(config: RunConfig, accelerator: Accelerator, update: int) -> float:
    """Warm-up, then constant, or linear to 0 after the updates of `max_steps` rollouts."""
    factor = min(1.0, (update + 1) / (config.optim.warmup_steps + 1))
    if config.optim.lr_scheduler_type == "linear":
        samples = _samples_per_process(config, accelerator.num_processes)
        total = config.train.max_steps * config.grpo.num_iterations * samples
        factor *= max(0.0, 1 - update * _samples_per_update(config) / total)
    return factor


def _samples_per_process(config: RunConfig, processes: int) -> int:
    """Of one rollout."""
    return config.rollout.prompts_per_step // processes * config.rollout.num_generations


def _samples_per_update(config: RunConfig) -> int:
    """On one process."""
    return config.optim.per_device_train_batch_size * config.optim.gradient_accumulation_steps


def _check_batches(config: RunConfig, processes: int) -> None:
    groups = config.rollout.prompts_per_step
    if groups % processes:
        raise UserError(
            f"rollout.prompts_per_step = {groups} does not divide over {processes} processes: "
            f"give a multiple of {processes}"
        )
    local, share = _samples_per_process(config, processes), _samples_per_update(config)
    if local % share:
        raise UserError(
            f"{local} samples a process do not divide into updates of "
            f"per_device_train_batch_size * gradient_accumulation_steps = {share}: "
            f"give a divisor of {local}"
        )
