"""python -m duet.train.evaluate CONFIG --checkpoint X: held-out prompts, fixed seeds, a report."""

import argparse
import os
from pathlib import Path

from duet.configs.environment import require_shared_work
from duet.configs.errors import exit_on_user_error, not_empty
from duet.configs.load import load_config


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="duet evaluate",
        description=__doc__,
        epilog="Several processes share the pictures: accelerate launch -m duet.train.evaluate "
        "CONFIG ...",
    )
    parser.add_argument("config", help="YAML of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        help="checkpoint-N; may be repeated; A,B joins an AR's and a decoder's",
    )
    parser.add_argument(
        "--average", action="store_true", help="the moving averages of the checkpoints' weights"
    )
    parser.add_argument(
        "--output", type=not_empty, help="folder of the report (default: OUTPUT_DIR/evaluation)"
    )
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    mixed, device = config.train.mixed_precision, config.model.device
    require_shared_work(os.environ, "evaluate", mixed, device)
    output = Path(options.output or Path(config.output_dir) / "evaluation")
    from accelerate import PartialState  # torch loads slowly

    from duet.train.evaluation import evaluate
    from duet.train.report import write_report, write_strip
    from duet.train.results import text_table

    models = [tuple(c.split(",")) for c in options.checkpoint]
    # which stands, whatever becomes of the page
    results = evaluate(config, models, output, options.average)
    if not PartialState().is_main_process:
        return
    print(text_table(results), flush=True)
    write_strip(results, output)
    print(f"report: {write_report(results, output)}")


if __name__ == "__main__":
    exit_on_user_error(main)
