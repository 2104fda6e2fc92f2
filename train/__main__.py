"""accelerate launch -m duet.train CONFIG.yaml [section.key=value ...]"""

import argparse

from duet.configs import listing
from duet.configs.errors import exit_on_user_error
from duet.configs.load import load_config


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="duet train",
        description=__doc__,
        epilog=f"settings:\n\n{listing.text()}".replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML of the run")
    parser.add_argument(
        "overrides", nargs="*", help="section.key=value, its value YAML; the last one wins"
    )
    options = parser.parse_args(arguments)
    config = load_config(options.config, options.overrides)
    # after the config is known to be good: torch loads slowly
    from accelerate import PartialState

    from duet.train.loop import train

    newest = train(config)
    if PartialState().is_main_process:
        print(f"newest checkpoint: {newest}")


if __name__ == "__main__":
    exit_on_user_error(main)
