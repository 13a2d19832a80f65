"""Fine-tune a small decoder on several GPUs: sharded or copied, anchored, opened layer by layer, saved and resumed.

.. code-block:: sh

    torchrun --nproc-per-node 2 examples/several_gpus.py --cpu
    torchrun --nproc-per-node 8 examples/several_gpus.py --unfreeze --folder runs/1

The model is made from a config, so nothing is downloaded; its first weights stand for pre-trained ones. Started again
with the same ``--folder``, also after a crash and with another number of processes, it goes on from the last
checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

import fastft
from fastft.optim import warm_up_then_decay
from fastft.retention import drift_report
from fastft.unfreeze import GradualUnfreeze, Unfreezer

ROWS, LENGTH, VOCABULARY = 16, 24, 128
"""Of a batch, over all processes."""


def main() -> None:
    options = arguments()
    if options.cpu:
        torch.set_num_threads(1)
    device = torch.device("cpu") if options.cpu else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if not options.cpu:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if options.cpu else "nccl")
    rank, world = dist.get_rank(), dist.get_world_size()

    # 1. The model, with the same weights in every process, then its wrapper.
    torch.manual_seed(0)
    model = small_decoder().to(device)
    called = wrapped(model, options.wrapper, device)

    # 2. The optimizer, with parameters as the wrapper left them. The anchor is cut as they are.
    optimizer = fastft.AdamW(
        model.named_parameters(), lr=2e-3, weight_decay=0.01, anchor="init", anchor_decay=5.0, max_grad_norm=1.0
    )
    scheduler = LambdaLR(optimizer, warm_up_then_decay(options.steps, 0.1))

    # 3. What was saved, if anything. It brings back the anchor of the first run.
    saved = load(options.folder, model, optimizer, scheduler)
    if saved is not None and rank == 0:
        left = options.steps - saved["step"]
        hint = f"{left} to go" if left > 0 else "none to go: choose another --folder, or more --steps"
        print(f"{options.folder}: found a checkpoint of step {saved['step']}, {hint}", flush=True)

    # 4. The unfreezer last, as torch.distributed.checkpoint passes over parameters that do not require grad.
    unfreezer = None
    if options.unfreeze:
        policy = GradualUnfreeze.open_by(0.5, options.steps, fastft.layers.layer_groups(called))
        mode = "requires_grad" if options.wrapper == "fsdp2" else "freeze"
        unfreezer = Unfreezer(called, optimizer, policy, mode=mode)
        if saved is not None and saved["unfreezer"] is not None:
            unfreezer.load_state_dict(saved["unfreezer"])

    for step in range(0 if saved is None else saved["step"], options.steps):
        tokens = batch(step)[rank::world].to(device)
        loss = called(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        if unfreezer is not None:
            unfreezer.step()
        optimizer.zero_grad()

        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            opened = "" if unfreezer is None else f", {len(unfreezer.open_groups)} groups open"
            print(f"step {step + 1}: loss {mean / world:.5f}, norm {optimizer.grad_norm:.5f}{opened}", flush=True)
        if (step + 1) % options.save_every == 0:
            save(options.folder, step + 1, model, optimizer, scheduler, unfreezer)

    assert optimizer.anchor is not None
    report = drift_report(model, optimizer.anchor)  # in every process: each reads its own part
    if rank == 0:
        print(report)
    dist.barrier()
    dist.destroy_process_group()
    if options.cpu:
        # DTensor's caches keep gloo's threads alive, and one that lets go of a tensor while Python ends aborts it.
        sys.stdout.flush()
        os._exit(0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrapper", choices=["fsdp2", "ddp"], default="fsdp2")
    parser.add_argument("--unfreeze", action="store_true", help="open the layers from the top down")
    parser.add_argument("--cpu", action="store_true", help="processes on the CPU, over gloo")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("several_gpus"), help="of checkpoints")
    return parser.parse_args()


def small_decoder() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def wrapped(model: LlamaForCausalLM, wrapper: str, device: torch.device) -> nn.Module:
    """The module to call in place of the model."""
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batch(step: int) -> Tensor:
    """Token ids, [ROWS, LENGTH]: sequences that count up from anywhere, the same in every process."""
    first = torch.randint(VOCABULARY, (ROWS, 1), generator=torch.Generator().manual_seed(step))
    return (first + torch.arange(LENGTH)) % VOCABULARY


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: fastft.AdamW,
    scheduler: LambdaLR,
    unfreezer: Unfreezer | None,
) -> None:
    """Write a checkpoint; it counts once its name is in the file ``last``."""
    checkpoint = folder / f"step-{step}"
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=checkpoint)
    if dist.get_rank() == 0:  # plain values, which all processes have alike
        others = {"step": step, "scheduler": scheduler.state_dict()}
        others["unfreezer"] = None if unfreezer is None else unfreezer.state_dict()
        torch.save(others, checkpoint / "others.pt")
        (folder / "new").write_text(checkpoint.name)
        (folder / "new").replace(folder / "last")
    dist.barrier()


def load(folder: Path, model: nn.Module, optimizer: fastft.AdamW, scheduler: LambdaLR) -> dict[str, Any] | None:
    """Read the last checkpoint, and return what is not in the model, the optimizer or the scheduler."""
    if not (folder / "last").exists():
        return None
    checkpoint = folder / (folder / "last").read_text()
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    others: dict[str, Any] = torch.load(checkpoint / "others.pt", weights_only=True)
    scheduler.load_state_dict(others["scheduler"])
    return others


if __name__ == "__main__":
    main()
