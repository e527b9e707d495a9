"""The documents name what exists: files, modules, options, channels; and the README stays short."""

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from celo2.metatrain.config import Config as MetatrainConfig
from celo2.rule import CHANNEL_GROUPS, FIRST_LAYER
from celo2.training.configuration import options
from configs.schema import Config

ROOT = Path(__file__).parents[1]
CARDS = sorted((ROOT / "celo2" / "pretrained").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")), *CARDS]
CHANGELOG = ROOT / "CHANGELOG.md"
FOLDERS = [*sorted(path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()), "docs", "examples", "tests"]

LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w/?")
MODULE = re.compile(r"python3? -m ([\w.]+)")
CODE = re.compile(r"```(\w*)\n(.*?)```|`([^`\n]+)`", re.DOTALL)
FILE_SUFFIXES = ("py", "yaml", "md", "json", "jsonl", "safetensors", "gz", "npz", "png", "txt", "html", "sh", "bin")
README_LINES, LINE_LENGTH = 120, 160


def by_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code(text: str) -> list[str]:
    """Inline code and code blocks, but for blocks of Python."""
    return [block or inline for language, block, inline in CODE.findall(text) if language != "python"]


def anchors(document: Path) -> set[str]:
    """The anchors of the headings of a document, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def module_exists(name: str) -> bool:
    """Whether the project has a module of this dotted name, or a package that can be run under it."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_relative_links(document):
    missing = []
    for link in LINK.findall(document.read_text()):
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        path = (document.parent / target).resolve() if target else document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            missing.append(link)
    assert not missing


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path != CHANGELOG], ids=by_name)
def test_named_paths(document):
    """The changelog also names what is gone."""
    named = {path for text in code(document.read_text()) for path in NAMED_PATH.findall(text)}
    assert not sorted(path for path in named if not (ROOT / path).exists())


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_named_modules(document):
    assert not sorted({name for name in MODULE.findall(document.read_text()) if not module_exists(name)})


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path != CHANGELOG], ids=by_name)
def test_named_options(document):
    """Every `section.key`. The sections of meta-training are others; where both have one, a key of either will do."""
    known = {name for name, _, _ in [*options(Config), *options(MetatrainConfig)]}
    sections = {name.partition(".")[0] for name in known}
    named = re.compile(rf"(?<![\w./-])((?:{'|'.join(sorted(sections))})\.[a-z]\w*)(?![\w(]|\.\w)")
    found = {name for text in code(document.read_text()) for name in named.findall(text)}
    wrong = found - known
    assert not sorted(n for n in wrong if n.rpartition(".")[2] not in FILE_SUFFIXES and not module_exists(n))


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_lines(document):
    """Lines that wrap nowhere are hard to compare; tables, commands and links cannot wrap."""
    inside, long = False, []
    for number, line in enumerate(document.read_text().splitlines(), 1):
        inside ^= line.startswith("```")
        if len(line) > LINE_LENGTH and not inside and not line.startswith("|"):
            long.append(number)
    assert not long


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_every_document_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    assert not [path.name for path in (ROOT / "docs").glob("*.md") if f"({path.name})" not in index and path.name != "README.md"]


class Model(nn.Module):
    """A language model as the examples call it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)

    def forward(self, tokens: torch.Tensor) -> SimpleNamespace:
        logits = self.head(self.hidden(self.embedding(tokens[:, :-1])))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


@pytest.mark.parametrize("document", ["README.md", "docs/optimizer.md"])
def test_example_runs(document, capsys):
    """The first Python example moves every weight, and prints the routing."""
    example = re.search(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)[1]
    model = Model()
    before = [p.detach().clone() for p in model.parameters()]
    exec(example, {"model": model, "batches": [{"tokens": torch.tensor([[0, 1, 2, 3, 4, 5, 6]])}]})
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert "hidden.weight" in capsys.readouterr().out


def test_channel_table():
    """The channels in docs/algorithm.md are those of the code."""
    text = (ROOT / "docs" / "algorithm.md").read_text()
    for i, group in enumerate(CHANNEL_GROUPS):
        words = ["yes" if flag else "no" for flag in (group.in_vectors, group.odd)]
        cells = [i, f"`{group.name}`", group.formula, group.count, f"`{FIRST_LAYER[group.name]}`", group.depends_on, *words]
        assert "| " + " | ".join(map(str, cells)) + " |" in text


def test_plus_or_minus_is_said_once():
    """It is half a confidence interval of a difference, which only the comparison prints."""
    allowed = {"README.md", "CHANGELOG.md", "architecture.md", "comparing.md", "contributing.md"}
    assert not [by_name(path) for path in DOCUMENTS if "±" in path.read_text() and path.name not in allowed]


def test_changelog_knows_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## [{version}]" in CHANGELOG.read_text()


def test_sections_of_the_schema_are_documented():
    text = (ROOT / "docs" / "training.md").read_text() + (ROOT / "docs" / "distributed.md").read_text()
    assert not [name for name in vars(Config()) if f"{name}." not in text]
