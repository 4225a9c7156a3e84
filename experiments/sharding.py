"""One run's model spread over several GPUs: FSDP2 through Accelerate.

    ddp     every process holds the whole model; nothing here is needed
    fsdp2   every process holds a part of each parameter, its gradient and its optimizer state; a
            block's parameters are gathered when it is used, and let go again

Which of them is execution, not science: gradients are averaged over processes in both, losses agree
up to rounding, and checkpoints hold whole tensors by the same names, so that a run may go on with
the other, or in one process. What follows from that:

- Products run under autocast with parameters gathered in fp32, as in DDP. FSDP's own mixed
  precision would put norms and the residual stream into bf16 too. The price: autocast's bf16 copies
  of the weights live from forward to backward, 2 bytes per parameter that are not spread.
- Each micro-batch's gradient is averaged at once. Held back until the last one, as DDP does, it
  would be the whole model's gradient on every GPU.
- Parameters exist only inside the root module's forward methods, and each of those is a meeting of
  all processes: the same number of forward passes on each, in evaluation too.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn

from components.registry import UserError
from experiments import environment
from experiments.model import LanguageModel

Sharding = Literal["ddp", "fsdp2"]
DEVICES = ("cuda",)  # whose Accelerator takes up the plugin


def accelerator_for(sharding: Sharding, device: str, precision: str, **how: Any) -> Accelerator:
    """An Accelerator that spreads the model as asked.

    Raises:
        UserError: it can't be spread here.
    """
    environment.forget()  # Accelerate asks the environment before its arguments
    environment.check_ranks()
    plugin = None
    if sharding == "fsdp2":
        if device not in DEVICES:
            raise UserError(
                f"sharding: fsdp2 needs CUDA devices, and this run is on {device}; use ddp"
            )
        if precision == "fp16":
            raise UserError("sharding: fsdp2 has no loss scaling for fp16; use bf16, or ddp")
        plugin = fsdp2_plugin()
    # Accelerate remembers a plugin for the whole process, in two places; each run has its own.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    shared = PartialState._shared_state
    if shared.get("distributed_type") == DistributedType.FSDP:
        shared["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator(fsdp_plugin=plugin, **how)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if plugin is not None and not accelerator.is_fsdp2:
        raise UserError("sharding: fsdp2 needs several processes, one for each GPU; here is one")
    return accelerator


def fsdp2_plugin() -> FullyShardedDataParallelPlugin:
    """Accelerate's settings, each given, so that no variable of the environment decides."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        mixed_precision_policy=MixedPrecisionPolicy(),  # none: autocast does it
        auto_wrap_policy="transformer_based_wrap",
        cpu_offload=False,
        activation_checkpointing=False,
        cpu_ram_efficient_loading=False,  # initial values are computed alike on every process
    )


def shard(
    accelerator: Accelerator, model: LanguageModel, optimizer: torch.optim.Optimizer, compile: bool
) -> tuple[nn.Module, Any]:
    """The model, sharded in place block by block, and its optimizer over the parts.

    The model comes on the CPU, and each GPU sees one block at a time whole.

    Raises:
        UserError: a parameter has no dimension to spread it along.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    for name, parameter in model.decoder.named_parameters():
        if parameter.ndim == 0:
            raise UserError(
                f"sharding: fsdp2 can't spread the parameter {name}, a single number; give it the "
                "shape (1,), or use ddp"
            )
    blocks = model.decoder.blocks
    names = sorted({type(block).__name__ for block in blocks})
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = names
    if compile:  # each block by itself: gathering happens between them
        for block in blocks:
            block.forward = torch.compile(block.forward)
    if not isinstance(optimizer, torch.optim.Adam):  # torch fuses no other over spread parameters
        for group in optimizer.param_groups:
            group["fused"] = False
    forward = model.forward

    def autocast_forward(windows: Tensor) -> Tensor:
        with accelerator.autocast():
            return forward(windows)

    model.forward = autocast_forward  # type: ignore[method-assign]
    sharded, optimizer = accelerator.prepare(model, optimizer)
    for method in ("nats", "nats_by_target"):
        register_fsdp_forward_method(sharded, method)
    return sharded, optimizer


def whole(tree: Any, keep: bool) -> Any:
    """`tree`, a state_dict, with whole tensors on the CPU for the spread ones.

    A meeting of all processes, one tensor at a time; where `keep` is false they are let go.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(tree, DTensor):
        full = tree.full_tensor()
        return full.cpu() if keep else None
    if isinstance(tree, dict):
        return {name: whole(value, keep) for name, value in tree.items()}
    return [whole(value, keep) for value in tree] if isinstance(tree, list) else tree


def load_weights(module: nn.Module, saved: dict[str, Tensor]) -> None:
    """Puts whole weights by name into a module, spread or not."""
    own = module.state_dict()
    module.load_state_dict({name: like(own.get(name), value) for name, value in saved.items()})


def load_optimizer(optimizer: Any, saved: dict[str, Any]) -> None:
    """Puts an optimizer's whole state into one over parameters that are spread or not.

    How it is computed is not its state: an optimizer's own kernels stay.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {name: like(parameters[index], value) for name, value in values.items()}
        for index, values in saved["state"].items()
    }
    groups = [
        {**group, **{name: own[name] for name in ("fused", "foreach") if name in own}}
        for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def like(parameter: Tensor | None, value: Any) -> Any:
    """This process's part of `value` if it belongs to a parameter that is spread."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape:  # the optimizer's count of steps
        return value
    there = value.to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(there, mesh, placements, src_data_rank=None)  # each cuts its own
