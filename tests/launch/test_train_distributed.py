"""Several processes over gloo: under every strategy the same run as with one, checkpoints from each to each, signals agreed on, a
rank that hangs named. One start takes several runs (forked_runs.py).
"""

import gc
import json
import socket
from dataclasses import replace

import pytest
import torch
from bad_gradients import Poison
from forked_runs import Fault, run_on_ranks, spawn
from host_waits import LAST
from transformers import GPT2Config, GPT2LMHeadModel

from celo2 import load_rule, save_rule
from celo2.training.lock import FolderLock
from data.prepare import prepare
from data.shards import TokenShards
from launch.checkpoint.tensors import INDEX, files_of, part_name, read_tensors
from launch.checkpoint.verify import MANIFEST, MODEL, OPTIMIZER, checkpoint_files, checkpoint_name, sha256
from launch.distributed.heartbeat import STATUS
from launch.run.agreement import rule_hash
from launch.run.weights import hashes, weights_fact

STEPS = ["train.steps=12", "train.micro_batch_size=4", "checkpoint.every=4", "checkpoint.keep=10"]


def losses(records):
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def validation(records):
    return {r["step"]: r["val_loss"] for r in records if "val_loss" in r}


def read(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# An odd width, a vocabulary that no number of processes divides, gradient accumulation, clipping; ZeRO cuts within rows.
ODD = ["model.layers=3", "model.width=30", "model.heads=3", "model.vocab_size=261", "train.grad_clip=0.5"]
ODD += ["train.micro_batch_size=2", "eval.every=0", "checkpoint.keep=10", "log.sample_tokens=0"]
LAYOUTS = {
    "ddp": [],
    "shard_state": ["distributed.shard_state=true"],
    "zero1": ["distributed.strategy=zero1"],
    "zero2": ["distributed.strategy=zero2"],
    "zero3": ["distributed.strategy=zero3"],
    "fsdp2": ["distributed.strategy=fsdp2"],
    "hsdp": ["distributed.strategy=fsdp2", "distributed.replicas=2"],  # on an even number of processes
}
LABELS = {name: [f"optimizer.name={name}"] for name in ("celo2", "celo2-base", "adamw", "muon")} | {
    "bf16": ["train.precision=bf16"],
    "bf16-state": ["optimizer.state_dtype=bf16"],
    "plain": ["optimizer.arguments={orthogonalize: false}"],
    "sizes": ["optimizer.rule=hand-agreement"],
    "whitened": ["optimizer.rule=hand-whitened"],
    "both": ["optimizer.cautious_weight_decay=true", "optimizer.ema_nesterov=0.6"],
    "muon-both": ["optimizer.name=muon", "optimizer.cautious_weight_decay=true", "optimizer.ema_nesterov=0.6"],
}
# Weights after 20 steps against one process, largest difference. Measured on 2 and 4 processes: celo2 2.0e-5, celo2-base 1.9e-4,
# adamw 4.8e-6, muon 1.6e-3 (torch's Muon orthogonalizes in bfloat16), bf16 0.042 (losses 8e-5), bf16-state
# 0.011 (losses 7e-6), whitened 7.6e-6; sizes 2.6e-6 after 10 steps.
WEIGHTS = {"celo2": 2e-4, "celo2-base": 1e-3, "adamw": 1e-4, "muon": 1e-2, "bf16": 0.2, "bf16-state": 0.1, "plain": 1e-3}
WEIGHTS |= {"both": 2e-3, "muon-both": 1e-2, "sizes": 2e-4, "whitened": 2e-4}
# Row and column means and whiteners likewise: whitened 8.9e-5, celo2 2.6e-5, celo2-base 9e-6, bf16 0.22, bf16-state 0.041; plain
# 1.8e-3, of queries and keys with gradients of 1e-6; what was not moved is 1 off.
MEANS = {"celo2": 1e-3, "celo2-base": 1e-3, "adamw": 0, "muon": 0, "bf16": 0.5, "bf16-state": 0.3, "plain": 1e-2}
MEANS |= {"both": 1e-3, "muon-both": 0, "sizes": 1e-3, "whitened": 1e-3}


def differences(folder, reference, first=1):
    """Largest relative difference of the losses from step `first` on, largest difference of the last weights, and of the last row
    and column means and whiteners, each relative to the largest of its parameter."""
    ours, theirs = losses(read(folder)), losses(read(reference))
    loss = max(abs(ours[step] / theirs[step] - 1) for step in range(first, max(theirs) + 1))
    last = f"checkpoints/{checkpoint_name(max(theirs))}"
    a, b = (read_tensors(path / last / "model.safetensors") for path in (folder, reference))
    assert a.keys() == b.keys()
    weights = max((a[name] - b[name]).abs().max().item() for name in a)
    a, b = (read_tensors(path / last / "optimizer.safetensors") for path in (folder, reference))
    assert a.keys() == b.keys()
    names = [name for name in a if name.endswith(("/row", "/col", "_whitener"))]
    means = [((a[name] - b[name]).abs().max() / b[name].abs().max()).item() for name in names]
    return loss, weights, max(means, default=0.0)


def layers_differ(folder, reference):
    """The largest relative difference of the statistics of layers at the first step, where the weights are equal."""
    ours, theirs = (next(r for r in read(path) if r["step"] == 1 and "loss" in r) for path in (folder, reference))
    ours, theirs = ({key: value for key, value in r.items() if "/" in key} for r in (ours, theirs))
    assert all(key.startswith("attention_logit/") for key in theirs.keys() ^ ours.keys())  # zero3 has none at the first step
    # The gradient of a bias of keys is rounding alone, since the softmax does not see it, and AdamW makes an update of that.
    keys = [key for key in ours if theirs[key] is not None and "k_proj.bias" not in key]
    differences = {key: abs(ours[key] - theirs[key]) / max(abs(theirs[key]), 1e-3) for key in keys}
    return max(differences.items(), key=lambda item: item[1])


OTHERS = [("muon", "zero3"), ("adamw", "fsdp2"), ("celo2-base", "fsdp2"), ("bf16-state", "zero1")]
OTHERS += [("sizes", "shard_state"), ("sizes", "zero3"), ("whitened", "fsdp2")]
MORE = [("bf16", "fsdp2"), ("muon", "ddp"), ("muon", "zero1"), ("muon", "fsdp2"), ("adamw", "zero2"), ("adamw", "zero3")]
MORE += [("celo2-base", name) for name in ("shard_state", "zero1", "zero3")]
MORE += [("bf16", "zero1"), ("bf16", "zero3"), ("bf16-state", "fsdp2"), ("plain", "zero3"), ("plain", "fsdp2")]
MORE += [("sizes", name) for name in ("ddp", "zero1", "fsdp2")]
MORE += [("whitened", name) for name in ("ddp", "shard_state", "zero1", "zero2", "zero3")]
BOTH = [("both", name) for name in ("ddp", "zero1", "zero2", "zero3", "fsdp2")] + [("muon-both", "zero1"), ("muon-both", "fsdp2")]


# Celo2 under the layouts `names`, a continuation from each to the next; other optimizers and precisions.
@pytest.mark.parametrize(
    ("world", "steps", "names", "others"),
    [
        pytest.param(2, 10, ("shard_state", "zero1", "zero3", "fsdp2"), OTHERS, id="2"),
        pytest.param(
            2, 20, ("ddp", "zero2", "zero3", "shard_state", "fsdp2", "zero1"), MORE, id="2-more", marks=pytest.mark.slow
        ),
        pytest.param(2, 20, (), BOTH, id="2-both", marks=pytest.mark.slow),
        pytest.param(4, 20, ("shard_state", "zero1", "zero3", "fsdp2", "hsdp"), [], id="4", marks=pytest.mark.slow),
    ],
)
def test_every_strategy_equals_one_process(world, steps, names, others, run, prepared):
    folder, half = run.tmp_path, steps // 2
    # The ramp makes it three micro-batches where there were two. Statistics of layers are at the first and the last step.
    options = [*ODD, f"train.steps={steps}", f"checkpoint.every={half}", f"log.layers={steps}"]
    options.append(f"train.ramp={{{steps * 7 // 10}: 12}}")
    common = [str(folder / "config.yaml"), f"data.dir={prepared}", *options]
    micro = [f"train.micro_batch_size={4 // world}"]
    pairs = [*(("celo2", name) for name in names), *others]
    runs = {(label, name): [*LAYOUTS[name], *micro, *LABELS[label]] for label, name in pairs}
    commands = [[*common, *options, f"run.dir={folder / '-'.join(key)}"] for key, options in runs.items()]
    # From each layout to the next, around.
    for before, after in zip(names, names[1:] + names[:1], strict=True):
        checkpoint = folder / f"celo2-{before}" / "checkpoints" / checkpoint_name(half)
        commands.append(
            [*common, *LAYOUTS[after], *micro, f"checkpoint.resume={checkpoint}", f"run.dir={folder / f'{before}-{after}'}"]
        )
    for label, name in pairs:  # whiteners travel through checkpoints, too
        if label == "whitened":
            checkpoint = folder / f"{label}-{name}" / "checkpoints" / checkpoint_name(half)
            where = f"run.dir={folder / f'{name}-resumed'}"
            commands.append([*common, *LAYOUTS["zero1"], *micro, *LABELS[label], f"checkpoint.resume={checkpoint}", where])
    for label in {label for label, _ in runs}:
        assert run(*options, *LABELS[label], folder=label)[0] == 0
    spawn(world, folder, commands, [0] * len(commands))
    for label, name in runs:
        loss, weights, means = differences(folder / f"{label}-{name}", folder / label)
        print(f"{world} processes {label} {name}: loss {loss:.1e}, weights {weights:.1e}, means {means:.1e}")
        inside = layers_differ(folder / f"{label}-{name}", folder / label)
        print(f"    statistics of layers: {inside}")
        # The smallest singular value of a direction from normalized gradients: sizes 9.0e-4, whitened 2.1e-3; celo2 7.1e-5.
        most = 0.05 if label.startswith(("bf16", "muon")) else 5e-3 if label in ("sizes", "whitened") else 1e-3
        assert inside[1] < most, (label, name, inside)
        assert means <= MEANS[label], (label, name)
        assert loss < (1e-3 if label.startswith("bf16") else 1e-4), (label, name)
        assert weights < WEIGHTS[label], (label, name)
    resumed = [(f"{before}-{after}", "celo2") for before, after in zip(names, names[1:] + names[:1], strict=True)]
    resumed += [(f"{name}-resumed", label) for label, name in pairs if label == "whitened"]
    for name, label in resumed:
        loss, weights, means = differences(folder / name, folder / label, first=half + 1)
        print(f"{world} processes {label}, {name}: loss {loss:.1e}, weights {weights:.1e}, means {means:.1e}")
        assert means <= MEANS[label] and loss < 1e-4 and weights < WEIGHTS[label], (label, name)


# One run each: its layout on 1, 4, 3, 2 and again 1 process.
LINES = {
    "ddp": ("ddp", "ddp", "ddp", "ddp", "ddp"),
    "zero1": ("ddp", "zero1", "zero2", "zero1", "fsdp2"),
    "zero3": ("fsdp2", "zero3", "zero3", "zero3", "ddp"),
    "fsdp2": ("fsdp2", "fsdp2", "fsdp2", "fsdp2", "fsdp2"),
    "replicas": ("ddp", "hsdp", "fsdp2", "hsdp", "ddp"),
    "mixed": ("ddp", "zero2", "shard_state", "zero2", "ddp"),
}


@pytest.mark.slow  # 3 minutes on 2 cores
def test_one_line_of_runs_on_other_numbers_of_processes(run, prepared):
    """1 -> 4 -> 3 -> 2 -> 1 processes, 4 steps each: the losses of one process, and its weights."""
    options = [*ODD, "train.batch_size=12", "train.micro_batch_size=3", "schedule.kind=constant", "checkpoint.every=4"]
    assert run(*options, "train.steps=20", folder="one")[0] == 0
    for part, world in enumerate((1, 4, 3, 2, 1)):
        common = [str(run.tmp_path / "config.yaml"), f"data.dir={prepared}", *options, f"train.steps={4 * (part + 1)}"]
        commands = [[*common, *LAYOUTS[names[part]], f"run.dir={run.tmp_path / line}"] for line, names in LINES.items()]
        spawn(world, run.tmp_path, commands, [0] * len(commands))
    for line in LINES:
        assert losses(read(run.tmp_path / line)).keys() == set(range(1, 21)), line
        loss, weights, means = differences(run.tmp_path / line, run.tmp_path / "one")
        print(f"1, 4, 3, 2, 1 processes, {' -> '.join(LINES[line])}: loss {loss:.1e}, weights {weights:.1e}, means {means:.1e}")
        assert loss < 1e-4 and weights < WEIGHTS["celo2"] and means <= MEANS["celo2"], line


@pytest.mark.slow  # 60 s
def test_weights_to_begin_with_and_another_batch_size_under_every_strategy(run, prepared):
    """Begun from a GPT-2 of transformers with batches of 8, continued with batches of 16: as with one process."""
    torch.manual_seed(0)
    shape = {"vocab_size": 261, "n_positions": 40, "n_embd": 30, "n_layer": 3, "n_head": 3}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(run.tmp_path / "gpt2")
    options = [*STEPS, "model.layers=null", "model.width=null", "model.heads=null", f"model.init={run.tmp_path / 'gpt2'}"]
    more = [*options, "train.steps=16", "train.batch_size=16", "train.on_batch_change=allow"]
    assert run(*options, folder="one")[0] == run(*more, folder="one")[0] == 0
    names = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
    spawn(
        2,
        run.tmp_path,
        [
            [
                str(run.tmp_path / "config.yaml"),
                f"data.dir={prepared}",
                *start,
                *LAYOUTS[name],
                f"run.dir={run.tmp_path / name}",
            ]
            for name in names
            for start in (options, more)
        ],
        [0] * 2 * len(names),
    )
    single = read(run.tmp_path / "one")
    for name in names:
        double = read(run.tmp_path / name)
        assert losses(double) == pytest.approx(losses(single), rel=1e-5), name
        assert validation(double) == pytest.approx(validation(single), rel=1e-5), name
        assert len(losses(double)) == 16


def test_two_processes(run, prepared):
    _, single, _ = run(*STEPS, folder="one")
    plain = ["optimizer.arguments={orthogonalize: false}", "train.steps=2", "schedule.kind=constant"]
    _, unorthogonalized, _ = run(*STEPS, *plain, folder="plain-one")
    common = [str(run.tmp_path / "config.yaml"), f"data.dir={prepared}", *STEPS]
    one = run.tmp_path / "one" / "checkpoints" / "step_00000004"
    runs = [
        [*common, f"run.dir={run.tmp_path / 'two'}"],
        [*common, f"run.dir={run.tmp_path / 'from_one'}", f"checkpoint.resume={one}"],
        ["signal in step 6 of rank 1", *common, f"run.dir={run.tmp_path / 'signal'}"],
        [*common, f"run.dir={run.tmp_path / 'signal'}"],
        [*common, f"run.dir={run.tmp_path / 'bad'}", "train.batch_size=7"],
        ["tamper", *common, f"run.dir={run.tmp_path / 'wrong'}", "distributed.strategy=fsdp2"],
        ["tamper", *common, f"run.dir={run.tmp_path / 'wrong1'}", "distributed.shard_state=true"],
        [*common, f"run.dir={run.tmp_path / 'locked'}"],
        [*common, f"run.dir={run.tmp_path / 'shards_one'}", "checkpoint.shards=one"],
        [*common, f"run.dir={run.tmp_path / 'one'}", f"checkpoint.resume={one}", "optimizer.lr=1e-3"],
        [*common, *plain, f"run.dir={run.tmp_path / 'plain'}"],
        [*common, *plain, *LAYOUTS["hsdp"], f"run.dir={run.tmp_path / 'copies'}"],
    ]
    differing = runs_that_differ(run.tmp_path, prepared)
    with FolderLock(run.tmp_path / "locked"):
        done = spawn(
            2,
            run.tmp_path,
            [*runs, *([first, *common, *rest] for first, rest, _ in differing)],
            [0, 0, 75, 0, 2, 2, 2, 2, 0, 0, 0, 0] + [2] * len(differing),
        )

    # Worst measured 6e-8: matrices are orthogonalized in other batches than by one process.
    double = read(run.tmp_path / "two")
    assert losses(double) == pytest.approx(losses(single), rel=1e-5)
    assert validation(double) == pytest.approx(validation(single), rel=1e-5)
    # Without Newton-Schulz; and copies of shards, which are compared before they are saved, also after an evaluation.
    for name in ("plain", "copies"):
        assert losses(read(run.tmp_path / name)) == pytest.approx(losses(unorthogonalized), rel=1e-5), name
    # Saved by one, resumed by two; saved by two, resumed by one.
    assert losses(read(run.tmp_path / "from_one")) == pytest.approx(losses(single), rel=1e-4)
    two = run.tmp_path / "two" / "checkpoints" / "step_00000008"
    _, back, _ = run(*STEPS, f"checkpoint.resume={two}", folder="from_two")
    assert losses(back) == pytest.approx(losses(single), rel=1e-4)
    # Written by both ranks, a part each, or by the first one alone: the same to the last bit.
    whole = run.tmp_path / "shards_one" / "checkpoints" / "step_00000008"
    parts = [part_name(name, n, 2) for name in (MODEL, OPTIMIZER) for n in (1, 2)] + [MODEL + INDEX, OPTIMIZER + INDEX]
    assert {*checkpoint_files(whole)} == {MODEL, OPTIMIZER, "config.json", "state.json"}
    assert {*checkpoint_files(two)} == {*parts, "config.json", "state.json"}
    for name in (MODEL, OPTIMIZER):
        a, b = read_tensors(two / name), read_tensors(whole / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    # A signal that only the second rank got: both saved after that step, and the continued run is the same.
    assert losses(read(run.tmp_path / "signal")) == losses(double)
    assert "train.batch_size=7 must be a multiple of the number of processes, 2" in done.stderr
    # Each rank names the process that holds the folder, in one line. Two processes go back to a checkpoint of one.
    assert done.stderr.count("locked is in use by process") == 2 and not (run.tmp_path / "locked").exists()
    aside = sorted(path.name for path in (run.tmp_path / "one/set_aside/1/checkpoints").iterdir())
    assert aside == ["step_00000008", "step_00000012"]
    assert losses(read(run.tmp_path / "one"))[12] != losses(single)[12]
    # Orthogonalization that is silently off is found at the first step, before anything is saved.
    for strategy, folder in (("fsdp2", "wrong"), ("ddp", "wrong1")):
        assert f"distributed.strategy {strategy}: the update of model.layers.0.attn.q_proj.weight is 0." in done.stderr
        assert not list((run.tmp_path / folder / "checkpoints").glob("step_*"))

    # What rank 1 has and rank 0 has not is said by both in the same words, before anything is written.
    manifest = sha256(two.parent / "step_00000012" / MANIFEST)[:12]
    for _, _, text in differing:
        line = f"the ranks differ: {text}".replace("MANIFEST", manifest).replace("HOST", socket.gethostname())
        for step in ("STEP4", "STEP8"):
            if step in line:
                files = files_of(one.with_name(f"step_0000000{step[4]}") / MODEL)
                line = line.replace(step, weights_fact(hashes(files)).value)
        assert {f"error: {line}", f"error: rank 1: {line}"} <= set(done.stderr.splitlines()), (line, done.stderr)
    assert read(run.tmp_path / "two") == double
    assert not list(run.tmp_path.glob("refused*")) and not (run.tmp_path / "elsewhere").exists()


def runs_that_differ(folder, prepared):
    """What rank 1 alone is given, what both ranks are, and what is said of it."""
    (folder / "other.jsonl").write_text('{"text": "another data set, of which there is enough"}\n' * 40)
    other = prepare(str(folder / "other.jsonl"), folder / "other", tokenizer="bytes", val_fraction=0.2, workers=1)
    prints = [TokenShards(path, "train").fingerprint[:12] for path in (prepared, other)]
    rule = load_rule("celo2")
    changed = replace(rule, weights={name: weight * 1.001 for name, weight in rule.weights.items()})
    rules = [folder / "rule.safetensors", folder / "changed.safetensors"]
    for path, content in zip(rules, (rule, changed), strict=True):
        save_rule(content, path)
    missing = f"unusable ({folder}/elsewhere/checkpoints/step_00000012 is not a whole checkpoint: {MANIFEST} is missing)"
    new, two = f"run.dir={folder}/refused", f"run.dir={folder}/two"

    def text(name, first, second, remedy, more=""):
        return f"{name} is {first} on rank 0 (HOST), {second} on rank 1 (HOST){more}; {remedy}"

    def option(name, first, second, more=""):
        return text(name, first, second, f"give every rank the same {name}", more)

    data, same_rule = "let data.dir hold the same data set on every node", "let optimizer.rule be the same file on every node"
    here = "let run.dir be one folder that every node reads, or copy it to each"
    return [
        ("rank 1: optimizer.lr=0.05", [new], option("optimizer.lr", "0.005", "0.05")),
        ("rank 1: run.seed=2", [new, "distributed.strategy=fsdp2"], option("run.seed", "1", "2")),
        (
            "rank 1: distributed.strategy=zero1",
            [new, "optimizer.name=adamw"],
            option("distributed.strategy", "ddp", "zero1", " (and 1 more: deepspeed)"),
        ),
        (f"rank 1: model.init={two[8:]}", [new], text("model.init", "null", "given", "give it to every rank or to none")),
        (f"rank 1: data.dir={other}", [new], text("the data set of data.dir", *prints, data)),
        (
            f"rank 1: optimizer.rule={rules[1]}",
            [new, f"optimizer.rule={rules[0]}"],
            text("the rule of the optimizer", *(rule_hash(r)[:12] for r in (rule, changed)), same_rule),
        ),
        (
            f"rank 1: run.dir={folder}/elsewhere",
            [two, "optimizer.name=adamw", "train.steps=16"],
            text("the checkpoint to resume from", "step 12 with the manifest MANIFEST", missing, here),
        ),
        (
            f"rank 1: run.dir={folder}/one",
            [f"run.dir={folder}/refused", "optimizer.name=muon"],
            text("the checkpoint to resume from", "none", f"step 12 in {folder}/one", here),
        ),
        (
            f"rank 1: model.init={folder}/one/checkpoints/step_00000008",
            [new, f"model.init={folder}/one/checkpoints/step_00000004"],
            text("the weights of model.init", "STEP4", "STEP8", "let model.init hold the same weights on every node"),
        ),
        ("rank 1: another torch", [new], text("torch", torch.__version__, "9.9", "install the same torch on every node")),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_ddp_continues_bit_for_bit_on_more_than_two_processes(world, run, prepared):
    """And with micro-batches of one size it is the run of one process to within rounding, dropout included."""
    options = [*STEPS, "train.steps=8", "train.batch_size=12", "train.micro_batch_size=1", "model.dropout=0.2", "model.width=96"]
    assert run(*options, folder="one")[0] == 0
    common = [str(run.tmp_path / "config.yaml"), f"data.dir={prepared}", *options]
    half = run.tmp_path / "whole/checkpoints/step_00000004"
    runs = [[*common, f"run.dir={run.tmp_path / 'whole'}"]]
    runs.append([*common, f"checkpoint.resume={half}", f"run.dir={run.tmp_path / 'continued'}"])
    spawn(world, run.tmp_path, runs, [0, 0])
    for name in (MODEL, OPTIMIZER):
        a, b = (read_tensors(run.tmp_path / folder / "checkpoints/step_00000008" / name) for folder in ("whole", "continued"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert losses(read(run.tmp_path / "whole")) == pytest.approx(losses(read(run.tmp_path / "one")), rel=1e-5)


def test_bad_gradients_reach_no_weight_under_any_strategy(run, prepared):
    """Two gradients in a row are not finite: skipped; and with on_spike=rollback, back to the checkpoint and past the batches."""
    common = [str(run.tmp_path / "config.yaml"), f"data.dir={prepared}", *STEPS, "train.max_bad_steps=2"]
    rollback, seldom = ["train.on_spike=rollback"], ["log.every=12"]  # most steps are not logged, so their verdicts come late
    cases = {"ddp": rollback, "fsdp2": rollback, "zero1": rollback, "zero2": ["train.max_bad_steps=3"], "zero3": rollback}
    for folder, options in (("rolled-back", rollback), ("skipped", ["train.max_bad_steps=3"])):
        assert run(*STEPS, "train.max_bad_steps=2", *options, folder=folder, hooks=Fault("NaN"))[0] == 0
    runs = [
        ["NaN in steps 6 and 7", *common, *seldom, *options, f"distributed.strategy={name}", f"run.dir={run.tmp_path / name}"]
        for name, options in cases.items()
    ]
    alone = {"celo2": "nan", "adamw": "inf", "muon": "1e9"}  # a gradient of rank 1 alone after the reduction
    for name, value in alone.items():
        assert run(*STEPS, f"optimizer.name={name}", folder=f"{name}-one", hooks=Poison([6]))[0] == 0
        runs.append([f"gradient={value}", *common, f"optimizer.name={name}", f"run.dir={run.tmp_path / name}"])
    runs.append(["gradient=nan", *common, "distributed.strategy=fsdp2", f"run.dir={run.tmp_path / 'fsdp2-nan'}"])
    # A roll-back where the second rank's folder is another one.
    runs.append(["rank 1: run.dir=elsewhere", *runs[0][:-1], f"run.dir={run.tmp_path / 'unshared'}"])
    done = spawn(2, run.tmp_path, runs, [0] * (len(runs) - 1) + [2])
    missing = "unusable (elsewhere/checkpoints/step_00000004 is not a whole checkpoint: manifest.json is missing) on rank 1"
    assert done.stderr.count(missing) == 2, done.stderr
    for name, value in alone.items():
        one, two = (losses(read(run.tmp_path / folder)) for folder in (f"{name}-one", name))
        one[6] = two[6] = 0.0  # with a loss that is finite, and without; the step is skipped by both
        assert two == pytest.approx(one, rel=1e-4), name
        (event,) = [event for event in read(run.tmp_path / name, "events.jsonl") if event["event"] == "problem"]
        problem = "the ranks differ: " if value == "1e9" else "not finite on rank 1 alone"
        assert event["step"] == 6 and problem in event["problem"] and event["problem"].endswith("the step is skipped"), event
    sharded, whole = (losses(read(run.tmp_path / folder)) for folder in ("fsdp2-nan", "celo2"))
    assert sharded.pop(6) is whole.pop(6) is None
    assert sharded == pytest.approx(whole, rel=1e-5)
    for name in cases:
        # The same steps of the same loss, and of the same events, as where every step is logged and its verdict known at once.
        one, folder = run.tmp_path / ("skipped" if name == "zero2" else "rolled-back"), run.tmp_path / name
        expected, found = ({r["step"]: r["step_loss"] for r in read(f) if "loss" in r} for f in (one, folder))
        assert list(found) == [1, 12] and len(expected) == 12, name
        assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-5), name  # worst measured 6e-8
        assert problems(folder) == problems(one) and len(problems(one)) == (2 if name == "zero2" else 3), name
        states = [json.loads((f / "checkpoints/step_00000012/state.json").read_text()) for f in (one, folder)]
        assert len({(s["bad_steps"], s["sequences"], s["rollbacks"], s["tokens"]) for s in states}) == 1, name
        # Nobody waits for the newest step; DeepSpeed looks at each gradient.
        of_step = json.loads((folder / "waits.json").read_text())
        quiet = [counts for step, counts in of_step if step in (2, 10, 11)]  # neither logged, evaluated nor saved
        print(name, quiet)
        assert len(quiet) == 3
        assert {reader for counts in quiet for reader in counts} <= {LAST, *({"deepspeed"} if "zero" in name else ())}, quiet
        assert all(counts.get(LAST, 0) <= 1 for counts in quiet), quiet


def problems(folder):
    """What the events of a run say of bad steps, but for the numbers."""
    keys = ("event", "step", "sequences", "sequences_left_out")
    events = [event for event in read(folder, "events.jsonl") if event["event"] in ("problem", "rollback")]
    return [{key: event[key] for key in keys if key in event} for event in events]


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_further_runs_of_one_process(strategy, run):
    """A notebook's: a run takes its process groups along and leaves no memory behind, though libraries remember much of it."""
    precisions = {"first": "fp32", "second": "bf16", "third": "fp32"}
    found = [run(f"distributed.strategy={strategy}", f"train.precision={p}", folder=name) for name, p in precisions.items()]
    assert [status for status, *_ in found] == [0, 0, 0], found
    first, second, third = (losses(records) for _, records, _ in found)
    assert first == third and len(first) == 6
    assert second == pytest.approx(first, rel=0.01) and second != first

    before = live_elements()
    assert run(f"distributed.strategy={strategy}", folder="fourth")[0] == 0
    assert live_elements() < before + 1000  # the model has 36,736 weights; DeepSpeed alone holds 50 million elements more


def live_elements():
    """Elements of all tensors that something in this process holds."""
    gc.collect()
    return sum(found.numel() for found in gc.get_objects() if issubclass(type(found), torch.Tensor))


def test_further_runs_of_the_same_processes(run, prepared):
    """Each run meets anew, the second one goes on where a signal stopped the first."""
    run("train.steps=1")  # writes config.yaml
    common = [str(run.tmp_path / "config.yaml"), f"data.dir={prepared}", *STEPS, f"run.dir={run.tmp_path / 'two'}"]
    others = [common[0], common[1], "train.micro_batch_size=4", f"run.dir={run.tmp_path / 'other'}", "distributed.strategy=fsdp2"]
    spawn(2, run.tmp_path, [["signal", *common], common, others], [75, 0, 0])
    assert list(losses(read(run.tmp_path / "two"))) == list(range(1, 13))


def test_a_rank_that_hangs_is_named_and_the_same_command_continues(run, prepared):
    """Under torchrun, which starts it by itself: test_launch_faults.py."""
    _, single, _ = run(*STEPS, "distributed.strategy=zero2", folder="one")
    arguments = [str(run.tmp_path / "config.yaml"), f"data.dir={prepared}", *STEPS, f"run.dir={run.tmp_path / 'two'}"]
    arguments += ["distributed.strategy=zero2", "distributed.timeout=15"]  # DeepSpeed takes 4 s to start on a busy machine
    done = run_on_ranks(2, run.tmp_path, [["hang in step 6 of rank 1", *arguments]])
    assert done.statuses == [STATUS, STATUS], done.stdout + done.stderr
    (error,) = {line for line in done.stderr.splitlines() if line.startswith("error: rank 1 (")}
    assert 'has hung for 15 s, while others wait, at "step 6: begins"' in error
    assert "the same command continues from its newest checkpoint" in error
    spawn(2, run.tmp_path, [arguments], [0])
    [event] = [event for event in read(run.tmp_path / "two", "events.jsonl") if event["event"] == "restart"]
    assert (event["attempt"], event["step"]) == (1, 4) and f"error: {event['reason']}" == error
    assert losses(read(run.tmp_path / "two")) == pytest.approx(losses(single), rel=1e-5)  # worst measured 1e-7
