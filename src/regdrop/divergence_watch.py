"""A loop of one's own is watched: a warning where R-Drop compares passes that are the same."""

import dis
import functools
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regdrop.loss import RDropOutput
from regdrop.passes import find_dropout
from regdrop.passes.keras_layers import is_keras
from regdrop.tracing import is_traced, is_transformed

# How deep in containers and objects a model is looked for.
_DEPTH = 4
# Among how many items of a container, and of all of them: every step looks anew.
_ITEMS = 100
_LOOKS = 500
# Steps of code that name a variable of the file; an import's name may be an attribute as well.
_LOADS = {"LOAD_GLOBAL", "LOAD_NAME"}
_VARIABLES = _LOADS | {"IMPORT_NAME", "IMPORT_FROM"}
# What calls others, and what holds no model.
_CALLS = (types.FunctionType, types.MethodType, functools.partial)
_LEAVES = {str, bytes, bool, int, float, Tensor, nn.Parameter, type(None), type, types.ModuleType}
_FRAMEWORKS = ("torch", "regdrop")
# A divergence that rounding may give.
_ROUNDING = 1e-6
# Steps from one look at a divergence to the next.
_STEPS_BETWEEN_LOOKS = 100
_KERAS = (
    "Keras drops only where it is told that it trains: give lambda b: model(b, training=True) "
    "instead of the model."
)


@dataclass
class _Watch:
    """What was seen of the divergence of one function from batches to outputs."""

    steps: int = 0
    zeros: int = 0
    has_warned: bool = False
    # Each tells the NLL and the divergence of a step, and None while nobody can.
    looks: list[Callable[[], list[float] | None]] = field(default_factory=list)


_WATCHES: WeakKeyDictionary[Any, _Watch] = WeakKeyDictionary()


def warn_without_dropout(model: nn.Module) -> bool:
    """Warn when no source of dropout is active in a model in training mode.

    Returns:
        Whether the warning was given.
    """
    if any(source.active for source in find_dropout(model)):
        return False
    warnings.warn(
        "R-Drop has nothing to compare: the model has no active source of dropout that could be "
        "found. Unless one is hidden in its code, all passes are the same and the KL is exactly 0 "
        "at a multiple of the cost. "
        f"{advise_dropout(model)}",
        stacklevel=2,
    )
    return True


def warn_zero_divergence(modules: Iterable[nn.Module] = ()) -> None:
    """Warn that a logged divergence of some modules was exactly 0."""
    advice = (
        "Check that the model is in training mode, that its dropout rates are above 0 "
        "(regdrop.find_dropout) and that no random state is restored between passes. In stacked "
        "passes what is drawn once per forward, such as dropped weights, is the same for all: "
        "passes='sequential' draws it for each."
    )
    warnings.warn(
        "the KL between passes is exactly 0: the passes are identical although R-Drop is on. "
        f"{_KERAS if any(map(_holds_keras, modules)) else advice}",
        stacklevel=2,
    )


def watch_divergence(forward: Callable[..., Any], output: RDropOutput) -> None:
    """Warn once where the divergence of a loop of one's own is exactly 0.

    The first two steps and every hundredth are looked at, on a CPU and on CUDA. Nobody waits for
    CUDA's numbers: the warning comes once they are there. One zero alone is no sign where the
    model's dropout is on: a new LoRA adapter gives it in its first step. Compiled code is not
    looked at.

    Args:
        forward: The function from batches to outputs, or the model; tells loops apart.
        output: What a step of several passes gave.
    """
    # Asked first: compiled code that has read a counter is compiled anew once that has changed.
    if torch.compiler.is_compiling() or is_transformed() or is_traced():
        return
    modules = list(reached_modules(forward))
    watch = _WATCHES.setdefault(_identity(forward, modules), _Watch())
    is_looked_at = watch.steps < 2 or watch.steps % _STEPS_BETWEEN_LOOKS == 0
    watch.steps += 1
    if watch.has_warned or _is_captured(output.kl):
        return
    if is_looked_at and output.kl.device.type in ("cpu", "cuda"):
        watch.looks.append(_look(output))
    while watch.looks and not watch.has_warned:
        found = watch.looks[0]()
        if found is None:
            return
        del watch.looks[0]
        nll, kl = found
        if nll == 0 or abs(kl) > _ROUNDING * max(1.0, abs(nll)):  # without a NLL nothing counts
            continue
        # The halves of a stacked batch may differ by rounding alone.
        watch.zeros += kl == 0
        watch.has_warned = _warn_of_zeros(watch.zeros, modules)


