"""Rules on the Hugging Face Hub: load `hub:OWNER/NAME[@REVISION][:FILE]`, write folders with a card, and upload rules.

huggingface_hub is imported only when it is used. It handles network, cache, tokens, endpoint and offline mode (HF_HOME, HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE). A file of a given commit that is in the cache is read without a request.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from celo2.rule import Rule
from celo2.rule_files import FILES, HUB, LARGEST, PRETRAINED, SHIPPED, RuleError, load_rule, read_rule, save_rule, the_rule

# Variants of the published weights, from their cards (`orthogonalize=False` is celo2-base): a theta.state does not name its own.
PUBLISHED = {"amoudgl/celo2": "celo2", "amoudgl/celo2-base": "celo2-base"}
NAME = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)(@(?P<revision>[^\s:\\]+))?(:(?P<file>[^\s:\\]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
BUSY = (408, 429)  # temporary HTTP errors of a server, as are all from 500 on
TIMEOUT = 10.0  # seconds for the list of a repository's files


@dataclass(frozen=True)
class Address:
    """A rule on the Hub: `OWNER/NAME`; a branch, tag or commit, by default main; and a file, by default the only rule there."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return f"{HUB}{self.repo}" + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


def parse(name: str) -> Address:
    """Parse `hub:OWNER/NAME[@REVISION][:FILE]`, with or without `hub:`. Raises RuleError for any other text."""
    found = NAME.fullmatch(name.removeprefix(HUB))
    if found is None or any(not {"", ".", ".."}.isdisjoint(path.split("/")) for path in found.group("revision", "file") if path):
        raise RuleError(
            f"'{name}' is not a valid name of a rule on the Hugging Face Hub: write {HUB}OWNER/NAME, {HUB}OWNER/NAME@REVISION "
            f"or {HUB}OWNER/NAME@REVISION:FILE"
        )
    return Address(**found.groupdict())


def load(name: str, variant: str | None = None, **options: Any) -> Rule:
    """Load a rule by its name on the Hub; its `source` includes the commit. `options` and errors: see `from_pretrained`."""
    address = parse(name)
    path = fetch(address, **options)
    file = address.file or path.name
    source = str(Address(address.repo, commit_of(path, file), file))
    otherwise = "celo2" if path.suffix == ".safetensors" else None  # PyLO's optimizers orthogonalize
    rule = read_rule(path, source, variant, PUBLISHED.get(address.repo), otherwise)
    return replace(rule, source=source)


def commit_of(path: Path, file: str) -> str:
    """The commit of a file in the cache, from its path `.../snapshots/COMMIT/FILE`."""
    return path.parts[-2 - file.count("/")]


