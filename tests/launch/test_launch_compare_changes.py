"""What a comparison says of runs whose settings were changed on their way."""

from launch.compare.curves import read_run
from launch.compare.summary import caveats


def test_the_configuration_of_a_finished_run_is_that_of_its_steps(run):
    assert run("log.sample_tokens=0")[0] == 0
    config = run.tmp_path / "run" / "config.yaml"
    before = config.read_text()
    assert run("log.sample_tokens=0", "optimizer.lr=1e-3")[0] == 0 and config.read_text() == before
    assert not read_run(run.tmp_path / "run").changes
    assert run("log.sample_tokens=0", "optimizer.lr=1e-3", "train.steps=8")[0] == 0 and "lr: 0.001" in config.read_text()


def test_a_change_on_the_way_is_said(run):
    assert run("log.sample_tokens=0", "log.every=2")[0] == 0
    assert run("optimizer.lr=1e-3", "train.steps=8")[0] == 0
    found = read_run(run.tmp_path / "run")
    said = f"{found.folder} was changed on its way: optimizer.lr 0.005 -> 0.001 after step 6, train.steps 6 -> 8 after step 6."
    assert said in caveats([found], found.tokens)
