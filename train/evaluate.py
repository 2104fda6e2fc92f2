"""python -m duet.train.evaluate CONFIG --checkpoint X: held-out prompts, fixed seeds, a report."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from duet.configs.errors import UserError, exit_on_user_error, require_folder
from duet.configs.load import load_config


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="duet evaluate", description=__doc__)
    parser.add_argument("config", help="YAML of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        help="checkpoint-N; may be repeated; A,B joins an AR's and a decoder's",
    )
    parser.add_argument("--output", help="folder of the report (default: OUTPUT_DIR/evaluation)")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    output = Path(options.output or Path(config.output_dir) / "evaluation")
    require_folder("--output", output)
    if (output / "results.json").exists():
        raise UserError(f"--output = {str(output)!r} holds a report already: name another folder")
    from duet.train.evaluation import evaluate, text_table  # torch loads slowly
    from duet.train.report import write_report, write_strip

    models = [tuple(c.split(",")) for c in options.checkpoint]
    results = evaluate(config, models, output)
    page = write_report(results, output)
    write_strip(results, output)
    (output / "results.json").write_text(json.dumps(asdict(results), indent=1))
    print(text_table(results))
    print(f"report: {page}")


if __name__ == "__main__":
    exit_on_user_error(main)
