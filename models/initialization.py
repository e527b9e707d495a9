"""Build a model whose parameters take no memory, and record how its architecture would initialize them.

A model is built with its parameters on the meta device and its buffers as they are. While it is built, every operation that
writes into a parameter is recorded: `nn.init.normal_`, `weight[padding_idx].zero_()`, `A_log.copy_(...)`. The recorded operations
are the parameter's recipe. A rank can replay it for some of the elements alone, and so make only what it keeps:

    model, weights = outline(lambda: build_model(size="gpt3-125m", vocab_size=50257), seed=1)
    weights.read("model.norm.weight", 0, 128)                # elements 0 to 127 of the flattened parameter

A weight depends only on the seed, the parameter's name and the place in it. So it is the same however ranks divide the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

# Private, but the only way to see what an initialization writes: the calls are made deep inside transformers and torch.
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers import initialization as of_transformers

# Operators that make a new tensor of the shape or device of another one.
LIKE = {
    f"{kind}_{what}"
    for kind, what in [("new", what) for what in ("empty", "zeros", "ones", "full", "empty_strided")]
    + [(kind, "like") for kind in ("empty", "zeros", "ones", "full", "rand", "randn", "randint")]
}
CHUNK = 1 << 20  # elements that share a random generator; a rank computes at most two chunks beyond its own part

# Functions of torch.nn.init that return at once for a parameter on the meta device.
SKIPPED = ("trunc_normal_", "orthogonal_", "sparse_", "dirac_")
RANDOM = {"normal_", "uniform_", "trunc_normal_", "bernoulli_", "random_", "exponential_", "cauchy_", "log_normal_", "geometric_"}
FIXED = {"fill_", "zero_", "copy_"}
ELEMENTWISE = {
    *RANDOM, *FIXED,
    "add_", "sub_", "mul_", "div_", "neg_", "abs_", "exp_", "log_", "sqrt_", "pow_", "erfinv_",
    "clamp_", "clamp_min_", "clamp_max_",
}  # fmt: skip
TAKES_GENERATOR = {*RANDOM, "orthogonal_"}
OVERWRITING = {*RANDOM, *FIXED, *SKIPPED, "eye"}


class Weights(Protocol):
    """Where the weights of a model come from."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """The elements [start, stop) of the flattened parameter `name`. The caller may keep and change them."""


class Held:
    """The weights of a model in memory, taken away from it: its parameters are on the meta device afterwards."""

    def __init__(self, model: nn.Module, not_finite: Collection[str] = ()) -> None:
        """`not_finite`: the parameters, read from files, that have numbers that are not finite."""
        self.values: dict[str, Tensor] = {}
        self.not_finite = not_finite
        for name, p in model.named_parameters():
            self.values[name] = p.detach().reshape(-1)
            become(p, torch.empty_like(p, device="meta"))

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """The same memory, without a copy."""
        return self.values[name][start:stop]


class Place(NamedTuple):
    """A view of a parameter's memory: axes, strides and offset in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return torch.Size(self.size).numel()

    @property
    def range(self) -> tuple[int, int] | None:
        """The range [start, stop) of elements that the view is, in their order; None if it is no such range."""
        row, start = 1, self.offset
        for size, stride in zip(reversed(self.size), reversed(self.stride), strict=True):
            if size != 1 and stride != row:
                return None
            row *= size
        return start, start + self.numel


class Operation(NamedTuple):
    """A call of a torch operator that writes into a parameter: `place` says where, `arguments` are the others."""

    name: str
    function: Any
    place: Place
    arguments: tuple[Any, ...]  # a Place stands for another view of the parameter
    options: dict[str, Any]

    @property
    def in_parts(self) -> bool:
        """Whether the result is the same if the operation is done part by part."""
        return (
            self.name in ELEMENTWISE
            and self.place.range is not None
            and all(not isinstance(a, Place) and (not isinstance(a, Tensor) or self.fits(a)) for a in self.arguments)
            and not any(isinstance(option, Tensor | Place) for option in self.options.values())
        )

    def fits(self, value: Tensor) -> bool:
        """Whether `value` has the shape of the place, or a single element."""
        return value.numel() == 1 or tuple(value.shape) == self.place.size

    def call(self, target: Tensor, arguments: tuple[Any, ...], generator: torch.Generator) -> None:
        """Write into `target`."""
        options = {**self.options, "generator": generator} if self.name in TAKES_GENERATOR else self.options
        if self.name == "eye":
            self.function(*arguments, **options, out=target)
        else:
            self.function(target, *arguments, **options)


