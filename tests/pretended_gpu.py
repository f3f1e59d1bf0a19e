"""A GPU for machines that have none: its tensors lie in main memory, and what a GPU would refuse is refused.

It knows which tensors are on the GPU by their storage. A function that mixes them with others raises, as torch does.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
# may take a tensor from elsewhere
MOVES = {"copy_", "__setitem__", "__set__", "set_", "_has_compatible_shallow_copy_type"}
INDEXES = {"__getitem__", "index_select"}  # a GPU's tensor takes an index from the CPU
READS = {"numpy", "__array__"}


def tensors_in(*values):
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


class PretendedGpu(TorchFunctionMode):
    "While it is entered, this thread has a GPU."

    def __init__(self):
        super().__init__()
        self.storages = {}  # address → storage, which is kept, so that no other gets its address

    def has(self, x):
        return getattr(x, "_on_gpu", False) if not x.numel() else x.untyped_storage().data_ptr() in self.storages

    def device_of(self, x):
        return GPU if self.has(x) else x.device

    def put(self, x):
        if x.device == CPU and not x.numel():
            x._on_gpu = True
        elif x.device == CPU:
            self.storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    def moved(self, x, device=None, *more, **options):
        "What `to` returns: the same tensor only where device and type stay."
        if isinstance(device, Tensor):
            device, options = self.device_of(device), options | {"dtype": device.dtype}
        elif isinstance(device, torch.dtype):
            device, options = None, options | {"dtype": device}
        options |= {"dtype": more[0]} if more and isinstance(more[0], torch.dtype) else {}
        options.pop("non_blocking", None)
        here = self.has(x)
        there = here if device is None else torch.device(device).type == "cuda"
        options |= {"device": device} if device is not None and torch.device(device).type == "meta" else {}
        y = x.to(**options) if options else x
        y = y.clone() if y is x and there != here else y
        return self.put(y) if there else y

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        kwargs.pop("pin_memory", None)
        if func == Tensor.device.__get__:
            return self.device_of(args[0])
        if func == Tensor.is_cuda.__get__:
            return self.has(args[0])
        if name in ("to", "cuda", "cpu"):
            target = {"to": kwargs.pop("device", None), "cuda": GPU, "cpu": CPU}[name]
            return self.moved(args[0], *([] if target is None else [target]), *args[1:], **kwargs)
        if name == "pin_memory":
            return args[0]
        if func == Tensor.grad.__get__:
            grad = func(*args)
            return self.put(grad) if grad is not None and self.has(args[0]) else grad
        given = tensors_in(args, kwargs)
        on_gpu = [x for x in given if self.has(x)]
        if on_gpu and name in READS:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        target = kwargs.get("device")
        wanted = target is not None and torch.device(target).type == "cuda"
        if wanted:
            kwargs["device"] = CPU
        others = [x for x in given if x.ndim and not self.has(x) and x.device == CPU]
        allowed = name in MOVES or wanted or (name in INDEXES and given[0] is on_gpu[0] if on_gpu else False)
        if on_gpu and others and not allowed:
            shapes = [tuple(x.shape) for x in (on_gpu[0], others[0])]
            raise RuntimeError(f"{name}: of tensors of {shapes} the first is on the GPU and the second is not.")
        result = func(*args, **kwargs)
        if wanted or (on_gpu and target is None and name not in MOVES):
            for x in tensors_in(result):
                self.put(x)
        return result


@contextmanager
def pretended_gpu():
    "Let torch see a GPU."
    instead = {
        "mem_get_info": lambda device=None: (2**34, 2**34),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }
    with PretendedGpu(), mock.patch.multiple(torch.cuda, **instead):
        yield
