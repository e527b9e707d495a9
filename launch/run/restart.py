"""Records, in events.jsonl, when a run was started again (by torchrun, Slurm, a loop or a person), why, and what is repeated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celo2.training.metrics import read_lines, read_metrics
from data import printable
from launch.monitoring.metrics import Lines, stamped

NO_REASON = "it ended without a recorded reason, as when its first rank is killed or its machine fails"


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Return the events of a run. Lines that are not events are skipped."""
    return [event for event in read_lines(run_dir / "events.jsonl") if isinstance(event, dict)]


def restart_event(run_dir: Path, step: int) -> dict[str, Any] | None:
    """Return the event for a run that resumes from `step`; None if it begins. Call it before metrics.jsonl is rewound.

    `attempt` counts the starts after the first one. `reason` says how the previous start ended. `steps_lost` steps, up to the
    last logged one, are repeated.
    """
    events = read_events(run_dir)
    if not events:
        return None
    earlier = [event for event in events if event.get("event") == "restart"]
    last = last_word(events)
    reasons = {
        "finished": "it was finished",
        "stopped": "stopped by a signal" if last.get("reason") == "signal" else str(last.get("error", last.get("reason"))),
    }
    reason = printable(reasons.get(str(last.get("event")), NO_REASON))
    reached = max((record["step"] for record in read_metrics(run_dir / "metrics.jsonl") if "loss" in record), default=0)
    event = {"event": "restart", "attempt": len(earlier) + 1, "reason": reason, "step": step}
    event |= {"reached": reached, "steps_lost": max(0, reached - step)}
    event["processes"] = int(os.environ.get("WORLD_SIZE", "1"))
    return event


def last_word(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the event that says why the last start ended. A lost rank has priority over the errors that it caused elsewhere."""
    begins = max((i for i, event in enumerate(events) if event.get("event") in ("start", "restart")), default=0)
    named = [event for event in events[begins:] if event.get("reason") == "rank"]
    return named[-1] if named else events[-1]


def restart_note(event: dict[str, Any]) -> str:
    """Return a restart event as a text for the terminal."""
    lost = f"; {event['steps_lost']} steps after it are done again" if event["steps_lost"] else ""
    return f"restart {event['attempt']} from step {event['step']}{lost}; the start before: {event['reason']}"


def record_lost_rank(run_dir: Path, message: str) -> None:
    """Record in events.jsonl that the run stops because of another rank. Any thread may call it."""
    if (run_dir / "events.jsonl").exists():  # the run has begun, so that the start was not refused
        Lines(run_dir / "events.jsonl", lambda text: None).write(
            stamped({"event": "stopped", "reason": "rank", "error": message})
        )
