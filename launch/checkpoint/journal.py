"""Says whether a checkpoint in a run's folder was written by that run, from its events.jsonl.

Users put copies of checkpoints among those of a run: of its own, or of another run. Each event of a save holds the sha256 of the
checkpoint's manifest.
"""

from __future__ import annotations

from pathlib import Path

from celo2.training.metrics import read_lines
from launch.checkpoint.state import read_state
from launch.checkpoint.verify import MANIFEST, sha256, step_of

BACK = ("branch", "restart", "rollback")  # events after which a run continues from an earlier step


def wrote(run: Path, checkpoint: Path) -> bool:
    """Return whether the run in the folder `run` wrote a whole checkpoint in its present line of steps.

    Where events.jsonl does not say it, a checkpoint with its usual name counts as written. A copy does so only if events.jsonl
    names no checkpoint at all. Events of earlier versions have no hash; for them the step decides.

    Raises:
        CheckpointError: the checkpoint has no readable state.
    """
    manifests: dict[int, str | None] = {}  # of the present line, by step; None: an earlier version wrote it
    any_event = False
    for event in read_lines(run / "events.jsonl"):
        if not isinstance(event, dict) or type(step := event.get("step")) is not int:
            continue
        if event.get("event") == "checkpoint" and "error" not in event:
            manifests[step], any_event = event.get("manifest"), True
        elif event.get("event") in BACK:
            own = event.get("own", True)
            manifests = {earlier: manifest for earlier, manifest in manifests.items() if own and earlier <= step}
    step = read_state(checkpoint)["step"]
    if step in manifests:
        return manifests[step] in (None, sha256(checkpoint / MANIFEST))
    return step_of(checkpoint) >= 0 or not any_event
