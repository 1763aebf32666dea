"""How is a plan run again where nothing but addresses has changed?

A plan follows from the layouts of its tensors. So of one whose layouts come again a **recipe** is kept: what to
allocate, and for each launch which argument is at which place of which tensor. PyTorch gives freed memory out again, so
addresses come again, too, if not always together: what Triton makes of each argument is kept by its own address.

What is kept are shapes, offsets and addresses, a bounded number of each: no memory of a tensor stays alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.driver import driver

from triton_attention import kernel
from triton_attention.kernel import Launch
from triton_attention.ready import is_watched, ready

Plan = TypeVar("Plan", bound=tuple[Any, ...])  # a NamedTuple of results, launches that fill them, and inputs
Value = TypeVar("Value")

_MAX_LAYOUTS = 4096  # that are remembered
_MAX_ARGUMENTS = 32768
_SCRATCH_ALIGNMENT = 256  # bytes; what PyTorch allocates starts at multiples of more


def run(key: object, make: Callable[..., Plan | None], inputs: tuple[Tensor | None, ...]) -> Plan | None:
    """Launch what `make(*inputs)` plans on the current device and stream. Returns the plan; in one that is run by its
    recipe, results and inputs are as ever, and launches are None.

    `key` stands for `make` and for everything about the inputs but their addresses, of which it has the remainder
    modulo 16. A plan whose making computes, such as a copy of an input, is made anew each time. None if that is what
    `make` returns.
    """
    recipe = _recipes.get(key)
    if recipe is None:
        recipe = _recipes.offer(key, lambda: Recipe.of(make, inputs))
    if recipe is None or is_watched():
        plan = make(*inputs)
        for launch in _launches(plan or ()):
            kernel.run(launch)
        return plan
    result: Plan = recipe.run(inputs)
    return result


class _Kept(dict[Any, Value], Generic[Value]):
    """What was made for keys that came twice: most of those that come once never come again."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._met: dict[Any, bool] = {}  # whether something can be made

    def offer(self, key: Any, make: Callable[[], Value | None]) -> Value | None:
        """What is made for the key if it came before, and can be."""
        if key not in self._met:
            if len(self._met) >= self._limit:
                self.clear()
            self._met[key] = True
            return None
        value = make() if self._met[key] else None
        if value is None:
            self._met[key] = False
        else:
            self[key] = value
        return value

    def clear(self) -> None:
        super().clear()
        self._met.clear()


