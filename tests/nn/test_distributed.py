"""DistributedDataParallel over two processes gives the gradients of one process on the joined batch."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hyperfast.nn import Hypernetwork, hypernetize


def build() -> Hypernetwork:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
    return hypernetize(model, hidden=(4, 8), condition="per_layer")


def batch() -> torch.Tensor:
    return torch.arange(24.0).view(8, 3).sin()


def work(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    student = build()
    if rank:  # DistributedDataParallel hands out the weights of rank 0
        nn.init.zeros_(student.head.weight)
    parallel = DistributedDataParallel(student)
    parallel(batch().chunk(2)[rank]).square().mean().backward()
    torch.save({name: parameter.grad for name, parameter in student.named_parameters()}, f"{directory}/{rank}.pt")
    dist.barrier()  # one that leaves early takes the other's connection down
    dist.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    student = build()
    student(batch()).square().mean().backward()
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        gradients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert any(name.startswith("condition") for name in gradients)
        for name, parameter in student.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-7)
