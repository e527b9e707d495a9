"""`python -m models.export RUN OUT`: the documented name of `python -m launch.checkpoint.export`.

It turns a checkpoint into a folder that transformers loads without this project.
"""

import sys


def main(arguments: list[str] | None = None) -> int:
    """The exit status; `launch` is imported here, so that nothing in `models` depends on it."""
    from launch.checkpoint.export import main as export

    return export(arguments)


if __name__ == "__main__":
    sys.exit(main())
