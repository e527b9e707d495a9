"""Uploads an exported folder to the Hugging Face Hub: `python -m models.export RUN OUT --push OWNER/NAME`.

huggingface_hub handles network, tokens, endpoint and offline mode (HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import re
from pathlib import Path

from celo2.hub import explain
from launch.checkpoint.verify import CheckpointError

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def check_name(name: str) -> None:
    """Raise CheckpointError unless `name` is OWNER/NAME, as the Hub requires."""
    if not NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith((".", "-", ".git")):
        raise CheckpointError(f"--push {name!r}: expected OWNER/NAME, such as me/my-model")


def push(folder: Path, name: str, private: bool) -> str:
    """Upload every file of `folder` in one commit to the repository `name`, which is created if it is missing.

    Returns the address of the commit.

    Raises:
        CheckpointError: huggingface_hub is not installed, no network, no token, or no permission to write. The folder stays.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError("--push needs the package huggingface_hub: pip install huggingface_hub") from None
    api = huggingface_hub.HfApi()
    try:
        repo = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {repo} by celo2's models.export")
    except Exception as error:  # from the library, its HTTP client, or the socket
        raise CheckpointError(
            f"{folder} is exported, but not pushed to {name}: {explain(error, name)}; then: hf upload {name} {folder}"
        ) from None
    return str(getattr(commit, "commit_url", commit))
