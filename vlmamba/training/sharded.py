"""FSDP from one copy of the weights: the main process reads them, the others receive their shards.

The others make the model in memory that nobody writes to, which takes none, and read no weights.
Behind `accelerator.prepare` every parameter and buffer is broadcast, one tensor at a time.
(accelerate's own way, fsdp_cpu_ram_efficient_loading, wants every entry of the state dictionary to
be sharded, which the statistics of a vision encoder's batch norms are not.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    parse_flag_from_env,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor

Started = tuple[VLMambaForConditionalGeneration, VLMambaProcessor]
FROM_MAIN = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def shard_on_cpus(accelerator: Accelerator) -> None:
    """Make a run on CPUs that was launched for FSDP one; accelerate makes it DDP without a word."""
    asked = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if asked and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        for state in (accelerator.state, PartialState()):  # each is shared by all of its kind
            state.distributed_type = DistributedType.FSDP


def leave_numbers_to_autocast(accelerator: Accelerator) -> None:
    """Let weights, gradients and what blocks hand on be float32 under FSDP, as under DDP.

    accelerate has FSDP turn all of them to bfloat16 where mixed precision is, besides autocast: the
    residual between blocks, Mamba's A, the sums of gradients and the loss itself.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.mixed_precision_policy = None


def shards(accelerator: Accelerator) -> bool:
    """Whether several processes share one copy of the model."""
    return accelerator.distributed_type == DistributedType.FSDP and accelerator.num_processes > 1


def read_once(read: Callable[[], Started], accelerator: Accelerator) -> Started:
    """What `read` gives; under FSDP the main process reads, the others have no values yet."""
    if not shards(accelerator):
        return read()
    found: list[Any] = [None, None, None]
    if accelerator.is_main_process:
        model, processor = read()
        found = [model.config, model.generation_config, processor]
    config, generation_config, processor = broadcast_object_list(found)
    if not accelerator.is_main_process:
        model = empty(config)
        model.generation_config = generation_config
    return model, processor


def empty(config: Any) -> VLMambaForConditionalGeneration:
    """A float32 model whose memory has not been touched, and so is not there yet."""
    with torch.device("meta"):
        model = VLMambaForConditionalGeneration(config)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    return model


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, Any]:
    """`accelerator.prepare`; under FSDP all processes get the main one's weights and buffers."""
    if not shards(accelerator):
        return accelerator.prepare(model, optimizer)
    for parameter in model.parameters():  # FSDP shards no other layout than the plain one
        parameter.data = parameter.data.contiguous()
    whole = model.state_dict() if accelerator.is_main_process else {}
    prepared, optimizer = accelerator.prepare(model, optimizer)
    set_model_state_dict(prepared, whole, options=FROM_MAIN)
    for _, buffer in sorted(prepared.named_buffers()):  # those that no state dictionary has, too
        dist.broadcast(buffer, src=0)
    return prepared, optimizer