@dataclass
class Recipe:
    """What an architecture writes into one parameter of `shape`.

    `held` is the value from the constructor, until an operation overwrites all of it. `why_not` says why the recipe cannot be
    replayed; it is empty otherwise.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    held: Tensor | None
    operations: list[Operation] = field(default_factory=list)
    why_not: str = ""

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def add(self, operation: Operation, problem: str) -> None:
        """Add an operation. If it overwrites all elements, forget what came before it."""
        place = operation.place
        overlaps = any(stride == 0 and size > 1 for size, stride in zip(place.size, place.stride, strict=True))
        if operation.name in OVERWRITING and place.numel == self.numel and not overlaps:
            self.held, self.operations, self.why_not = None, [], ""
        self.operations.append(operation)
        self.why_not = self.why_not or problem

    def settle(self) -> None:
        """If the held value is one number everywhere, keep only that number."""
        if self.held is not None and self.held.is_floating_point() and self.numel > 1 and self.held.min() == self.held.max():
            place = Place((self.numel,), (1,), 0)
            fill = Operation("fill_", torch.Tensor.fill_, place, (self.held.reshape(-1)[0].item(),), {})
            self.held, self.operations = None, [fill, *self.operations]

    def part(self, start: int, stop: int, generator: Callable[[int], torch.Generator]) -> Tensor:
        """The elements [start, stop); `generator(i)` is the generator of chunk i."""
        if not all(operation.in_parts for operation in self.operations):
            return self.whole(generator(0))[start:stop].clone()
        out = torch.empty(stop - start, dtype=self.dtype)
        for first in range(start - start % CHUNK, stop, CHUNK):
            last = min(first + CHUNK, self.numel)
            here = slice(max(start, first), min(stop, last))
            inside = (here.start, here.stop) == (first, last)
            chunk = out[first - start : last - start] if inside else torch.empty(last - first, dtype=self.dtype)
            self.write(chunk, first, generator(first // CHUNK))
            if not inside:
                out[here.start - start : here.stop - start] = chunk[here.start - first : here.stop - first]
        return out

    def write(self, chunk: Tensor, first: int, generator: torch.Generator) -> None:
        """Fill `chunk`, which begins with element `first`."""
        if self.held is not None:
            chunk.copy_(self.held.reshape(-1)[first : first + len(chunk)])
        for operation in self.operations:
            begin, end = operation.place.range or (0, 0)
            low, high = max(begin, first), min(end, first + len(chunk))
            if low >= high:
                continue
            arguments = tuple(
                a.reshape(-1)[low - begin : high - begin] if isinstance(a, Tensor) and a.numel() > 1 else
                a.reshape(()) if isinstance(a, Tensor) else a
                for a in operation.arguments
            )  # fmt: skip
            operation.call(chunk[low - first : high - first], arguments, generator)

    def whole(self, generator: torch.Generator) -> Tensor:
        """All elements, where an operation needs all of them at once."""
        out = torch.empty(self.numel, dtype=self.dtype)
        if self.held is not None:
            out.copy_(self.held.reshape(-1))
        for operation in self.operations:
            arguments = tuple(out.as_strided(*a) if isinstance(a, Place) else a for a in operation.arguments)
            operation.call(out.as_strided(*operation.place), arguments, generator)
        return out


class Initialization:
    """The initial weights of an architecture, from the recipes of its parameters and a seed."""

    def __init__(self, recipes: dict[str, Recipe], seed: int) -> None:
        """`recipes` by the name of the parameter, a tied one by its first name."""
        self.recipes, self.seed = recipes, seed

    @torch.no_grad()
    def read(self, name: str, start: int, stop: int) -> Tensor:
        """The elements [start, stop) of the flattened parameter `name`. They are always computed on the CPU, and so are the same
        for every kind of device."""
        return self.recipes[name].part(start, stop, lambda chunk: generator(self.seed, name, chunk))


def generator(seed: int, name: str, chunk: int) -> torch.Generator:
    """The random generator of a chunk of a parameter."""
    digest = hashlib.sha256(f"{seed}/{name}/{chunk}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Recorder(TorchDispatchMode):
    """While it is active, new parameters of modules move to the meta device, and what is written into them is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.recipes: dict[int, Recipe] = {}
        self.storages: dict[int, Any] = {}  # kept alive, so that no other storage gets their ids
        self.moving = False  # the recorder's own tensors are the only new ones on the meta device

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Active until the end of the context."""
        handle = register_module_parameter_registration_hook(self.registered)
        places = (vars(torch.nn.init), of_transformers.TORCH_INIT_FUNCTIONS)
        originals = [{name: place[name] for name in SKIPPED} for place in places]
        try:
            for place, functions in zip(places, originals, strict=True):
                place.update({name: self.recording(name, function) for name, function in functions.items()})
            with self:
                yield
        finally:
            handle.remove()
            for place, functions in zip(places, originals, strict=True):
                place.update(functions)

    def recording(self, name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`function`, which writes into its first argument; a call with a parameter is recorded."""

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if (recipe := self.recipe_of(tensor)) is None:
                return function(tensor, *args, **kwargs)
            self.record(recipe, name, function, tensor, args, kwargs)
            return tensor

        return call

    def registered(self, module: nn.Module, name: str, p: nn.Parameter | None) -> None:
        """A module has got a parameter."""
        if p is None or p.is_meta or nn.parameter.is_lazy(p):
            return
        held = p.detach()
        self.moving = True
        become(p, torch.empty(held.shape, dtype=held.dtype, device="meta"))
        self.moving = False
        storage = p.untyped_storage()
        self.storages[id(storage)] = storage
        self.recipes[id(storage)] = Recipe(tuple(held.shape), held.dtype, held)

    def recipe_of(self, value: Any) -> Recipe | None:
        """The recipe of the parameter that `value` is or views."""
        return self.recipes.get(id(value.untyped_storage())) if isinstance(value, Tensor) and value.is_meta else None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operator, and record it if it writes into a parameter."""
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        if not self.moving and (str(kwargs.get("device")) == "meta" or (name in LIKE and args[0].is_meta)):
            kwargs = {**kwargs, "device": torch.device("cpu")}  # a value to be copied into a parameter: it needs memory
        if name == "constant_pad_nd" and self.recipe_of(args[0]) is not None and not any(args[1]):
            return args[0].detach()  # padded by nothing: some models pad a bias to the length of its weight
        target = args[0] if args and name.endswith("_") and not name.startswith("_") else kwargs.get("out")
        if isinstance(target, Tensor) and (recipe := self.recipe_of(target)) is not None:
            self.record(recipe, name, func, target, args if "out" in kwargs else args[1:], kwargs)
            return target
        return func(*args, **kwargs)

    def found(self, model: nn.Module) -> dict[str, Recipe] | None:
        """The recipe of every parameter of `model` by name; None if one cannot be replayed."""
        found = {name: self.recipe_of(p) for name, p in model.named_parameters()}
        recipes = {name: recipe for name, recipe in found.items() if recipe is not None and not recipe.why_not}
        for recipe in recipes.values():
            recipe.settle()
        return recipes if recipes.keys() == found.keys() else None

    def record(self, recipe: Recipe, name: str, func: Any, target: Tensor, args: tuple, kwargs: dict) -> None:
        """Add an operation to the recipe of its target."""
        problem, arguments = "", []
        for value in args:
            other = self.recipe_of(value)
            if other is recipe:
                value = place_of(value)
            elif any(isinstance(v, Tensor) and (v.is_meta or v is not value) for v in leaves(value)):
                problem = f"{name} reads another tensor without memory"
            elif isinstance(value, Tensor):
                value = value.detach().clone()
            arguments.append(value)
        options = {key: value for key, value in kwargs.items() if key != "out" and value is not None}
        if target.dtype != recipe.dtype or "generator" in options:
            problem = f"{name} as another dtype, or with a random generator of its own"
        if name == "sparse_" or ("out" in kwargs and name != "eye"):
            problem = f"{name} writes into it"
        recipe.add(Operation(name, func, place_of(target), tuple(arguments), options), problem)


def leaves(value: Any) -> list[Any]:
    """The entries of a list, or the value itself."""
    return list(value) if isinstance(value, list | tuple) else [value]


def place_of(view: Tensor) -> Place:
    """Where a view lies in its memory."""
    return Place(tuple(view.shape), tuple(view.stride()), int(view.storage_offset()))


def become(p: Tensor, value: Tensor) -> None:
    """Give the parameter `p` the memory of `value`. `p` stays the same object, and so do parameters tied to it."""
    new = nn.Parameter(value, requires_grad=p.requires_grad) if isinstance(p, nn.Parameter) else value
    new.__dict__.update(p.__dict__)
    torch.utils.swap_tensors(p, new)


def outline(build: Callable[[], PreTrainedModel], seed: int) -> tuple[PreTrainedModel, Weights]:
    """The model that `build` makes, with its parameters on the meta device, and the weights that its architecture gives them.

    If these cannot be recorded (an initialization that reads what it has written), the model is built in memory, and the weights
    follow from torch's own seed.

    Raises:
        Whatever `build` raises.
    """
    random = torch.get_rng_state()
    model, recorder = without_memory(build)
    recipes = recorder.found(model) if recorder is not None else None
    if recipes is not None:
        return model, Initialization(recipes, seed)
    torch.set_rng_state(random)
    model = build()
    return model, Held(model)


def without_memory(build: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel, Recorder | None]:
    """The model that `build` makes, with its parameters on the meta device, and what was recorded; None where it could not be."""
    recorder = Recorder()
    try:
        with recorder.watching():
            model = build()
        if not any(buffer.is_meta for buffer in model.buffers()):
            return model, recorder
    except Exception:  # the architecture reads its weights; what is wrong with the model itself is raised again below
        pass
    model = build()
    Held(model)
    return model, None
