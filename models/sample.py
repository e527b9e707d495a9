"""`python -m models.sample MODEL`, text from a trained model: the documented name of `python -m launch.sample`."""

import sys


def main(arguments: list[str] | None = None) -> int:
    """The exit status; `launch` is imported here, so that nothing in `models` depends on it."""
    from launch.sample import main as sample

    return sample(arguments)


if __name__ == "__main__":
    sys.exit(main())
