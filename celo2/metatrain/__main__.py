"""`python -m celo2.metatrain CONFIG.yaml [section.key=value ...]`: meta-train a rule. Bad input: exit status 2 and one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from celo2.metatrain.config import Config, ConfigError, load_config
from celo2.metatrain.train import run
from celo2.rule_files import RuleError
from celo2.training.configuration import help_text, parse_arguments
from celo2.training.lock import FolderLock


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the configuration, meta-train or resume, and print the path of the rule. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m celo2.metatrain",
        description="Meta-train a rule, or continue: the same command resumes exactly.",
        epilog=help_text(Config),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file; an empty one is the published recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    try:
        options = parse_arguments(parser, arguments)
        config = load_config(options.config, options.overrides)
        with FolderLock(Path(config.run.dir)):
            rule = meta_train(config)
    except (ConfigError, RuleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"error: {error}: take fewer problems or candidates, smaller batches or shorter episodes", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume from the last checkpoint", file=sys.stderr)
        return 130
    print(f"rule: {rule}")
    return 0


def meta_train(config: Config) -> Path:
    """Meta-train with a progress bar on a terminal, elsewhere with a plain line per record; returns the path of the rule."""
    console = Console(file=sys.stdout)
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=config.outer.iterations, text="")

        def show(iteration: int, record: dict[str, float]) -> None:
            if "gain" in record:
                text = f"final loss {record['final']:.4f}  gain {record['gain']:+.4f}  {record['seconds']:.0f} s"
            else:
                text = f"loss {record['loss']:.4f}  |g| {record['gradient_norm']:.3g}  {record['seconds']:.0f} s"
            bar.update(task, completed=iteration, text=text)
            if not console.is_terminal:
                print(f"iteration {iteration:>7}/{config.outer.iterations}  {text}", flush=True)

        return run(config, show)


if __name__ == "__main__":
    sys.exit(main())
