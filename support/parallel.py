"""Several processes that train one network together (torchrun). One process alone is rank 0 of 1."""

import contextlib
import datetime
import os

import torch
import torch.distributed as dist

from support import explained


def pick_device(name=None):
    """The device by name, else CUDA, else the CPU; with torchrun each process's own. ValueError: it cannot be used."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name is None else name
    with explained(f"--device {name} cannot be used"):
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    return device


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def joined(device):
    """For a `with` block, joins the other processes that torchrun started; the first one speaks for all."""
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))  # the first may have data to decode
            stack.callback(dist.destroy_process_group)
        if rank():
            stack.enter_context(contextlib.redirect_stdout(None))  # `print` writes nothing then
        yield


@contextlib.contextmanager
def first_process_first():
    """The first process runs the `with` block before the others, which read what it wrote. If it fails, they do too."""
    if rank():
        with explained("the first process failed"):
            dist.barrier()
    yield
    if world() > 1 and not rank():
        dist.barrier()


def share(x):
    """This process's share of the samples of a batch: (B, ...) -> (B / world, ...)."""
    return x[rank() :: world()]


def total(x):
    """The sum of a tensor over all processes, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def same_buffers(model):
    """Gives every process the first one's running statistics (BN-SNN, homeostasis), which differ after a step."""
    for buffer in model.buffers() if world() > 1 else ():
        dist.broadcast(buffer, 0)


def wrap(model):
    """The network with gradients averaged over the processes, which start alike; some parameters may be unused."""
    return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if world() > 1 else model
