"""Uploads an exported folder to the Hugging Face Hub: `python -m models.export RUN OUT --push OWNER/NAME`.

Network, tokens, endpoint and offline mode are huggingface_hub's own (HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import re
from pathlib import Path

from celo2.hub import explain
from launch.checkpoint.verify import CheckpointError

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def check_name(name: str) -> None:
    """Raise CheckpointError unless `name` is OWNER/NAME, as the Hub takes it."""
    if not NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith((".", "-", ".git")):
        raise CheckpointError(f"--push {name!r}: expected OWNER/NAME, such as me/my-model")


def push(folder: Path, name: str, private: bool) -> str:
    """Upload every file of `folder` in one commit to the repository `name`, which is made if it is missing; returns its address.

    Raises:
        CheckpointError: no package huggingface_hub, no network, no token or one that may not write. The folder stays.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError("--push needs the package huggingface_hub: pip install huggingface_hub") from None
    api = huggingface_hub.HfApi()
    try:
        repo = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {repo} by celo2's models.export")
    except Exception as error:  # the library's own, those of its HTTP client, and of the socket
        raise CheckpointError(
            f"{folder} is exported, but not pushed to {name}: {explain(error, name)}; then: hf upload {name} {folder}"
        ) from None
    return str(getattr(commit, "commit_url", commit))
