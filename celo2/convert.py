"""`python -m celo2.convert IN OUT`: read a rule in any supported format, write it as `.safetensors` or the published `.state`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from celo2.rule_files import VARIANTS, RuleError, load_rule, save_rule


def main(argv: list[str] | None = None) -> int:
    """Convert a rule. Returns the exit status: 2, with one line on stderr, if the input is not a rule."""
    parser = argparse.ArgumentParser(prog="python -m celo2.convert", description=__doc__)
    parser.add_argument("input", help="a shipped name, a .safetensors rule, a published theta.state, a folder, or hub:OWNER/NAME")
    parser.add_argument("output", help="a path ending in .safetensors or .state")
    parser.add_argument("--variant", choices=VARIANTS, help="variant of the rule, if the file does not name it")
    parser.add_argument("--description", help="how the rule was made")
    args = parser.parse_args(argv)
    try:
        rule = load_rule(args.input, args.variant)
        rule = rule if args.description is None else replace(rule, description=args.description)
        save_rule(rule, args.output)
    except (RuleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    normalized = ", gradients normalized" if rule.normalize_gradient else ""
    normalized += ", with step sizes" if rule.has_step_sizes else ""
    normalized += ", whitened" if rule.whitening else ""
    print(f"{args.output}: {rule.variant}, {rule.hidden} hidden units{normalized}; {rule.description}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
