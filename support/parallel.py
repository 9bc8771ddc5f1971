"""Several processes that train one network together (torchrun). A reader of the paper may skip this file.

With one process every function here does nothing: rank 0 of 1. With more, each computes its share of every batch, and
gradients and sums are brought together.
"""

import contextlib
import datetime
import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def pick_device(name=None):
    """The device by name, or the fastest at hand: CUDA if there is one, else the CPU. Under torchrun each process's
    own.

    Raises:
        ValueError: it cannot be used.
    """
    if name is None:
        with warnings.catch_warnings(record=True) as said:  # a CUDA build without a usable driver warns
            warnings.simplefilter("always")
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if said and name == "cpu":
            print(f"no GPU can be used ({str(said[0].message).strip().partition(chr(10))[0][:200]}): the CPU is used")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from None
    return device


def rank_asked():
    """The rank that torchrun gave to this process, as text, also before it has joined the others."""
    return os.environ.get("RANK", "0")


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def joined(device):
    """For a `with` block, joins the other processes that torchrun started; the first one speaks for all."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))  # the first one may have data to decode
    with open(os.devnull, "w", encoding="utf-8", errors="replace") as nowhere:
        with contextlib.redirect_stdout(nowhere if rank() else sys.stdout):
            try:
                yield
            finally:
                dist.destroy_process_group()


@contextlib.contextmanager
def first_process_first():
    """The first process runs the `with` block before the others do, e.g. to write what they then read."""
    if rank():
        dist.barrier()
    try:
        yield
    finally:
        if world() > 1 and rank() == 0:
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
    """Gives every process the first one's running statistics (BN-SNN), which differ a little after a step."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def wrap(model):
    """The network with gradients that are averaged over the processes; every process starts from the first one's."""
    # An edited circuit may have parameters that its readout does not use.
    return DistributedDataParallel(model, find_unused_parameters=True) if world() > 1 else model
