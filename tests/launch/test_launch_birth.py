"""How a run's weights begin: the same bits under every strategy and on every number of processes; a rank holds what it keeps."""

import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from celo2.stack import local
from configs.schema import Config, Distributed, Train
from configs.schema import Model as ModelSection
from configs.schema import Optimizer as OptimizerConfig
from configs.schema import Run as RunSection
from launch.distributed.setup import make_accelerator, make_strategy
from launch.run import initialize
from launch.run.initialize import whole_model
from launch.run.setup import make_model
from launch.run.weights import hashes
from models.gpt2 import from_gpt2, gpt3_config

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "models"))
from tiny_models import tiny  # noqa: E402

SHARDS = SimpleNamespace(vocab_size=261)
GPT3 = {"layers": 3, "width": 30, "heads": 3, "context": 16}  # tied; sizes that no number of processes divides
# Experts in a stack, q and k norms, frozen weights, state-space constants, a padding row, weights without a gradient.
TYPES = ("qwen3_moe", "afmoe", "mamba", "opt", "bart", "gemma3")
LAYOUTS = {
    "ddp": {},
    "zero1": {"strategy": "zero1"},
    "zero2": {"strategy": "zero2"},
    "zero3": {"strategy": "zero3"},
    "fsdp2": {"strategy": "fsdp2"},
    "hsdp": {"strategy": "fsdp2", "replicas": 2},
}
SIZES = {  # shape, vocabulary: 42 and 298 million weights
    "large": ({"layers": 12, "width": 512, "heads": 8, "context": 64}, 8192),
    "300m": ({"layers": 24, "width": 960, "heads": 15, "context": 512}, 32768),
}


def config_of(model_type, layout="ddp", precision="fp32", optimizer="celo2"):
    shape = GPT3 if model_type == "gpt3" else SIZES.get(model_type, ({"context": 16}, 0))[0]
    if model_type not in ("gpt3", *SIZES):
        shape |= {"hf": tiny(model_type) | ({"pad_token_id": 1} if model_type == "opt" else {}), "layers": None, "width": None}
    return Config(
        run=RunSection(seed=7),
        model=ModelSection(**{"heads": None} | shape),
        train=Train(batch_size=12, micro_batch_size=1, precision=precision),
        optimizer=OptimizerConfig(name=optimizer),
        distributed=Distributed(**LAYOUTS[layout]),
    )


def make(config, vocabulary=SHARDS):
    torch.manual_seed(config.run.seed)
    return make_model(config, vocabulary)


def digest(model_type):
    """A hash of all weights and buffers of a model at its start, in one process."""
    made = make(config_of(model_type))
    found = hashlib.sha256()
    for name, p in made.model.named_parameters():
        found.update(name.encode() + made.weights.read(name, 0, p.numel()).numpy().tobytes())
    for name, buffer in made.model.named_buffers():
        found.update(name.encode() + buffer.float().numpy().tobytes())
    return found.hexdigest()


def spawn(world, jobs):
    """Carry out `jobs` in `world` processes. -> what the first rank found, by job."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", __file__]
    environment = {**os.environ, "JOBS": json.dumps(jobs), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("found ")).removeprefix("found "))


@pytest.mark.parametrize(
    ("world", "layouts", "types"),
    [
        (2, ("fsdp2", "zero3"), ("gpt3", "qwen3_moe", "afmoe")),
        *(
            pytest.param(world, tuple(LAYOUTS)[: None if world == 4 else -1], ("gpt3", *TYPES), marks=pytest.mark.slow)
            for world in (1, 2, 3, 4)
        ),
    ],
)
def test_the_same_weights_under_every_strategy(world, layouts, types):
    # Equal meshes of two dimensions share groups that torch remembers, so that a process makes only one of them.
    together = [["weights", name, layout] for name in types for layout in layouts if layout != "hsdp"]
    together += [["memory", "large", "fsdp2"]] if world == 2 and len(layouts) == 2 else []
    alone = [["weights", name, "hsdp"] for name in types if "hsdp" in layouts]
    jobs, found = together + alone, spawn(world, together) + [spawn(world, [job])[0] for job in alone]
    expected = {name: digest(name) for name in types}
    for job, value in zip(jobs, found, strict=True):
        if job[0] == "weights":
            assert value == expected[job[1]], job
        else:
            require_little(value, world, 60e6)


@pytest.mark.slow
def test_a_rank_of_four_never_holds_a_model_of_300_million_weights():
    """Under fsdp2: 344 MB were measured. DeepSpeed adds copies, gradients and buckets of its own."""
    (value,) = spawn(4, [["memory", "300m", "fsdp2"]])
    print(f"{value[0] / 1e6:.0f} MB at the most, of {value[1] / 1e6:.0f} MB of weights")
    require_little(value, 4, 300e6)


def require_little(value, world, more):
    """`value`: bytes of the rank with the most, of the whole model, of a block."""
    peak, whole, block = value
    assert whole > 150e6 and peak < whole / world + block + more, value


@pytest.fixture
def accelerator():
    """One process that computes in bfloat16; the process group that sharding makes goes with it."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of a test before this one
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def note_dtypes(name, dtypes, module, *_):
    dtypes.update({f"{name}.{key}": p.dtype for key, p in module.named_parameters(recurse=False)})


