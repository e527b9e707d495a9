"""`--plan`: processes, GPUs, units, remedies and warnings; the micro-batch that fits; details that are passed over."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from celo2 import routing_table
from celo2.training.configuration import Written
from celo2.training.idle import refuse_idle
from configs.load import ConfigError, load_config
from configs.schema import Checkpoint, Config, Eval, Log, Optimizer, Schedule
from data import DataError
from data.batches import fit_micro_batch
from launch.optimizers.build import optimizer_groups, routed_groups
from launch.optimizers.idle import IDLE
from launch.planning.cost import Setup, Workload
from launch.planning.machines import MACHINES, Machine, machine_of
from launch.planning.memory import peaks
from launch.planning.plan import make_plan
from launch.planning.remedies import remedy_lines
from launch.planning.table import fitting_worlds, on
from launch.planning.units import duration, size
from models.gpt3 import GPT3Config, GPT3LMHeadModel

LAUNCHED = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("batch", "world", "largest", "micro"),
    [(16, 2, 16, 8), (16, 1, 16, 16), (16, 1, 6, 4), (12, 2, 4, 3), (7, 1, 4, 1), (8, 8, 5, 1)],
)
def test_the_micro_batch_is_a_maximum(batch, world, largest, micro):
    assert fit_micro_batch(batch, world, largest) == micro


def test_ranks_get_equal_parts():
    with pytest.raises(DataError, match=r"train.batch_size=7 must be a multiple of the number of processes, 2; nearest: 6 and 8"):
        fit_micro_batch(7, 2, 4)


def test_a_lower_micro_batch_is_said_and_trains_alike(run):
    losses = []
    for micro in (8, 3):
        status, records, err = run(f"train.micro_batch_size={micro}", "log.sample_tokens=0", folder=f"micro-{micro}")
        assert status == 0, err
        losses.append([r["loss"] for r in records if "loss" in r])
    assert "4 micro-batch(es) of 2 (train.micro_batch_size is at most 3; this divides the batch)" in run.out + err
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # measured 2e-7


def test_units():
    assert [size(x) for x in (0, 999, 96_128, 4.62e6, 47.31e9, 2e12)] == ["0 B", "999 B", "96.1 kB", "4.62 MB", "47.3 GB", "2 TB"]
    assert [duration(x) for x in (7e-7, 0.0012, 24.2, 300, 7200, 1e6)] == [
        "0.70 us",
        "1.20 ms",
        "24.2 s",
        "5 min",
        "2 h",
        "11.6 d",
    ]


def test_every_gpu_is_known():
    for name, machine in MACHINES.items():
        assert machine_of(name.upper()).name == name and machine.flops > machine.fp32_flops and machine.memory >= 24e9
    assert replace(machine_of("h100"), name="h100") == Machine()
    assert machine_of("RTX 4090").memory == 24e9
    for name, near in {"h20": "h200", "4090": "rtx-4090", "a100-sxm4-80gb": "a100", "gh200": "h200"}.items():
        with pytest.raises(ConfigError, match=rf"--gpu {name} is unknown, expected one of h100, h200, .*; did you mean {near}\?"):
            machine_of(name)


@pytest.mark.parametrize("name", ["gpt3_125m", "gpt3_350m", "gpt3_760m", "gpt3_1.3b"])
def test_the_head_of_a_shipped_file_says_what_the_plan_says(name):
    """On 8 GPUs: weights, tokens, batch, FLOPs and memory."""
    path = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    config = load_config(path)
    config.data.dir = None
    plan = make_plan(config, 8, machine_of("h100"))

    weights, tokens = re.search(r": ([\d,]+) weights, trained on ([\d,]+) tokens", head).groups()
    assert f"model       {weights} parameters" in plan and f"= {tokens}; 20." in plan
    processes, count, micro = re.search(r"8 GPUs: (\d+) processes x (\d+) micro-batches x (\d+) sequences", head).groups()
    assert f"= {processes} process(es) x {count} micro-batch(es) x {micro} sequences" in plan
    batch, context, step = re.search(r"# batch    (\d+) sequences x ([\d,]+) tokens = ([\d,]+) tokens a step", head).groups()
    assert f"batch       {batch} x {context.replace(',', '')} = {step} tokens a step" in plan
    assert f"tokens      {re.search(r'# steps    ([0-9,]+ x [0-9,]+)', head)[1].replace(' x', ' steps x')} = {tokens}" in plan
    assert f"FLOPs       {re.search(r'# FLOPs    ([^ ]+) in all', head)[1]} in all" in plan

    whole, of_weights, state = re.search(
        r"memory   about (.+) GB a process .* gradients (.+), optimizer state (.+)\n", head
    ).groups()
    assert f"  step      {whole} GB (" in plan and f"optimizer state {state} GB" in plan
    (row,) = [line.split() for line in plan.splitlines() if line.startswith("     8 ")]
    assert f"{whole}GB" == row[4], "the row of 8 GPUs"
    sizes = re.search(r"step .*\(weights (\S+) (.B), .*, gradients (\S+) (.B), .*not travelled (\S+) (.B)\)", plan).groups()
    parts = [float(number) * {"MB": 1e-3, "GB": 1}[unit] for number, unit in zip(sizes[::2], sizes[1::2], strict=True)]
    assert float(of_weights) == pytest.approx(sum(parts), rel=5e-3)  # three digits


def test_what_is_planned(run, monkeypatch):
    """Replicas without a launcher, unknown optimizers, many epochs; once under a launcher, for its processes."""
    status, _, err = run("--plan", "distributed.strategy=fsdp2", "distributed.replicas=2", "--gpu", "a100")
    rows = [line.split() for line in run.out.split("GPU hours\n")[1].split("\n\n")[0].splitlines()]
    assert status == 0 and [row[0] for row in rows] == ["2", "4", "8"], err
    assert "= 2 process(es) x 1 micro-batch(es) x 4 sequences (at most 8)" in run.out
    assert "19.5 TFLOP/s in fp32, of which 40% are assumed" in run.out and "warning" not in run.out and "unknown" not in run.out
    assert run("--plan", "optimizer.name=torch.optim.NAdam", "train.steps=1000")[0] == 0
    assert "unknown     torch.optim.NAdam" in run.out and "warning     more than 4 epochs" in run.out
    for option in ("eval.sets={other: nowhere}", "eval.tasks={other: nowhere}"):  # what training refuses
        status, _, err = run("--plan", option)
        assert status == 2 and err.startswith(f"error: {option[: option.index('=')]}.other: nowhere")
    assert run("--plan", "eval.sets={far: memory://nowhere}")[0] == 0  # which the training fetches

    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    assert run("--plan")[0] == 0 and "= 2 process(es)" in run.out
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    assert run("--plan")[0] == 0 and run.out == ""
    status, _, err = run("--plan", "train.batch_size=7")
    assert status == 2 and "must be a multiple of the number of processes, 2" in err


# 24 GB of weights, gradients and state under DDP with AdamW, 3 GB of bf16 copies; 8 GB of activations for each sequence.
LARGE = Workload(
    parameters=1_500_000_000,
    hidden=((1000, 1000),) * 1400,
    block_parameters=1_400_000_000,
    blocks=14,
    context=1000,
    flops_per_token=9e9,
    activations=4e9,
    loss=1e6,
)
RECOMPUTED = replace(LARGE, activations=4e8, recompute=True)


def test_gpus_that_a_ramp_does_not_divide_over_are_left_out(run, capsys):
    """Training would refuse them at its first step, whatever the last batch is."""
    assert run("train.batch_size=2", "train.ramp={3: 8}", "--plan")[0] == 0
    rows = [line.split()[0] for line in run.out.splitlines() if " yes " in line or " no " in line]
    assert rows == ["1", "2"]


def test_more_gpus_are_no_remedy_for_an_optimizer_that_is_not_sharded():
    lines = remedy_lines(LARGE, RECOMPUTED, Setup("ddp", 2, optimizer="lion"), 2, Machine(memory=1e9))
    assert lines and all(line.endswith("larger GPUs, or an optimizer that is sharded (celo2, adamw, muon)") for line in lines)


def test_what_to_change_when_it_does_not_fit():
    setup = Setup("ddp", micro_batch=8, optimizer="adamw")
    lines = remedy_lines(LARGE, RECOMPUTED, setup, 8, Machine(memory=50e9))
    # 27 GB, and 8 GB for each sequence, of which a GPU has eight, four, two or one: two fit, or all with checkpointing.
    again = "model.gradient_checkpointing=true fits"
    assert lines == [
        f"too large   on 1 GPU(s): train.micro_batch_size=2 or {again}",
        f"too large   on 2 GPU(s): train.micro_batch_size=2 or distributed.strategy=fsdp2 or {again}",
    ]
    for world in fitting_worlds(setup, 8):
        named = any(f" {world}," in line or f" {world} GPU(s)" in line for line in lines)
        assert named == (peaks(LARGE, on(setup, world, 8))[0] >= 50e9)
    (least,) = remedy_lines(LARGE, RECOMPUTED, setup, 1, Machine(memory=20e9))
    assert "on 1 GPU(s): even distributed.strategy=ddp train.micro_batch_size=1 model.gradient_checkpointing=true takes" in least
    assert remedy_lines(LARGE, RECOMPUTED, setup, 8, Machine(memory=1e12)) == []


@pytest.mark.parametrize(
    ("config", "file", "overrides", "outcome"),
    [
        (Config(schedule=Schedule(decay=0.3)), {"schedule.decay"}, set(), "refused"),
        (Config(schedule=Schedule(decay=0.2)), {"schedule.decay"}, set(), "accepted"),  # a resolved file may say so
        (Config(schedule=Schedule(decay=0.2)), set(), {"schedule.decay"}, "refused"),
        (Config(schedule=Schedule(decay=0.2)), {"schedule.decay"}, {"schedule.decay"}, "accepted"),  # takes the file's back
        (Config(schedule=Schedule(kind="constant", final=0.5)), {"schedule.final"}, {"schedule.kind"}, "noted"),
        (Config(schedule=Schedule(kind="constant", final=0.5)), set(), {"schedule.final", "schedule.kind"}, "refused"),
        (Config(optimizer=Optimizer("celo2-base", adamw_lr=0.1)), {"optimizer.adamw_lr"}, {"optimizer.name"}, "noted"),
        (Config(optimizer=Optimizer("celo2-base", adamw_lr=0.1)), {"optimizer.adamw_lr", "optimizer.name"}, set(), "refused"),
        (
            Config(optimizer=Optimizer("celo2-base", adamw_lr=0.1)),
            {f"optimizer.{key}" for key in vars(Optimizer())},  # the config.yaml of a run
            set(),
            "noted",
        ),
        (Config(optimizer=Optimizer("adamw", rule="celo2-lm")), {"optimizer.rule"}, {"optimizer.name"}, "noted"),
        (Config(optimizer=Optimizer("adamw", rule="celo2-lm")), {"optimizer.rule", "optimizer.name"}, set(), "refused"),
        (Config(optimizer=Optimizer("adamw", rule="celo2-lm")), set(), {"optimizer.rule", "optimizer.name"}, "refused"),
        (Config(optimizer=Optimizer("adamw", adamw_lr=0.1)), set(), {"optimizer.adamw_lr"}, "accepted"),  # of embeddings
        (Config(optimizer=Optimizer("scion", weight_decay=0.2)), {"optimizer.name", "optimizer.weight_decay"}, set(), "refused"),
        (Config(optimizer=Optimizer("scion", weight_decay=0.2)), {"optimizer.weight_decay"}, {"optimizer.name"}, "noted"),
        (Config(optimizer=Optimizer("scion", cautious_weight_decay=True)), set(), {"optimizer.cautious_weight_decay"}, "refused"),
        (Config(optimizer=Optimizer("scion", base_width=64)), {"optimizer.name"}, {"optimizer.base_width"}, "refused"),
        (Config(optimizer=Optimizer("scion", base_width=64)), {"optimizer.base_width"}, {"optimizer.name"}, "noted"),
        (Config(optimizer=Optimizer("scion", route="hidden", weight_decay=0.2)), set(), {"optimizer.weight_decay"}, "accepted"),
        (Config(optimizer=Optimizer("mars", weight_decay=0.2, base_width=64)), set(), {"optimizer.weight_decay"}, "accepted"),
        (Config(log=Log(group="sweep")), set(), {"log.group"}, "refused"),
        (Config(log=Log(group="sweep")), {"log.group"}, {"log.trackers"}, "noted"),
        (Config(log=Log(project="mine", group="sweep", trackers=["wandb"])), set(), {"log.group"}, "accepted"),
        (Config(checkpoint=Checkpoint(keep_best=True), eval=Eval(every=0)), set(), {"checkpoint.keep_best"}, "refused"),
    ],
)
def test_what_was_written_and_does_nothing(config, file, overrides, outcome):
    if outcome == "refused":
        with pytest.raises(ConfigError, match="leave it out"):
            refuse_idle(config, IDLE, Written(file, overrides))
    else:
        assert bool(refuse_idle(config, IDLE, Written(file, overrides))) == (outcome == "noted")


@pytest.mark.parametrize(
    ("name", "matrices", "embeddings"),
    [("celo2", "celo2 0.002 0.1", "adamw 0.01 0.1"), ("muon", "muon 0.002 0.1", "adamw 0.01 0.1"),
     ("adamw", "adamw 0.002 0.1", "adamw 0.01 0.1"), ("lion", "lion 0.002 0.3", "lion 0.002 0.3")],
)  # fmt: skip
def test_the_routing_names_the_optimizer(name, matrices, embeddings):
    config = Optimizer(name=name, lr=2e-3, adamw_lr=1e-2)
    model = GPT3LMHeadModel(GPT3Config(vocab_size=16, layers=1, width=8, heads=2, context=8))
    table = routing_table(routed_groups(config, optimizer_groups(config, model))).splitlines()
    found = {line.split()[0]: " ".join(line.split()[4:7]) for line in table if " × " in line}
    assert found["model.layers.*.attn.q_proj.weight"] == matrices and found["model.embed_tokens.weight"] == embeddings
