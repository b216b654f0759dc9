"""What tells one given object from another: its own key, or everything in it."""

import collections
import functools
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyBackbone, TinyEncoder
from torch import nn

from cacl._support.identity import UnknownError, identity


class Plain:
    """An encoder that is no module; what it does lies in plain attributes."""

    image_size, mean, std = 32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)

    def __init__(self, scale=1.0, table=None):
        self.scale, self.table = scale, {"a": np.arange(3), "b": [torch.ones(2)]} if table is None else table


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Private:
    __slots__ = ("__value",)

    def __init__(self, value):
        self.__value = value


def hooked(hook):
    net = TinyBackbone()
    net.register_forward_hook(hook)
    return net


class Extra(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return {"state": self.state}


def other(module, change):
    change(module)
    return module


def scaled(factor):
    return lambda x: factor * x


@pytest.mark.parametrize(
    ("one", "another"),
    [
        (Plain(), Plain(2.0)),
        (Plain(table={"a": np.zeros(3)}), Plain(table={"a": np.ones(3)})),
        (Plain(table=TinyEncoder()), Plain(table=other(TinyEncoder(), lambda e: e.head.weight.data.add_(1)))),
        (Plain(table={1, 2}), Plain(table={1, 3})),
        (Plain(table=re.compile("a")), Plain(table=re.compile("a", re.I))),
        (Plain(table=functools.partial(max, 1)), Plain(table=functools.partial(max, 2))),
        (Plain(table=scaled(1)), Plain(table=scaled(2))),
        (Plain(table=torch.relu), Plain(table=torch.sigmoid)),
        (lambda x: x.mean(), lambda x: x.sum()),
        (lambda x: x * 2, lambda x: x * 3),
        (Plain(table={"a": 1}.get), Plain(table={"a": 2}.get)),
        (Plain(table=random.Random(1)), Plain(table=random.Random(2))),
        (Plain(table=torch.Generator().manual_seed(1)), Plain(table=torch.Generator().manual_seed(2))),
        (Plain(table=collections.defaultdict(int)), Plain(table=collections.defaultdict(list))),
        (Plain(table=np.ma.array([1, 2], mask=[0, 1])), Plain(table=np.ma.array([1, 2], mask=[1, 0]))),
        (Plain(table=np.array([{"a": 1}], dtype=object)), Plain(table=np.array([{"a": 2}], dtype=object))),
        (Plain(table=torch.ones(2, dtype=torch.cfloat).conj()), Plain(table=2j * torch.ones(2, dtype=torch.cfloat))),
        (Private(1), Private(2)),
        (hooked(lambda m, i, o: o), hooked(lambda m, i, o: -o)),
        (Slotted(1), Slotted(2)),
        (TinyEncoder(), other(TinyEncoder(), lambda e: e.conv.weight.data.mul_(2))),
        (TinyEncoder(), other(TinyEncoder(), lambda e: setattr(e, "mean", (0.1, 0.1, 0.1)))),
        (TinyEncoder(), other(TinyEncoder(), lambda e: setattr(e, "image_size", 48))),
        (TinyEncoder(), type("TinyEncoder", (TinyEncoder,), {"std": (1.0, 1.0, 1.0), "__qualname__": "TinyEncoder"})()),
        (TinyBackbone(), other(TinyBackbone(), lambda b: setattr(b.drop, "p", 0.1))),
        (TinyBackbone(), other(TinyBackbone(), lambda b: b.register_buffer("n", torch.ones(1), persistent=False))),
        (Extra(1), Extra(2)),
        (Extra({"a": [1]}), Extra({"a": [2]})),
    ],
)
def test_another_object_is_another(one, another):
    assert identity(one) != identity(another)


@pytest.mark.parametrize(
    "make",
    [
        Plain,
        TinyEncoder,
        lambda: Extra({"version": 1}),
        lambda: torch.jit.trace(TinyBackbone().eval(), torch.zeros(1, 3, 16, 16)),
        lambda: Plain(table=torch.ones(1, dtype=torch.cfloat).imag),
        lambda: nn.utils.weight_norm(nn.Linear(2, 2)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        lambda: Plain(table=threading.Lock()),
        lambda: Plain(table=(np.float32(1), torch.float16, Path("x"), None, b"x", 2j)),
    ],
)
def test_an_equal_object_is_the_same(make):
    torch.manual_seed(0)
    one = make()
    torch.manual_seed(0)
    assert identity(one) == identity(make())


def test_the_mode_and_the_device_do_not_count():
    net = TinyBackbone()
    before = identity(net)
    net.eval()
    net.compile()
    assert identity(net) == before
    net._compile_kwargs = {}  # what Lightning's torch.compile leaves
    assert identity(torch.compile(net)) == before


def test_which_parameters_learn_counts_where_they_are_trained():
    one, two = TinyBackbone(), TinyBackbone().requires_grad_(False)
    assert identity(one) == identity(two)
    assert identity(one, trained=True) != identity(two, trained=True)


def test_what_cannot_be_walked_is_unknown_and_no_crash():
    def recursive():
        return late

    assert identity(recursive) == identity(recursive)  # an empty cell
    late = 1
    thing = Plain(table={Slotted(1)})
    next(iter(thing.table)).value = thing
    with pytest.raises(UnknownError):
        identity(thing)


def test_an_object_that_holds_itself():
    one = Plain()
    one.table = [one]
    assert identity(one) == identity(one)


@pytest.mark.parametrize("hidden", [(i for i in range(3)), memoryview(b"a")])
def test_what_cannot_be_looked_into_is_said(hidden):
    with pytest.raises(UnknownError, match="`table` is of the type "):
        identity(Plain(table=hidden))


def test_an_object_may_bring_its_own_key():
    one = Plain(table=memoryview(b"a"))
    one.key = "v1"
    two = Plain(table=memoryview(b"b"))
    two.key = "v2"
    three = Plain(table=memoryview(b"c"))
    three.key = "v1"
    assert identity(one) == identity(three) != identity(two)
    assert identity([one]) == identity([three]) != identity([two])


def test_another_process_gives_the_same():
    code = "import sys; sys.path[:0] = [%r]; from test_identity import *; print(identity(Plain(table={'x', 'y'})))"
    code %= str(Path(__file__).parent)
    done = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert done[0] == done[1] == identity(Plain(table={"x", "y"})) + "\n"
