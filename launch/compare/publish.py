"""A report as a folder that any static host can serve: index.html, pictures and numbers, without paths of this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from launch.compare.report import write_report
from launch.compare.setting import configurations

ABSOLUTE = re.compile(r"(?<![\w./~])(?!//)~?/(?:[^\s/'\"\],;:]+/)*[^\s/'\"\],;:]*[^\s/'\"\],;:.]")


def publish(results: dict[str, Any], folder: Path) -> Path:
    """Write the folder; returns the page's path."""
    page = write_report(folder, without_paths(results))
    return page.rename(folder / "index.html")


def without_paths(results: dict[str, Any]) -> dict[str, Any]:
    """The results with absolute paths cut to their last part, in every text."""
    values = [v for config in configurations(results["runs"]) for v in config.values()]
    values += [run.get("folder") for run in results["runs"]]
    named = sorted({v for v in values if isinstance(v, str) and v.startswith(("/", "~"))}, key=len, reverse=True)

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {clean(key): clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        if not isinstance(value, str):
            return value
        for path in named:  # which may hold spaces
            value = value.replace(path, last_part(path))
        return ABSOLUTE.sub(lambda found: last_part(found[0]), value)

    return clean(results)


def last_part(path: str) -> str:
    """The last part of an absolute path, which replaces it."""
    return path.rstrip("/").rpartition("/")[2] or "."
