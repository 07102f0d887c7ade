"""The one rule for when a faster way may take the place of calling modules one by one.

A fast path works on the weights of several modules at once, or takes their input in parts. Whoever hangs something on
one of them expects it to be called as usual: a forward hook (Grad-CAM, feature extraction, a profiler), accelerate's
hook that brings offloaded weights, an adapter in a module's place, a parametrisation. So modules are marked when they
are built, and a fast path is for modules that are still what they were.
"""

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook


MARK = "_class_as_built"
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def mark_as_built(module: nn.Module) -> None:
    """Note of which class a module and all modules in it are."""
    for part in module.modules():
        part.__dict__[MARK] = type(part)


def is_untouched(*modules: nn.Module) -> bool:
    """Whether these modules and all in them are as built: of the same class, without hooks, and with their weights.

    A graph that is being compiled or traced takes no fast path; so there nothing is.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not _has_any_global_hook() and all(map(_is_as_built, (part for m in modules for part in m.modules())))


def _is_as_built(module: nn.Module) -> bool:
    state = module.__dict__
    return (
        state.get(MARK) is type(module)  # a parametrisation changes the class, and an adapter brings no mark
        and "forward" not in state
        and not any(state[hooks] for hooks in HOOKS)
        and not any(weight is not None and weight.is_meta for weight in state["_parameters"].values())
    )
