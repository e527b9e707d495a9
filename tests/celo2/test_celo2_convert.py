"""`python -m celo2.convert`."""

import runpy
import sys

import pytest
from rule_files import DESCRIBED, VECTORS, assert_same_weights, python, random_rule, unpacked

from celo2 import load_rule, save_rule
from celo2.convert import main


def test_convert_there_and_back(tmp_path, capsys):
    there, back = tmp_path / "rule.safetensors", tmp_path / "back.state"
    assert main([str(VECTORS / "theta.state"), str(there)]) == 0
    assert main([str(there), str(back)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert str(there) in captured.out and str(back) in captured.out
    expected = load_rule(VECTORS / "theta.state")
    assert_same_weights(load_rule(there), expected.weights)
    assert_same_weights(load_rule(back), expected.weights)
    assert load_rule(there).description == expected.description
    assert unpacked(back) == unpacked(VECTORS / "theta.state")


def test_convert_records_what_theta_does_not_say(tmp_path):
    out = tmp_path / "rule.safetensors"
    assert main([str(VECTORS / "theta.state"), str(out), "--variant", "celo2-base", "--description", "downloaded"]) == 0
    assert (load_rule(out).variant, load_rule(out).description) == ("celo2-base", "downloaded")


def test_convert_keeps_the_description(tmp_path, capsys):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_rule(random_rule(5, **DESCRIBED), first)
    assert main([str(first), str(second)]) == 0
    again = load_rule(second)
    assert again.hidden == 5
    assert {name: getattr(again, name) for name in DESCRIBED} == DESCRIBED
    assert "celo2-base, 5 hidden units, gradients normalized, with step sizes; meta-trained" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["safetensors", "state"])
def test_convert_onto_itself(tmp_path, ending):
    path = tmp_path / f"rule.{ending}"
    save_rule(random_rule(), path)
    assert main([str(path), str(path), "--description", "renamed"]) == 0
    assert_same_weights(load_rule(path), random_rule().weights)


def test_convert_shipped_rule(tmp_path):
    assert main(["celo2-base", str(tmp_path / "rule.safetensors")]) == 0
    assert load_rule(tmp_path / "rule.safetensors").variant == "celo2-base"


def test_convert_into_a_folder_that_is_not_there(tmp_path, capsys):
    out = tmp_path / "nowhere" / "rule.state"
    assert main(["celo2", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert str(out) in captured.err


def test_failed_conversion_keeps_the_output_of_before(tmp_path):
    out = tmp_path / "out.state"
    save_rule(random_rule(), out)
    (tmp_path / "bad.safetensors").write_text("not a rule")
    assert main([str(tmp_path / "bad.safetensors"), str(out)]) == 2
    assert_same_weights(load_rule(out), random_rule().weights)


@pytest.mark.parametrize("argv", [[], ["celo2"], ["celo2", "out.state", "--variant", "celo3"], ["celo2", "out.state", "more"]])
def test_bad_command_line(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "celo2.convert" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:'celo2.convert' found in sys.modules")
def test_command_succeeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["celo2.convert", str(VECTORS / "theta.state"), "rule.safetensors"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("celo2.convert", run_name="__main__")
    assert caught.value.code == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("rule.safetensors: celo2, 8 hidden units")
    assert captured.err == ""
    assert_same_weights(load_rule("rule.safetensors"), load_rule(VECTORS / "theta.state").weights)


def test_command_fails_in_one_line(tmp_path):
    (tmp_path / "damaged.state").write_bytes((VECTORS / "theta.state").read_bytes()[:-9])
    failed = python("-m", "celo2.convert", "damaged.state", "out.safetensors", cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("error: ")
    assert "damaged.state" in failed.stderr
    assert not (tmp_path / "out.safetensors").exists()
