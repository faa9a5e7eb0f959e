"""What a step of pretraining needs and sends: estimates per GPU, and bytes on the wire by formula.

Tested by `pytest tests/training/test_preflight.py`. What the contrastive loss sends is measured by
`benchmarks/itc_wire_bytes.py`, the memory that it needs by `benchmarks/itc_loss_memory.py`.

Letters: n GPUs (`world_size`), m GPUs per node, g GPUs in a group, B pairs of a micro-batch, k micro-batches in a bank,
N = g * B * k pairs in a loss, E embedding, D width, I intermediate width, V vocabulary, s GPUs that share one copy of
the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from modeling_m2encoder import M2EncoderConfig, M2EncoderModel

from .bank import BankPlan
from .configs import ObjectiveConfig

_VOCABULARY_CHUNK = 256  # rows of logits at a time in `masked_language_loss`


# ---- Memory --------------------------------------------------------------------------------------------------------


def memory_estimate(
    model: M2EncoderModel,
    objective: ObjectiveConfig,
    bank: BankPlan,
    *,
    strategy: str,
    shard_size: int,
    second_shard_size: int | None,
    retain: int,
    tile: int,
    gradient_checkpointing: bool,
    itemsize: int,
    image_size: int | None = None,
    drop_patches: float = 0.0,
) -> dict[str, float]:
    """Bytes per GPU at the fullest moment of a step, part by part; an estimate.

    Master parameters, gradients and both moments are fp32, as `training.sharding` keeps them. Not in it: what the
    allocator loses to fragmentation, and CUDA's and NCCL's own memory (a few GB).

    Args:
        model: see `training.preflight.plan`.
        objective: which losses count.
        bank: the groups and batches.
        strategy: as in `training.sharding`.
        shard_size: s.
        second_shard_size: GPUs that share the parameters between forward and backward (hpz); None for the others.
        retain: micro-batches whose graphs are kept.
        tile: rows and columns of the logits at a time.
        gradient_checkpointing: see `activation_bytes`.
        itemsize: bytes of one number in the compute dtype: 2 for bf16, 4 for fp32.
        image_size, drop_patches: see `activation_bytes`.
    """
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config, b = model.config, bank.batch_per_gpu * bank.bank_steps
    cast = itemsize if itemsize < 4 else 0  # copies of the parameters in the compute dtype, where it is not fp32
    memory: dict[str, float] = {
        "parameters (fp32)": 4 * total / shard_size,
        "gradients (fp32)": 4 * trainable / shard_size,
        "optimizer moments (fp32)": 8 * trainable / shard_size,
    }
    if strategy == "ddp":
        memory["parameters cast for compute"] = float(cast * total)
    else:
        blocks = [sum(p.numel() for p in block.parameters()) for block in _blocks(model)]
        root = total - sum(blocks)
        # A block's parameters exist whole while it runs, beside those of the next, which are on their way, and of the
        # root; its gradients in the compute dtype, and in fp32 where they enter the reduce-scatter.
        memory["gathered parameters and gradients"] = float((root + max(blocks)) * (2 * itemsize + 4))
        memory["gathered parameters and gradients"] += float(max(blocks) * itemsize)
        if second_shard_size is not None:
            memory["second shards of the parameters"] = itemsize * sum(blocks) / second_shard_size
    if strategy == "hsdp" and bank.bank_steps > 1:
        memory["gradients not yet reduced (fp32)"] = 4 * trainable / shard_size
    memory["activations"] = float(
        max(retain, 1)
        * activation_bytes(
            config,
            objective,
            bank.batch_per_gpu,
            itemsize=itemsize,
            norms_in_fp32=strategy == "ddp" and itemsize == 2,
            gradient_checkpointing=gradient_checkpointing,
            image_size=image_size,
            drop_patches=drop_patches,
        )
    )
    if objective.cmlm_weight:
        # The head's gradient is summed in fp32 and kept in the compute dtype; logits of one chunk, twice.
        head = config.vocab_size * (config.hidden_size + 1)
        memory["vocabulary head"] = float(head * (4 + cast) + 2 * 4 * _VOCABULARY_CHUNK * config.vocab_size)
    width = 2 * config.projection_dim  # image beside text
    # The bank's own rows: as they came, in one piece, as the loss's leaves, and their gradients in fp32.
    memory["features, gathered and own"] = float(bank.bank_size * width * itemsize + b * width * (3 * itemsize + 4))
    rows, columns = min(tile, b), min(tile, bank.bank_size)
    memory["tiles of the loss"] = float(4 * rows * columns * 4 + 4 * (rows + columns) * config.projection_dim)
    return memory


def activation_bytes(
    config: M2EncoderConfig,
    objective: ObjectiveConfig,
    batch_size: int,
    *,
    itemsize: int = 2,
    norms_in_fp32: bool = False,
    gradient_checkpointing: bool = False,
    image_size: int | None = None,
    drop_patches: float = 0.0,
) -> int:
    """Bytes that autograd keeps of one micro-batch, between its forward and its backward.

    Counted from the layers of `modeling_m2encoder`, with fused attention (no [L, L] matrix) and without dropout. A
    pre-norm layer with sub-LN keeps, per token, 9 D: its input, both norms' outputs, query, key, value, what attention
    gave, its inner norm's output, and the second residual; and 3 I: around the activation and the inner norm. Texts
    are taken as `max_text_length` long.

    Args:
        batch_size: B.
        itemsize: bytes of one number in the compute dtype.
        norms_in_fp32: as autocast on a GPU has it (ddp): residuals and the norms' inputs are fp32 beside bf16, which
            makes 13 D and 4 I of bf16 numbers.
        gradient_checkpointing: only the layers' inputs are kept, and all of the layer that is being computed again.
        image_size: side of the images in pixels; the model's unless given.
        drop_patches: part of the patches that the contrastive pass does without.
    """
    d, i = config.hidden_size, config.intermediate_size
    patches = ((image_size or config.image_size) // config.patch_size) ** 2
    image, text = 1 + patches, config.max_text_length
    seen = 1 + round(patches * (1 - drop_patches))  # of the whole image, by the contrastive pass
    layers = config.num_hidden_layers + config.num_upper_layers
    residual = 2 if norms_in_fp32 else 1
    encoder_layer = (13 * d + 4 * i) if norms_in_fp32 else (9 * d + 3 * i)
    crossing = (8 if norms_in_fp32 else 5) * d
    # What every pass of a modality runs: the whole input, and the masked one where that loss counts.
    tokens = seen + image * bool(objective.cmim_weight) + text * (2 if objective.cmlm_weight else 1)
    decoded = image * bool(objective.cmim_weight) + text * bool(objective.cmlm_weight)
    # Cross-attention keeps its input, norm, query, result and inner norm per token; key and value per context token.
    context = text * bool(objective.cmim_weight) + seen * bool(objective.cmlm_weight)
    if config.decoder_context == "cls":
        context = bool(objective.cmim_weight) + bool(objective.cmlm_weight)
    if gradient_checkpointing:
        inputs = tokens * layers + decoded * config.num_decoder_layers
        kept = inputs * residual * d + max(image, text) * (encoder_layer + crossing * bool(decoded))
    else:
        kept = tokens * layers * encoder_layer
        kept += config.num_decoder_layers * (decoded * (encoder_layer + crossing) + context * 2 * d)
    # The embedding's output, the two final norms (input and output each), and the decoders' final norm and pixels.
    kept += (tokens * 4 + decoded * 2) * residual * d
    return batch_size * kept * itemsize


def _blocks(model: M2EncoderModel) -> list[nn.Module]:
    """The modules that `training.sharding` shards one by one; everything else belongs to the root."""
    names = set(model._no_split_modules)
    return [module for module in model.modules() if type(module).__name__ in names]


# ---- Bytes on the wire ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """What one kind of communication sends in one optimizer step, in bytes."""

    name: str
    per_gpu_inside: float
    """By each GPU to others of its node (the mean over its GPUs)."""
    per_node_between: float
    """By each node to other nodes; as much arrives."""


def itc_traffic(bank: BankPlan, projection_dim: int, gpus_per_node: int, itemsize: int) -> Traffic:
    """The contrastive loss: each GPU's features once to its group, and two fp32 numbers per pair in backward.

    2 (g - 1) B k E numbers of `itemsize` bytes and 2 (g - 1) B k of 4 bytes; measured by
    `benchmarks/itc_wire_bytes.py`.
    """
    per_pair = 2 * projection_dim * itemsize + 2 * 4
    sent = (bank.group_size - 1) * bank.batch_per_gpu * bank.bank_steps * per_pair
    return _ring(
        "ITC features and log-sum-exps", sent, bank.group_size, min(bank.group_size, gpus_per_node), gpus_per_node
    )


def parameter_traffic(
    parameters: int,
    world_size: int,
    gpus_per_node: int,
    *,
    strategy: str,
    shard_size: int,
    second_shard_size: int | None,
    bank_steps: int,
    retain: int,
    itemsize: int,
) -> tuple[Traffic, ...]:
    """Gradients and, where they are sharded, parameters; ring collectives, gradients in fp32.

    An all-gather or a reduce-scatter over r GPUs sends (r - 1) / r of the whole from each, an all-reduce twice that.
    Parameters are gathered for every forward and every backward: 2 k times, and k - retain times for the forwards that
    are run twice. Over the copies gradients are reduced once per step.
    """
    local = min(shard_size, gpus_per_node)
    gathers = 2 * bank_steps + (bank_steps - retain)
    if strategy == "ddp":
        whole = 2 * (world_size - 1) / world_size * parameters * 4
        return (_ring("gradients", whole, world_size, gpus_per_node, gpus_per_node),)
    part = (shard_size - 1) / shard_size * parameters
    traffic = []
    if second_shard_size is not None:
        # Forwards gather over the world; backwards where forward left a second set of shards.
        forward = part * itemsize * (gathers - bank_steps)
        traffic.append(_ring("parameters, forward", forward, shard_size, local, gpus_per_node))
        backward = (second_shard_size - 1) / second_shard_size * parameters * itemsize * bank_steps
        near = min(second_shard_size, gpus_per_node)
        traffic.append(_ring("parameters, backward", backward, second_shard_size, near, gpus_per_node))
    else:
        traffic.append(_ring("parameters", part * itemsize * gathers, shard_size, local, gpus_per_node))
    traffic.append(_ring("gradients, reduce-scatter", part * 4 * bank_steps, shard_size, local, gpus_per_node))
    copies = world_size // shard_size
    if copies > 1:
        sent = 2 * (copies - 1) / copies * parameters * 4 / shard_size
        beside = max(gpus_per_node // shard_size, 1)  # copies that share a node
        traffic.append(_ring("gradients, between the copies", sent, copies, beside, gpus_per_node))
    return tuple(traffic)


def _ring(name: str, sent: float, ranks: int, local: int, gpus_per_node: int) -> Traffic:
    """Traffic of ring collectives in which each of `ranks` GPUs sends `sent` bytes, `local` of them on each node.

    A ring that leaves the node does so once per node; several that share it add up.
    """
    if ranks == 1:
        return Traffic(name, 0.0, 0.0)
    if ranks <= local:
        return Traffic(name, sent, 0.0)
    return Traffic(name, sent * (local - 1) / local, sent * (gpus_per_node // local))