class Recipe:
    """What to allocate, how results lie in it, and the kernels with the makers of their arguments."""

    def __init__(self, plan: Any, inputs: tuple[Tensor, ...], allocations: list[_Allocation]) -> None:
        """`plan` was made with `inputs` and `allocations`, each of which has a storage of its own."""
        places = {_storage(tensor): _Place(root, 0) for root, tensor in enumerate(inputs)}
        kept = {_storage(field) for field in plan if isinstance(field, Tensor)}
        made = [_Allocation(x.tensor, x.zero) for x in allocations if _storage(x.tensor) in kept]
        for zero in (False, True):  # what is no result shares memory
            scratch, size = [x for x in allocations if x.zero == zero and _storage(x.tensor) not in kept], 0
            for x in scratch:
                places[_storage(x.tensor)] = _Place(len(inputs) + len(made), size)
                size += -(-x.tensor.untyped_storage().nbytes() // _SCRATCH_ALIGNMENT) * _SCRATCH_ALIGNMENT
            if scratch:
                made.append(_Allocation(torch.empty(size, dtype=torch.uint8, device="meta"), zero))
        places |= {_storage(x.tensor): _Place(root, 0) for root, x in enumerate(made, len(inputs))}
        roots = (*inputs, *(x.tensor for x in made))
        self._type = type(plan)
        self._allocators = [_allocator(tensor, zero, inputs) for tensor, zero in made]
        self._fields = [_view(field, roots, places) if isinstance(field, Tensor) else None for field in plan]
        self._launches = [
            _Launcher(launch, [_maker(value, roots, places) for value in _values(launch)]) for launch in _launches(plan)
        ]

    @classmethod
    def of(cls, make: Callable[..., Any], inputs: tuple[Tensor | None, ...]) -> Recipe | None:
        """The recipe of what `make(*inputs)` plans; None if that computes.

        It is made from tensors without memory, each with a storage of its own, where those of a call may share one.
        """
        stand_ins = tuple(None if tensor is None else _stand_in(tensor) for tensor in inputs)
        with _Allocations() as allocations:
            plan = make(*stand_ins)
        if plan is None or allocations.computed:
            return None
        return cls(plan, tuple(tensor for tensor in stand_ins if tensor is not None), allocations.made)

    def run(self, inputs: tuple[Tensor | None, ...]) -> Any:
        roots = [tensor for tensor in inputs if tensor is not None]
        for allocate in self._allocators:
            roots.append(allocate(roots))
        addresses = [root.data_ptr() for root in roots]
        stream = driver.active.get_current_stream(roots[0].device.index)
        for launch in self._launches:
            launch.start(addresses, stream)
        return self._type._make([None if view is None else view(roots) for view in self._fields])


class _Launcher:
    """A launch of a recipe. Its arguments are put together of what Triton made of them at the addresses of today."""

    def __init__(self, launch: Launch, makers: list[_Maker]) -> None:
        self._compiled = kernel.variant(launch)
        self._programs = launch.programs
        self._makers = makers
        self._slots: list[_Slot] = []  # of the arguments that have an address, each with those behind it that have none
        for index, maker in enumerate(makers):
            if maker.root is not None or not self._slots:
                self._slots.append(_Slot(object(), maker.root or 0, index))
        self._start: Callable[[int, list[Any]], object] | None = None

    def start(self, addresses: list[int], stream: int) -> None:
        """Launch with the roots of the recipe at these addresses."""
        items: list[Any] = []
        for name, root, _ in self._slots:
            made = _made.get((name, addresses[root]))
            if made is None:
                self._start_anew(addresses, stream)
                return
            items += made
        assert self._start is not None  # what was made, was made with it
        self._start(stream, items)

    def _start_anew(self, addresses: list[int], stream: int) -> None:
        """Launch with arguments of which some are at addresses that they never had."""
        values = tuple([maker.make(addresses) for maker in self._makers])
        prepared = ready(self._compiled, self._programs, values)
        if prepared is None:
            self._compiled[(self._programs, 1, 1)](*values, stream=stream)
            return
        self._start = prepared.start
        prepared.start(stream, [item for argument in prepared.arguments for item in argument])
        ends = [*(slot.begin for slot in self._slots[1:]), len(values)]
        if len(_made) + len(ends) > _MAX_ARGUMENTS:
            _made.clear()
        for (name, root, begin), end in zip(self._slots, ends, strict=True):
            _made[name, addresses[root]] = tuple(chain.from_iterable(prepared.arguments[begin:end]))


class _Slot(NamedTuple):
    """Arguments of a launch that follow from the address of one root."""

    name: object
    root: int
    begin: int  # which argument is the first


_recipes: _Kept[Recipe] = _Kept(_MAX_LAYOUTS)
_made: dict[tuple[object, int], tuple[Any, ...]] = {}  # of a slot at an address


def _launches(plan: tuple[Any, ...]) -> Iterator[Launch]:
    for field in plan:
        if isinstance(field, Launch):
            yield field
        elif isinstance(field, list):
            yield from field


def _values(launch: Launch) -> tuple[Any, ...]:
    return *(argument.value for argument in launch.arguments), launch.spec, launch.tile


class _Allocation(NamedTuple):
    tensor: Tensor
    zero: bool


class _Allocations(TorchDispatchMode):
    """Notes what is allocated while it is entered, and whether anything is computed."""

    _EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
    _ZERO = ("zeros", "zeros_like", "new_zeros")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[_Allocation] = []
        self.computed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if (name in self._EMPTY or name in self._ZERO) and result.is_contiguous():
            self.made.append(_Allocation(result, name in self._ZERO))
        elif not func.is_view:
            self.computed = True
        return result


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor of the same layout and alignment without memory."""
    offset = tensor.data_ptr() % 16 // tensor.element_size()
    shape, strides = tensor.shape, tensor.stride()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return torch.empty(offset + extent, dtype=tensor.dtype, device="meta").as_strided(shape, strides, offset)


class _Place(NamedTuple):
    """Where a storage lies in the tensors of a call."""

    root: int
    offset: int  # bytes


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _locate(tensor: Tensor, roots: tuple[Tensor, ...], places: dict[int, _Place]) -> _Place:
    """Where the first element of a tensor lies: how many bytes from that of a root."""
    root, offset = places[_storage(tensor)]
    begin = roots[root].storage_offset() * roots[root].element_size()
    return _Place(root, offset + int(tensor.storage_offset()) * tensor.element_size() - int(begin))


def _view(tensor: Tensor, roots: tuple[Tensor, ...], places: dict[int, _Place]) -> Callable[[list[Tensor]], Tensor]:
    """What makes of the tensors of a call the one that lies in them as `tensor` does in `roots`."""
    root, offset = _locate(tensor, roots, places)
    shape, strides, steps = tensor.shape, tensor.stride(), offset // tensor.element_size()
    if (shape, strides, steps) == (roots[root].shape, roots[root].stride(), 0):
        return lambda others: others[root]
    return lambda others: others[root].as_strided(shape, strides, others[root].storage_offset() + steps)


def _allocator(tensor: Tensor, zero: bool, inputs: tuple[Tensor, ...]) -> Callable[[list[Tensor]], Tensor]:
    """What allocates a tensor like this on the device of a call's first one."""
    shape, dtype = tensor.shape, tensor.dtype
    if not zero:
        for root, like in enumerate(inputs):
            if (like.shape, like.stride(), like.dtype) == (
                shape,
                tensor.stride(),
                dtype,
            ):  # half the time of the others
                return lambda roots: torch.empty_like(roots[root])
        strides = tensor.stride()
        return lambda roots: torch.empty_strided(shape, strides, dtype=dtype, device=roots[0].device)
    return lambda roots: roots[0].new_zeros(shape, dtype=dtype)


class _Address(NamedTuple):
    """Stands in a tensor descriptor for the tensor."""

    pointer: int

    def data_ptr(self) -> int:
        return self.pointer


class _Maker(NamedTuple):
    """What makes an argument of the addresses of roots."""

    root: int | None  # whose address it follows from; None: it is the same whatever they are
    make: Callable[[list[int]], Any]


def _maker(value: Any, roots: tuple[Tensor, ...], places: dict[int, _Place]) -> _Maker:
    """What makes of the addresses of other roots the argument that `value` is of these."""
    if isinstance(value, Tensor):
        root, offset = _locate(value, roots, places)
        return _Maker(root, lambda addresses: addresses[root] + offset)
    if isinstance(getattr(value, "base", None), Tensor):
        root, offset = _locate(value.base, roots, places)
        fields, kind = vars(value) | {"base": None}, type(value)

        def descriptor(addresses: list[int]) -> Any:
            made = object.__new__(kind)  # its constructor would check again what was checked
            vars(made).update(fields, base=_Address(addresses[root] + offset))
            return made

        return _Maker(root, descriptor)
    if isinstance(value, tuple) and any(isinstance(item, (Tensor, tuple)) for item in value):
        makers, kind = [_maker(item, roots, places) for item in value], type(value)._make  # type: ignore[attr-defined]
        inside = {maker.root for maker in makers} - {None}
        assert len(inside) <= 1  # else it would follow from two addresses
        return _Maker(next(iter(inside), None), lambda addresses: kind([maker.make(addresses) for maker in makers]))
    return _Maker(None, lambda addresses: value)
