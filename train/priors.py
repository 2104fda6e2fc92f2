"""duet priors CONFIG: make the prior tokens that a decoder's runs read, once."""

import argparse
import os

from duet.configs.environment import require_shared_work
from duet.configs.errors import UserError, exit_on_user_error
from duet.configs.load import load_config
from duet.configs.schema import RunConfig


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="duet priors",
        description=__doc__,
        epilog="rollout.prior_cache names the folder, rollout.batch_size is how many are sampled "
        "at once. What was interrupted goes on when it is started again. Several processes share "
        "the work: accelerate launch -m duet.train.priors CONFIG.",
    )
    parser.add_argument("config", help="YAML of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    mixed, device = config.train.mixed_precision, config.model.device
    require_shared_work(os.environ, "priors", mixed, device)
    _require_cache(config)
    from accelerate import PartialState  # torch loads slowly

    from duet.train.prior_making import fill_cache

    folder = fill_cache(config)
    if PartialState().is_main_process:
        print(f"prior tokens: {folder}")


def _require_cache(config: RunConfig) -> None:
    if config.stage != "decoder":
        raise UserError(f"stage = {config.stage!r}: only the decoder's groups are given priors")
    if config.rollout.prior_cache is None:
        raise UserError("rollout.prior_cache = null: name the folder to fill")


if __name__ == "__main__":
    exit_on_user_error(main)