# Norms of queries and keys and behind attention; lists of parts in a block; stock transposed maps; bare state-space constants.
@pytest.mark.parametrize("model_type", ["qwen3", "olmo2", "gemma3", "longcat_flash", "gpt2", "mamba"])
def test_under_bf16_only_linear_maps_are_halved(model_type, accelerator):
    """Loss and gradients under fsdp2 are those of ddp, where autocast alone rounds. Measured: the same bits but for 1e-8."""
    tokens = torch.randint(0, 200, (2, 17), generator=torch.Generator().manual_seed(0))
    found = {}
    for layout in ("ddp", "fsdp2"):
        config = config_of(model_type, layout, "bf16", "adamw")
        made = make(config)
        strategy = make_strategy(config, accelerator, made.model, made.weights)
        dtypes = {}
        for name, module in made.model.named_modules():
            module.register_forward_hook(partial(note_dtypes, name, dtypes))
        loss = strategy.backward([(tokens[:, :-1], tokens[:, 1:])], 32, lambda i: i)
        gradients = {name: local(p.grad).flatten() for name, p in made.model.named_parameters() if p.grad is not None}
        found[layout] = loss.item(), gradients
    (loss, gradients), (sharded_loss, sharded) = found["ddp"], found["fsdp2"]
    assert sharded_loss == pytest.approx(loss, rel=1e-6) and gradients.keys() == sharded.keys()
    assert all(torch.allclose(sharded[name], g, rtol=0, atol=1e-5 * g.abs().max().item()) for name, g in gradients.items())
    halved = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    linear = {f"{name}.weight" for name, m in made.model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    assert halved <= linear | {name.replace(".weight", ".bias") for name in linear}
    assert bool(halved) == (model_type != "mamba")


def test_files_are_read_by_slice_unless_they_hold_other_tensors(tmp_path, monkeypatch):
    """A stock GPT-2 as it is, as a GPT-3 and without its prefix; experts that transformers stacks go through it."""
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=8, n_embd=16, n_layer=2, n_head=2))
    stock.save_pretrained(tmp_path / "stock")
    stock.transformer.save_pretrained(tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings | {"architectures": ["GPT2LMHeadModel"]}))
    experts = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny("qwen3_moe"), vocab_size=64))
    experts.save_pretrained(tmp_path / "experts")
    whole = []
    monkeypatch.setattr(initialize, "whole_model", lambda *args: whole.append(args) or whole_model(*args))
    with torch.no_grad():
        for folder, hf, expected in (
            ("stock", {"model_type": "gpt2"}, stock),
            ("stock", None, from_gpt2(stock, gpt3_config(stock.config, 0.0))),
            ("base", {"model_type": "gpt2"}, stock),
            ("experts", {"model_type": "qwen3_moe"}, experts),
        ):
            source = initialize.find_source(str(tmp_path / folder))
            config = initialize.architecture(ModelSection(hf=hf, layers=None, width=None, heads=None, context=None), source, 64)
            model, weights, line = initialize.load_source(source, config, False)
            assert all(p.is_meta for p in model.parameters()) and f"{model.num_parameters():,} in float32" in line
            for name, p in expected.named_parameters():
                value = weights.read(name, 0, p.numel())
                assert torch.equal(value.view(p.shape), p), (folder, name)
                assert torch.equal(weights.read(name, p.numel() // 3, p.numel()), value[p.numel() // 3 :])
            assert len(whole) == (folder == "experts"), folder


def test_long_work_before_the_first_step_is_told(tmp_path):
    """The weights of a large model take minutes to make, read or hash, in which no mark is set."""
    for model_type, least in (("gpt3", 0), ("gemma3", 1)):  # the loss of a stock architecture is compared on its weights
        told = []
        made = make_model(config_of(model_type), SHARDS, progress=lambda told=told: told.append(0))
        assert len(told) >= least
        before = len(told)
        names = [name for name, _ in made.model.named_parameters()]
        for name in names:
            made.weights.read(name, 0, 1)
        assert len(told) == before + len(names)
    (tmp_path / "file").write_bytes(bytes(10))
    hashes([tmp_path / "file"] * 3, progress=lambda: told.append(1))
    assert told.count(1) == 3


def memory_now():
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return [int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM")]


def carry_out(what, model_type, layout, accelerator):
    """One job on this rank."""
    from celo2.distributed.collectives import gather_objects

    config = config_of(model_type, layout, optimizer="adamw" if what == "memory" else "celo2")
    if what == "memory":
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, _ = memory_now()
    made = make(config, SimpleNamespace(vocab_size=SIZES[model_type][1]) if what == "memory" else SHARDS)
    shapes = {name: tuple(p.shape) for name, p in made.model.named_parameters()}
    whole = sum(4 * p.numel() for p in made.model.parameters())
    strategy = make_strategy(config, accelerator, made.model, made.weights)
    if what == "memory":
        peak = memory_now()[1] - before
        peaks = gather_objects(peak, torch.distributed.group.WORLD)
        return max(peaks), whole, 4 * 12 * SIZES[model_type][0]["width"] ** 2
    found = hashlib.sha256()
    frozen = {name: strategy.buffers[name] for name in shapes.keys() - strategy.shards.keys()}
    for name in shapes:
        if name in frozen:
            value = frozen[name].flatten()
        else:
            shard = strategy.shards[name]
            value = made.weights.read(name, 0, torch.Size(shapes[name]).numel())
            here = slice(shard.local_shard.start, shard.local_shard.stop)
            assert torch.equal(shard.weight.detach().flatten(), value[here]), (name, model_type, layout)
        found.update(name.encode() + value.numpy().tobytes())
    for name, buffer in made.model.named_buffers():
        if name not in frozen:
            found.update(name.encode() + buffer.float().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    from launch.private import leave

    torch.set_num_threads(1)
    accelerator = make_accelerator(Config(train=Train(batch_size=12)))
    results = [carry_out(*job, accelerator) for job in json.loads(os.environ["JOBS"])]
    if accelerator.is_main_process:
        print("found " + json.dumps(results), flush=True)
    accelerator.wait_for_everyone()
    AcceleratorState._reset_state(reset_partial_state=True)
    leave(0)