def fetch(
    address: Address,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The path of the file at `address` in the cache of huggingface_hub; downloads the file if needed."""
    hub = library(str(address))
    names = (address.file,) if address.file else FILES
    try:
        found = [hub.try_to_load_from_cache(address.repo, name, cache_dir, address.revision) for name in names]
    except ValueError as error:  # a name that the Hub does not allow
        raise RuleError(f"{address} cannot be loaded: {explain(error, address.repo)}") from None
    cached = [Path(path) for path in found if isinstance(path, str)]
    usable = len(cached) == 1 and not force_download
    if COMMIT.fullmatch(address.revision or "") and usable:
        return cached[0]
    reason = "local_files_only is set"
    if not local_files_only:
        try:
            return download(address, hub, token=token, cache_dir=cache_dir, force_download=force_download)
        except RuleError:
            raise
        except Exception as error:  # errors of the library, of its HTTP client and of sockets
            reason = explain(error, address.repo)
            if answered(error):
                raise RuleError(f"{address} cannot be loaded: {reason}") from None
    if usable:
        return cached[0]
    there = "no copy: load it once with a network, or give the path of a copy"
    if cached:
        there = "a copy, which force_download=True forbids" if force_download else "several of its rules: name the file"
    raise RuleError(f"{address} cannot be loaded: the Hub is out of reach ({reason}), and the cache has {there}")


def download(address: Address, hub: ModuleType, **options: Any) -> Path:
    """Ask the Hub which files are at `address`, download the rule unless the cache has it, and return its path."""
    api = hub.HfApi(token=options["token"])
    info = api.model_info(address.repo, revision=address.revision, files_metadata=True, timeout=TIMEOUT)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    if address.file not in (None, *sizes):
        raise RuleError(f"{address}: no such file; it holds {', '.join(f'{name:.40}' for name in sorted(sizes)[:8])}")
    file = address.file or the_rule(address, [name for name in FILES if name in sizes])
    if sizes[file] > LARGEST:
        raise RuleError(f"{address}: {file} has {sizes[file]:,} bytes; a rule has at most {LARGEST:,}, so this is something else")
    path = Path(hub.hf_hub_download(address.repo, file, revision=address.revision, **options))
    config = PurePosixPath(file).with_name("config.json").as_posix()  # PyLO's describes the network
    if file.endswith(".safetensors") and 0 < sizes.get(config, 0) <= LARGEST:
        hub.hf_hub_download(address.repo, config, revision=commit_of(path, file), **options)
    return path


def library(name: str) -> ModuleType:
    """The package huggingface_hub."""
    try:
        import huggingface_hub
    except ImportError:
        raise RuleError(f"{name} needs the package huggingface_hub: pip install huggingface_hub") from None
    return huggingface_hub


def answered(error: Exception) -> bool:
    """Whether an error is an answer of the Hub or a local file error; False if the Hub is out of reach or busy."""
    status = status_of(error)
    if status is None:
        return getattr(error, "filename", None) is not None  # a cache that cannot be written
    return 400 <= status < 500 and status not in BUSY


def status_of(error: Exception) -> int | None:
    """The HTTP status in an error of huggingface_hub; None if there is none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def explain(error: Exception, repo: str) -> str:
    """One line that says what an error of huggingface_hub about the repository `repo` means and what to do about it."""
    from huggingface_hub import constants, errors

    page, login = f"{constants.ENDPOINT}/{repo}", "log in with `hf auth login` or set HF_TOKEN"
    status = status_of(error)
    if isinstance(error, errors.GatedRepoError):
        return f"its owner decides who may have it: ask for access at {page}, and {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository, or it is private: check the name, or {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no such branch, tag or commit: they are listed at {page}"
    if status in (401, 403):
        return f"the Hub refuses access ({status}): {login}, with a token that may do this"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def from_pretrained(name: str | Path, *, variant: str | None = None, revision: str | None = None, **options: Any) -> Rule:
    """Load a rule from a folder or file, by its shipped name, or from the Hub.

    Args:
        name: a folder or file, the name of a shipped rule, or `OWNER/NAME`.
        variant: as for `load_rule`.
        revision: a branch, tag or commit; None means main.
        options: `token`, `cache_dir`, `local_files_only`, `force_download`, as in huggingface_hub.

    Raises:
        RuleError: no such folder, repository, revision or file; no access; no network and nothing in the cache; not a rule.
    """
    if Path(name).exists():
        return load_rule(Path(name), variant)
    if str(name) in SHIPPED and revision is None:
        return load_rule(name, variant)
    return load(str(name) if revision is None else str(replace(parse(str(name)), revision=revision)), variant, **options)


def save_pretrained(rule: Rule, folder: str | Path, *, license: str | None = None) -> None:
    """Write `rule` into `folder` as rule.safetensors, and its card as README.md unless that file exists.

    Args:
        license: the license in the card, as the Hub abbreviates it. None: MIT for a rule that ships with this project, else none.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_rule(rule, folder / FILES[0])
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(card(rule, license), encoding="utf-8")


def push_to_hub(
    rule: Rule,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    commit_message: str = "Upload a Celo2 rule",
    create_pr: bool | None = None,
    license: str | None = None,
) -> str:
    """Upload `rule` and its card in one commit, and return the commit's URL. Creates the repository if it is missing.

    Args:
        repo_id: `OWNER/NAME`.
        private, token, branch, commit_message, create_pr: as for huggingface_hub's `ModelHubMixin.push_to_hub`.
        license: as for `save_pretrained`.

    Raises:
        RuleError: a bad name, no network, no token or one that may not write.
    """
    hub = library(f"pushing to {repo_id}")
    api = hub.HfApi(token=token)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, FILES[0])
            save_rule(rule, path)  # raises before anything is created on the Hub
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            text = card(rule, license, repo_id).encode()
            files = [hub.CommitOperationAdd(path.name, path), hub.CommitOperationAdd("README.md", text)]
            return api.create_commit(repo_id, files, commit_message=commit_message, revision=branch, create_pr=create_pr)
    except RuleError:
        raise
    except Exception as error:  # the same errors as in `fetch`
        raise RuleError(f"{repo_id}: not pushed: {explain(error, repo_id)}") from None


def card(rule: Rule, license: str | None, name: str = "OWNER/NAME") -> str:
    """The card of a rule: metadata for the Hub, a description (for a shipped rule its own card), how to load it, settings."""
    shipped = next((PRETRAINED / f"{own}.md" for own in SHIPPED if load_rule(own) == rule), None)
    license = license or ("mit" if shipped else None)
    metadata = [f"license: {license}"] * bool(license) + ["library_name: celo2", "tags:"]
    metadata += [f"- {tag}" for tag in ("celo2", "learned-optimizer", "optimizer", "pytorch", "arxiv:2602.19142")]
    text = f"# {name}\n\nA learned optimizer's update rule. {rule.description}".rstrip()
    if shipped is not None and shipped.exists():
        text = re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", shipped.read_text(encoding="utf-8")).rstrip()  # no local links
    settings = {"hidden units": rule.hidden, **rule.settings()} | ({"source": rule.source} if rule.source else {})
    table = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in settings.items())
    variant = "" if rule.variant == "celo2" else f', variant="{rule.variant}"'
    return f"""---
{chr(10).join(metadata)}
---

{text}

## Use

```python
from celo2 import Celo2, param_groups

groups = param_groups(model, lr=5e-4, adamw_lr=1e-3, weight_decay=0.1{variant})
optimizer = Celo2(groups, lr=5e-4, rule="{HUB}{name}")
```

| | |
|---|---|
{table}

The update is that of [Celo2](https://arxiv.org/abs/2602.19142).
"""