def _warn_of_zeros(count: int, modules: list[nn.Module]) -> bool:
    sources = [source for module in modules for source in find_dropout(module)]
    if modules and not any(source.active for source in sources):
        return warn_without_dropout(modules[0])
    if count > 1:
        warn_zero_divergence(modules)
    return count > 1


def _look(output: RDropOutput) -> Callable[[], list[float] | None]:
    """Return what tells both terms of a step; None while the numbers are on the way."""
    # From CUDA this goes to pinned memory, and nobody waits.
    numbers = torch.stack([output.nll, output.kl]).to("cpu", non_blocking=True)
    arrival: torch.cuda.Event | None = None
    if output.kl.is_cuda:
        arrival = torch.cuda.current_stream(output.kl.device).record_event()

    def read() -> list[float] | None:
        if arrival is not None and not arrival.query():
            return None
        found: list[float] = numbers.tolist()
        return found

    return read


def _is_captured(tensor: Tensor) -> bool:
    """Return whether a CUDA graph is being recorded, which allows no questions."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def reached_modules(forward: Callable[..., Any]) -> Iterator[nn.Module]:
    """Yield the modules that a function calls, as far as what it names, holds or is bound to tells.

    The functions and methods that it names are looked into likewise, but for those of libraries.
    """
    if isinstance(forward, nn.Module):
        yield forward
        return
    found: dict[int, nn.Module] = {}
    seen: dict[Any, Any] = {}  # holds what it knows by an id, which no other object gets then
    looks = _LOOKS
    level: list[Any] = [forward]
    for _ in range(_DEPTH):
        deeper: list[Any] = []
        for value in level:  # grows: what a function names is as near as itself
            if _key(value) in seen or not looks:
                continue
            seen[_key(value)] = value
            items = list(islice(_held_by(value), looks))
            looks -= len(items)
            held = [item for item in items if type(item) not in _LEAVES]
            found.update((id(item), item) for item in held if isinstance(item, nn.Module))
            (level if isinstance(value, _CALLS) else deeper).extend(held)
        level = deeper
    yield from found.values()


def _key(value: Any) -> Any:
    """Return what tells an object from others; a method is a new one each time it is asked for."""
    if isinstance(value, types.MethodType):
        return id(value.__self__), id(value.__func__)
    return id(value)


def _held_by(value: Any) -> Iterable[Any]:
    """Return what a function names, or what a container or an object holds.

    Of a large container, a vocabulary or a data set, the first items alone.
    """
    if isinstance(value, (tuple, list)):
        return value[:_ITEMS]
    if isinstance(value, Mapping):
        return islice(value.values(), _ITEMS)
    if isinstance(value, types.FunctionType):
        return _named_by(value)
    if isinstance(value, types.MethodType):
        owner, function = value.__self__, value.__func__
        return owner, function, *_methods(owner, _names(function).attributes)
    if isinstance(value, functools.partial):
        return *value.args, *value.keywords.values(), value.func
    if isinstance(value, (str, bytes, int, float, Tensor, nn.Module, type, types.ModuleType)):
        return ()
    return *getattr(value, "__dict__", {}).values(), *_methods(value, ["__call__"])


def _named_by(function: types.FunctionType) -> Iterator[Any]:
    """Yield what a function has as defaults, as names of its file and as those around it."""
    yield from (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    yield from vars(function).values()  # what a decorator wraps, among others
    names = _names(function)
    for named in (*_values(function.__globals__, names), *_cells(function)):
        if isinstance(named, type):
            yield from _methods(named, names.attributes)
        elif _is_foreign(named, function):  # it may call one's own, as what a decorator returns
            yield from (held for held in _cells(named) if not _is_foreign(held, function))
        else:
            yield named


def _values(space: dict[str, Any], names: "_Names") -> Iterator[Any]:
    """Yield what the names stand for in a file and in one's own modules that are named there."""
    seen = {id(space)}
    queue = [(space, names.variables)]
    for inner, own in queue:
        for value in (inner[name] for name in own if name in inner):
            yield value
            if isinstance(value, types.ModuleType) and not _is_library(value.__name__):
                queue += [] if id(vars(value)) in seen else [(vars(value), names.attributes)]
                seen.add(id(vars(value)))


