"""How can functions of Gluon be tried without a GPU?

It has no interpreter: those of numbers run as Python, with a stand-in for the language.
"""

import builtins
from types import FunctionType, SimpleNamespace

import torch
from triton.experimental.gluon import language as gl
from triton.runtime.jit import JITFunction

from triton_attention.arguments import ceil_div


class Pointer:
    """Some places of a tensor in memory."""

    def __init__(self, tensor, places=0):
        self.tensor, self.places = tensor, places

    def __add__(self, offsets):
        return Pointer(self.tensor, self.places + offsets)


def load(pointer, mask=None, other=None):
    if mask is None:
        return int(pointer.tensor[pointer.places])
    return torch.where(mask, pointer.tensor[pointer.places.clamp(max=len(pointer.tensor) - 1)], other)


def smaller(a, b):
    return min(a, b) if isinstance(a, int) else a.clamp(max=b)


def larger(a, b):
    return max(a, b) if isinstance(a, int) else a.clamp(min=b)


def choose(condition, a, b):
    return torch.where(condition, a, b) if torch.is_tensor(condition) and condition.dim() else a if condition else b


def language(program, programs=None):
    """What stands for Gluon's language in the program of this number, the one item of a list, of so many."""
    return SimpleNamespace(
        program_id=lambda axis: program[0],
        num_programs=lambda axis: programs,
        num_warps=lambda: 4,
        load=load,
        minimum=smaller,
        maximum=larger,
        where=choose,
        cdiv=ceil_div,
        static_range=range,
        arange=lambda start, end, layout: torch.arange(start, end),
        sum=lambda values, axis: int(values.sum()),
        BlockedLayout=lambda *fields: None,
        int32=torch.int32,
        int64=torch.int64,
    )


def as_python(function, stand_in, instead=None):
    """A function of Gluon as one of Python, which finds other things by the names in `instead`."""

    def converted(name, value):
        if instead and name in instead:
            return instead[name]
        if isinstance(value, JITFunction):
            return as_python(value, stand_in, instead)
        return value.value if isinstance(value, gl.constexpr) else value

    function = function.fn
    known = {
        name: converted(name, value)
        for name, value in function.__globals__.items()
        if name in function.__code__.co_names
    }
    return FunctionType(
        function.__code__, {"__builtins__": builtins, **known, "gl": stand_in}, function.__name__, function.__defaults__
    )
