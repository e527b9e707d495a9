"""An exported model on the Hub, without a network."""

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

from configs.load import load_config
from models.export import main


class FakeHub:
    """Stands in for huggingface_hub.HfApi: notes what is uploaded, or fails."""

    pushed: ClassVar[list] = []
    error: Exception | None = None

    def create_repo(self, name, private=None, exist_ok=False):
        if FakeHub.error:
            raise FakeHub.error
        FakeHub.pushed.append((name, private, exist_ok))
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, repo_id, folder_path, commit_message):
        FakeHub.pushed.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir()), commit_message))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


def test_an_export_is_pushed_with_a_card_of_the_run(run, prepared, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    mix = f"data.mix=[{{dir: {prepared}, weight: {{0: 1, 2: 0.5}}}}]"
    options = ["data.dir=null", mix, "train.ramp={2: 16}", "train.steps=4", "eval.every=4", "log.sample_tokens=0"]
    assert run(*options)[0] == 0
    out, source = run.tmp_path / "out", str(run.tmp_path / "run")
    capsys.readouterr()
    assert main([source, str(out), "--push", "me/mine", "--private"]) == 0
    assert "https://hub/me/mine/commit/1" in capsys.readouterr().out
    made, (name, files, _) = FakeHub.pushed
    assert made == ("me/mine", True, True) and name == "me/mine"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    card = (out / "README.md").read_text()
    for fact in (
        "| data | bytes (weight 1, 0.5 from step 2 on), hash",
        "4 steps of 8 sequences, 16 from step 2 on, 1,536 tokens",
        "| training loss |",
        "bits per byte, after step 4",
        "adamw_lr: 0.01",
        "python train.py config.yaml",
    ):
        assert fact in card, fact
    assert str(run.tmp_path) not in card and str(prepared) not in card
    (run.tmp_path / "card.yaml").write_text(card.partition("```yaml\n")[2].partition("```")[0])
    written = load_config(run.tmp_path / "card.yaml")
    assert written.data.mix == [{"dir": "bytes", "weight": {0: 1, 2: 0.5}}] and written.train.ramp == {2: 16}
    FakeHub.error = ConnectionError("no network")
    assert main([source, str(run.tmp_path / "second"), "--push", "me/mine"]) == 2
    err = capsys.readouterr().err
    assert "is exported, but not pushed to me/mine: no network; then: hf upload me/mine" in err and err.count("\n") == 1
    for arguments, message in (
        (["--push", "mine"], "expected OWNER/NAME"),
        (["--push", ""], "expected OWNER/NAME"),
        (["--private"], "--private is for --push"),
    ):
        assert main([source, str(run.tmp_path / "third"), *arguments]) == 2
        assert message in capsys.readouterr().err and not (run.tmp_path / "third").exists()
