"""Several processes: together they do what one process does with the joint batch, whoever has how many objects.

Two processes of the gloo back end, on the CPU, each with half of the images. Points are the same for every image, since
processes draw them in different orders otherwise.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from helpers import TINY_RESNET, labels, pixels, tiny_model


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_gloo_available(), reason="PyTorch without gloo"),
]
PROCESSES = 2
CASES = {
    "objects in every image": ((3, 1, 2, 2), {}),
    "a process without objects": ((3, 2, 0, 0), {}),
    "fewer objects than processes": ((1, 0, 0, 0), {}),
    "no objects at all": ((0, 0, 0, 0), {}),
    "more objects than queries": ((12, 1, 0, 9), {}),
    "last prediction only": ((3, 1, 0, 0), {"use_auxiliary_loss": False}),
    "frozen batch norm": ((3, 1, 0, 2), {"backbone_config": TINY_RESNET}),
    "full-length encoder": ((3, 1, 0, 2), {"encoder": "mask2former", "pixel_embedding": "conv"}),
    "interleaved encoder": ((3, 1, 0, 2), {"encoder": "lite"}),
    "no weight on no object": ((3, 1, 0, 0), {"no_object_weight": 0.0}),
}


def same_points(size: tuple[int, ...], **options: Any) -> torch.Tensor:
    """In place of `torch.rand`."""
    return torch.empty(size, **options).uniform_(generator=torch.Generator().manual_seed(3))


def batch(objects: tuple[int, ...], images: slice) -> dict[str, Any]:
    """Some of the joint batch's images, with their labels."""
    return {
        "pixel_values": pixels(len(objects))[images],
        **{name: values[images] for name, values in labels(objects).items()},
    }


def results(model: nn.Module, output: Any) -> dict[str, torch.Tensor]:
    """The loss, its terms, and the gradients of all parameters, whole if they are sharded."""
    gradients = {
        name.removeprefix("module."): getattr(parameter.grad, "full_tensor", lambda p=parameter: p.grad)()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return {"loss": output.loss.detach(), **{k: v.detach() for k, v in output.loss_dict.items()}, **gradients}


def step(model: nn.Module, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Two times forward and backward: if a gradient did not come the first time, the second forward tells."""
    for _ in range(2):
        model.zero_grad()
        output = model(**given)
        output.loss.backward()
    return results(model, output)


def sharded(model: nn.Module) -> nn.Module:
    """With the layers sharded that the model names, and what is left."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    for module in (*layers, model):
        # gloo has no mean; older versions of PyTorch do not notice, and give the sum of the gradients
        fully_shard(module, mesh=mesh).set_force_sum_reduction_for_comms(True)
    return model


WRAPPERS = {"ddp": DistributedDataParallel, "fsdp": sharded}


def run_process(rank: int, folder: str) -> None:
    """All cases in one process after the other; what came out lies in `folder`."""
    torch.set_num_threads(1)
    torch.rand = same_points
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    for case, (objects, changes) in CASES.items():
        half = len(objects) // PROCESSES
        given = batch(objects, slice(half * rank, half * (rank + 1)))
        for name, wrapper in WRAPPERS.items():
            outcome = step(wrapper(tiny_model(**changes).train()), given)
            save_file(outcome, Path(folder) / f"{name} {case} {rank}.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(run_process, (str(folder),), PROCESSES)
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_equal_one(folder, monkeypatch, wrapper, case):
    monkeypatch.setattr(torch, "rand", same_points)
    objects, changes = CASES[case]
    joint = step(tiny_model(**changes).train(), batch(objects, slice(None)))
    of_processes = [load_file(folder / f"{wrapper} {case} {rank}.safetensors") for rank in range(PROCESSES)]
    for name, expected in joint.items():
        values = torch.stack([outcome[name] for outcome in of_processes])
        if not name.startswith("loss"):
            torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)  # gradients are the mean already
        torch.testing.assert_close(values.mean(0), expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
