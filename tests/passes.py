"Calls in threads and inside passes, and what a pass may leave behind."

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from vermouth import core, hooks


def same(a, b):
    a, b = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (a, b))
    return len(a) == len(b) and all(map(torch.equal, a, b))


def state(*models):
    "Hooks, processors and compiled calls of all modules, and what belongs to the whole process."
    modules = [module for model in models for module in model.modules()]
    return (
        [(dict(m._forward_hooks), dict(m._forward_pre_hooks), id(getattr(m, "processor", None))) for m in modules],
        [backend.fp32_precision for backend in core._BACKENDS],
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        [model.training for model in models],
        dict(core._users),
        [passes for passes in hooks._passes.values() if passes],
    )


def in_threads(calls, threads=8):
    "The results of calls, or the errors, in order; the threads start together."
    ready, count = threading.Barrier(threads, timeout=60), torch.get_num_threads()

    def run(call):
        torch.set_num_threads(count)  # which a thread does not take over from the one that starts it
        try:
            return call()
        except Exception as e:
            return e

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: ready.wait(), range(threads)))
        return list(pool.map(run, calls))


def once(module, action):
    "Call an action after the next pass of a module; returns the hook, and a list for the action's result."

    def call(*_):
        handle.remove()
        results.append(action())

    results, handle = [], module.register_forward_hook(call)
    return handle, results
