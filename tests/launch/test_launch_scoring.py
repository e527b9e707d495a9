"""Tasks over several ranks: the same scores, and the same end on all of them. Ranks are forks of this process."""

import os
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from configs.load import ConfigError
from launch.run.scoring import Scorer, Stopped, row
from models import CausalLMLoss, build_model

ROWS = [row(list(range(n)), list(range(5, 5 + m)), 64) for n, m in ((3, 4), (20, 1), (1, 1), (60, 4), (9, 9), (30, 2), (2, 2))]


class TwoRounds:
    """Asks twice, and tells everything."""

    name = "eval.tasks.two"

    def __init__(self, fails=False):
        self.fails = fails

    def __call__(self, ask):
        first = ask(ROWS)
        if self.fails:
            raise KeyError("broken")
        second = ask(ROWS[:2])
        assert torch.equal(first[:2], second) or len(ROWS) != 2
        return {f"row {i}": value for i, value in enumerate(first.flatten().tolist())}


def scorer_of(rank, world, marks, stop_after=None):
    torch.manual_seed(0)
    model = build_model(layers=1, width=32, heads=2, context=64, vocab_size=100)
    loss = CausalLMLoss(model).eval()

    def reduce(tensor, how):
        if world > 1:
            dist.all_reduce(tensor)
        return tensor

    accelerator = SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"), reduce=reduce)
    strategy = SimpleNamespace(accelerator=accelerator, loss=loss)
    stopping = lambda: stop_after is not None and marks.count("evaluation of a task") > stop_after  # noqa: E731
    return Scorer(strategy, 64, 2, 7, stopping, marks.append)


def outcome(rank, world, tasks, stop_after=None):
    marks = []
    try:
        found = scorer_of(rank, world, marks, stop_after).run_tasks(tasks)
    except (ConfigError, Stopped) as error:
        found = repr(error)
    return found, len(marks)


CASES = {"numbers": ([TwoRounds()], None), "error": ([TwoRounds(fails=True)], None), "stop": ([TwoRounds()], 1)}


def forked(world, folder):
    """The outcomes of all cases on every rank."""
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            try:
                dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
                found = {name: outcome(rank, world, tasks if rank == 0 else [], stop) for name, (tasks, stop) in CASES.items()}
                (folder / f"{world}-{rank}").write_bytes(pickle.dumps(found))
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [pickle.loads((folder / f"{world}-{rank}").read_bytes()) for rank in range(world)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks")
def test_any_number_of_ranks_gives_the_same_bits(tmp_path):
    alone = {name: outcome(0, 1, tasks, stop) for name, (tasks, stop) in CASES.items()}
    assert len(alone["numbers"][0]) == 2 * len(ROWS) and "eval.tasks.two: 'broken'" in alone["error"][0]
    assert alone["stop"][0] == "Stopped()"
    for world in (2, 3):
        ranks = forked(world, tmp_path)
        for of_rank in ranks:
            assert of_rank["numbers"][0] == alone["numbers"][0]
            assert of_rank["error"][0] == alone["error"][0]
            assert of_rank["stop"][0] == ("Stopped()" if world == 2 else of_rank["stop"][0])
        for name in CASES:  # all ranks set as many marks, and end alike
            assert len({(str(of_rank[name][0]), of_rank[name][1]) for of_rank in ranks}) == 1, name
