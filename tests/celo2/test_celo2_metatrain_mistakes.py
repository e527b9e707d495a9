"""Meta-training with data, devices, starts and options that cannot be, or do nothing: one line that names them."""

import math

import numpy as np
import pytest
from test_celo2_metatrain import small

from celo2.baselines import hand_nesterov
from celo2.metatrain.__main__ import main
from celo2.metatrain.config import ConfigError, load_config
from celo2.metatrain.engine import choose_unroll
from celo2.metatrain.tasks import load_data, load_images
from celo2.metatrain.theta import first_theta, theta_of
from celo2.metatrain.train import PESTraining
from celo2.rule_files import load_rule, save_rule

IMAGES = np.random.default_rng(0).random((20, 8, 8))
LABELS = np.arange(20) % 10


@pytest.fixture
def text(tmp_path):
    """A text in each of two folders, under one name."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "code.txt").write_text("straight on " * 40)
    return f"text:{tmp_path}/a/code.txt"


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ConfigError) as caught:
        choose_unroll(small(f"engine.device='{device}'"))
    assert str(caught.value) == f"engine.device is '{device}', expected cpu, or a device of this machine, such as cuda or cuda:1"


def with_value(x, value, dtype=None):
    x = x.astype(dtype or x.dtype)
    x[3] = value
    return x


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (with_value(IMAGES, math.nan), LABELS, "task a: images of float64, expected pixels that are finite numbers"),
        (IMAGES.astype(str), LABELS, "task a: images of <U32, expected pixels that are finite numbers"),
        (IMAGES + 1j, LABELS, "task a: images of complex128, expected pixels that are finite numbers"),
        (IMAGES, with_value(LABELS, 3.5, float), "task a: labels of float64, expected whole numbers"),
        (IMAGES, with_value(LABELS, math.nan, float), "task a: labels of float64, expected whole numbers"),
        (IMAGES, LABELS.astype(str), "task a: labels of <U21, expected whole numbers"),
    ],
)
def test_images_and_labels_that_are_no_numbers(images, labels, message, tmp_path):
    np.savez(tmp_path / "x.npz", a_images=images, a_labels=labels)
    with pytest.raises(ConfigError) as caught:
        load_images([str(tmp_path / "x.npz")])
    assert str(caught.value) == message


def test_whole_labels_of_any_type_are_taken(tmp_path):
    np.savez(tmp_path / "x.npz", a_images=IMAGES, a_labels=LABELS.astype(np.float32))
    np.testing.assert_array_equal(load_images([str(tmp_path / "x.npz")]).arrays[1], LABELS)


def test_a_damaged_npz_is_one_line(tmp_path):
    """Cut anywhere, with a changed byte anywhere, and an array of numpy.save under that name."""
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a_images=IMAGES, a_labels=LABELS)
    whole = path.read_bytes()
    damaged = [whole[:n] for n in range(0, len(whole), 97)]
    damaged += [whole[:n] + bytes([whole[n] ^ 255]) + whole[n + 1 :] for n in range(0, len(whole), 97)]
    with (tmp_path / "x.npy").open("wb") as file:
        np.save(file, IMAGES)
    refused = 0
    for content in [*damaged, (tmp_path / "x.npy").read_bytes(), b"notes"]:
        path.write_bytes(content)
        try:
            load_images([str(path)])
        except ConfigError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > len(damaged) / 2 + 2  # a changed byte may do no harm


def test_tasks_of_one_name_are_refused(text, tmp_path):
    np.savez(tmp_path / "x.npz", code_images=IMAGES, code_labels=LABELS)
    remedy = "rename a file or a data set of tasks.sources, or name it and each size of text.also once"
    for changes, sources, name in (
        ("", [text, text.replace("/a/", "/b/")], "code"),
        ("", ["digits", "digits"], "digits"),
        ("", [text, f"{tmp_path}/x.npz"], "code"),
        ("text.also=[layers=2,layers=2]", [text], "code layers=2"),
    ):
        with pytest.raises(ConfigError) as caught:
            PESTraining(small(changes), *load_data(sources))
        assert str(caught.value) == f"two tasks are named '{name}', expected different names: {remedy}"


def test_a_start_that_is_not_odd(tmp_path):
    """`celo2` is not, hand-nesterov and a rule that was trained from it are; a start drawn at random is made so."""
    with pytest.raises(ConfigError) as caught:
        first_theta(small("rule.odd=true rule.init=celo2"))
    assert (
        str(caught.value) == "rule.init is 'celo2', which is not odd: use rule.odd=false, or an odd start, such as hand-nesterov"
    )
    for init in ("hand-nesterov", "celo2-lm"):
        np.testing.assert_allclose(first_theta(small(f"rule.odd=true rule.init={init}")), theta_of(load_rule(init)), atol=1e-6)
    training = PESTraining(
        small("rule.odd=true rule.init=hand-nesterov rule.init_noise=0.1 outer.lr=0.1"), load_images(["digits"])
    )
    training.step()
    save_rule(training.rule(), tmp_path / "odd.safetensors")
    first_theta(small(f"rule.odd=true rule.init={tmp_path}/odd.safetensors"))
    first_theta(small("rule.odd=true rule.init=random"))
    assert hand_nesterov() == load_rule("hand-nesterov")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["outer.method=cma", "outer.betas=[0.5, 0.5]"], "outer.betas is [0.5, 0.5], which outer.method=cma does not use"),
        (["tasks.sources=[text:x.txt]", "images.lr=0.5"], "images.lr needs images in tasks.sources"),
        (["tasks.sources=[digits]", "text.layers=2"], "text.layers needs a text in tasks.sources"),
        (["tasks.sources=[digits]", "text.also=[layers=2]"], "text.also needs a text in tasks.sources"),
        (
            ["tasks.sources=[text:x.txt]", "text.min_scale=0.1", "inner.reparametrization=none"],
            "text.min_scale is 0.1, which inner.reparametrization=none does not use",
        ),
        (
            ["images.max_scale=5", "inner.reparametrization=none"],
            "images.max_scale is 5.0, which inner.reparametrization=none does not use",
        ),
        (["images.adam_lr=0.1", "rule.variant=celo2-base"], "images.adam_lr is 0.1, which rule.variant=celo2-base does not use"),
    ],
)
def test_an_option_without_effect_is_refused(overrides, message, tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "empty.yaml", overrides)
    assert str(caught.value) == f"{message}: leave it out"


def test_options_with_an_effect_are_taken(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    both = "tasks.sources=[text:x.txt, digits]"
    config = load_config(
        tmp_path / "empty.yaml", [both, "images.lr=0.5", "text.also=[layers=2]", "engine.threads=3", "outer.betas=[0, 0]"]
    )
    assert (config.images.lr, config.text.also, config.engine.threads, config.outer.betas) == (0.5, ["layers=2"], 3, [0, 0])


@pytest.mark.parametrize("word", ["lr=inf", "max_scale=1e999"])
def test_a_size_with_a_number_that_is_not_finite(word, text, tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("")
    assert main([str(tmp_path / "empty.yaml"), f"tasks.sources=[{text}]", f"text.also=[{word}]"]) == 2
    name = word.partition("=")[0]
    assert capsys.readouterr().err == f"error: text.also: '{word}' in '{word}', expected a finite {name}\n"