def _cells(function: types.FunctionType) -> Iterator[Any]:
    """Yield the values of the variables around a function."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a name that has no value yet
            yield cell.cell_contents


class _Names(NamedTuple):
    """What a function and those inside of it name beyond their own variables."""

    variables: Sequence[str] = ()
    attributes: Sequence[str] = ()


def _names(function: Any) -> _Names:
    if not isinstance(function, types.FunctionType):
        return _Names()
    return _names_in(function.__code__)


# As many as searches of several loops look at: one that holds fewer would hold none of them.
@functools.lru_cache(maxsize=8 * _LOOKS)
def _names_in(code: types.CodeType) -> _Names:
    variables: dict[str, None] = {}
    attributes: dict[str, None] = {}
    for one in (codes := [code]):
        codes += [inner for inner in one.co_consts if isinstance(inner, types.CodeType)]
        for step in dis.get_instructions(one):
            if step.opcode in dis.hasname:
                parts = dict.fromkeys(step.argval.split("."))  # an import may name several
                variables |= parts if step.opname in _VARIABLES else {}
                attributes |= {} if step.opname in _LOADS else parts
    return _Names(tuple(variables), tuple(attributes))


def _methods(owner: Any, names: Sequence[str]) -> Iterator[types.MethodType]:
    """Yield the methods of some names of an object or a class, but for those of libraries."""
    for kind in (owner if isinstance(owner, type) else type(owner)).__mro__:
        if not _is_library(kind.__module__):
            for found in (vars(kind).get(name) for name in names):
                # One that is static, or of the class, holds its function.
                function = getattr(found, "__func__", found)
                if isinstance(function, types.FunctionType):
                    yield types.MethodType(function, owner)


def _is_foreign(value: Any, function: types.FunctionType) -> bool:
    """Return whether a value is a function of a library of which another function is no part."""
    if not isinstance(value, types.FunctionType):
        return False
    return not _is_near(value.__module__, function.__module__)


def _is_near(module: str | None, other: str | None) -> bool:
    """Return whether a module is one's own, or of the same package as another that is installed."""
    return not _is_library(module) or (
        _package(module) == _package(other) and _package(module) not in _FRAMEWORKS
    )


@functools.cache
def _is_library(module: str | None) -> bool:
    """Return whether a module is installed or Python's, rather than a file of one's own."""
    package = _package(module)
    if package in _FRAMEWORKS or package in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _identity(forward: Any, modules: list[nn.Module]) -> Any:
    """Return what stays the same from step to step where a loop writes its function anew."""
    if modules:
        return modules[0]
    while isinstance(forward, functools.partial):
        forward = forward.func
    return getattr(forward, "__code__", type(forward))


def advise_dropout(model: nn.Module) -> str:
    """Return how a model without active dropout gets some."""
    sources = find_dropout(model)
    if any(source.rate > 0 for source in sources):
        if _holds_keras(model):
            return _KERAS
        return "Its rates are above 0 but it is in evaluation mode: call model.train()."
    # With a rate of 0 an adapter has no dropout module at all, but a place for one.
    if any(hasattr(module, "lora_dropout") for module in model.modules()):
        return "Set lora_dropout above 0 in the LoraConfig (0.1 is usual)."
    if sources:
        names = ", ".join(sorted({source.name.rsplit(".", 1)[-1] for source in sources})[:4])
        return f"Raise a dropout rate, now 0, in the model's configuration ({names})."
    kind = "keras.layers" if _holds_keras(model) else "torch.nn"
    return f"Add dropout to the model, for example {kind}.Dropout(0.1) before its head."


def _holds_keras(model: nn.Module) -> bool:
    return any(is_keras(module) for module in model.modules())
