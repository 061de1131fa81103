"""What training takes on a GPU, in bytes. tools/plan.py prints it.

Bytes per weight for weights, gradients and moments (`t`: the trainable fraction):

    layout                masked training     compact training, a matrix with frozen columns
    bf16, fp16            4 + 4 + 8 = 16      2 + 16 t
    fp32                  4 + 4 + 8 = 16      4 + 16 t
    bf16-true             2 + 2 + 8 = 12      2 + 12 t
    bf16-true, adamw8bit  2 + 2 + 2 =  6      2 +  4 t      (the columns have no copy)

8-bit moments have a scale for each 256 values: 1/32 byte more a trainable weight. All are exact.
The masks of single weights (LoTA, elements) are not in the table: a byte for each weight.

Activations: layers of the model run on tensors without memory, and PyTorch counts what a token
keeps for the backward pass. With recomputation a token keeps the input of each layer, and one layer
whole. Logits and their gradients take 12 bytes per token and vocabulary entry. Autocast adds a bf16
copy of each matrix of the layers that are not recomputed, and of the LM head. When activations are
gone, the step of bf16-true takes 8 bytes for each weight of the largest matrix.

Several GPUs (FSDP2) share weights, gradients and moments evenly. Each also holds two gathered
layers (the second is fetched ahead), the gradients of one, and all that is outside of the layers,
with its gradients. Gradients are added up over the GPUs in fp32, which takes another copy.
"""

import functools
import json
import logging
import re

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel
from transformers.modeling_layers import GradientCheckpointingLayer

from data.models import BAD_MODEL
from variants import compact

GIB = 2**30
# What torch.cuda.get_device_properties(0).total_memory reports for such a card: more than its name
# says, because the name counts in GiB. Cards of one name differ by up to 0.5 GiB.
GPUS = {"24 GB": 23.6 * GIB, "40 GB": 39.5 * GIB, "80 GB": 79.6 * GIB, "141 GB": 139.7 * GIB}
ALLOWANCE = 1.5e9  # the CUDA context, workspaces and fragmentation
LOW = {"bf16": 2, "bf16-true": 2, "fp16": 2, "fp32": 4}  # bytes of a weight in matrix products
HIGH = {"bf16": 4, "bf16-true": 2, "fp16": 4, "fp32": 4}  # and of a weight that is trained
SAMPLE = 256  # tokens of which activations are counted


def trained_fractions(model, ratio):
    """Return {name: trainable fraction} of each nn.Linear but the LM head."""
    head = model.get_output_embeddings()
    fractions = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            fractions[f"{name}.weight"] = 1 - ratio
    return fractions


def state_bytes(sizes, precision, fractions=None, eight_bit=False):
    """Return the bytes of weights, gradients and moments; masked unless `fractions` are given.

    sizes: {name: number of weights}; fractions: {name: trainable fraction}.
    """
    moments = 2 + 1 / 32 if eight_bit else 8
    trained = 2 * HIGH[precision] + moments
    total = 0
    for name, size in sizes.items():
        if fractions and name in fractions:
            columns = trained - 2 if eight_bit else trained
            total += size * (LOW[precision] + columns * fractions[name])
        else:
            total += size * trained
    return total


@functools.cache
def kept_bytes(config, precision, ratio):
    """Return the bytes that autograd keeps of a token in a decoder layer, and outside of layers.

    config: JSON; ratio: the fraction of columns that compact training freezes, or None. Weights,
    their copies and logits are left out.
    """
    config = AutoConfig.for_model(**json.loads(config))
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    high = torch.bfloat16 if precision == "bf16-true" else torch.float32
    low = torch.float32 if precision == "fp32" else torch.bfloat16
    kept, totals = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    def total(*_):
        totals.append(sum(storage.nbytes() for storage in kept.values()))

    autocast = torch.autocast("cpu", torch.bfloat16, precision in ("bf16", "fp16"), False)
    with FakeTensorMode():
        model = AutoModel.from_config(config, dtype=high).train()
        for name, module in list(model.named_modules()):
            if isinstance(module, GradientCheckpointingLayer):
                module.register_forward_hook(total)
            if isinstance(module, nn.Linear) and ratio is not None:
                index = torch.arange(round((1 - ratio) * module.in_features))
                model.set_submodule(name, compact.CompactLinear(module, index, low, high))
            elif isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.detach().to(low))  # no copies
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        tokens = torch.zeros(SAMPLE // 4, 4, dtype=torch.long)  # short: no large attention masks
        with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=tokens, use_cache=False)
        total()
    first, second, everything = totals
    layer = second - first
    return layer / SAMPLE, (everything - 2 * layer) / SAMPLE


def is_counted(config, precisions):
    """Return whether PyTorch can run layers of such a model without memory. Experts it cannot."""
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        for precision in precisions:
            kept_bytes(config.to_json_string(use_diff=False), precision, None)
    except BAD_MODEL:
        return False
    return True


def activation_bytes(config, tokens, precision, recompute, trained, copies):
    """Return the most bytes that a micro-batch takes at once: activations, logits, temporary ones.

    trained: the trainable fraction of each matrix, or None for masked training; copies: bytes of
    autocast's copies of the layers' matrices.
    """
    text = config.to_json_string(use_diff=False)
    ratio = None if trained is None else 1 - trained
    layer, around = kept_bytes(text, precision, ratio)
    vocabulary, hidden, layers = config.vocab_size, config.hidden_size, config.num_hidden_layers
    low, high = LOW[precision], HIGH[precision]
    head = vocabulary * hidden  # weights

    # The LM head: three fp32 tensors of logits, or the gradients of its weights
    if low < high:
        logits = max((12 * tokens + 2 * hidden) * vocabulary, 6 * head)
    else:
        logits = max(12 * tokens, low * (tokens + hidden)) * vocabulary
    # Embeddings: their gradient. If they are the head, too, one from each end; only autocast's is
    # added in place
    gradients = 1
    if config.tie_word_embeddings:
        gradients = 2 if low < high else 3
    embeddings = gradients * high * head
    if not recompute:
        kept = (layers * layer + around) * tokens + copies
        return max(kept + logits, embeddings)

    # A layer that is recomputed: gradients of its largest matrix and of that matrix's input
    matrix = hidden * config.intermediate_size * (trained or 1)
    whole = layer * tokens + copies / layers + low * tokens * config.intermediate_size
    whole += (6 if low < high else low) * matrix
    if config.tie_word_embeddings:
        whole += high * head
    inputs = layers * hidden * high * tokens
    return max(inputs + around * tokens + max(whole, logits), embeddings)


def gathered_bytes(config, sizes, precision, fractions=None):
    """Return the bytes that a GPU holds of other GPUs' weights, and of gradients not yet added up.

    In compact training, the trainable columns are gathered beside their matrices.
    """
    layers = sum(size for name, size in sizes.items() if re.search(r"\.\d+\.", name))
    outside = sum(sizes.values()) - layers
    trained = gathered = layers
    for name, fraction in (fractions or {}).items():
        trained -= sizes[name] * (1 - fraction)
        gathered += sizes[name] * fraction
    inside = 2 * LOW[precision] * gathered + (LOW[precision] + 4) * trained
    return inside / config.num_hidden_layers + (2 * HIGH[precision] + 4) * outside


def bytes_per_gpu(model, precision, compact, gpus, tokens, recompute, eight_bit=False):
    """Return (bytes of weights, gradients and moments, all bytes) of one GPU.

    model: (text config, {name: number of weights}, {name: trainable fraction} if compact);
    tokens: of a micro-batch.
    """
    config, sizes, fractions = model
    copies, trained = 0, next(iter(fractions.values()))
    if not compact:
        if gpus == 1 and LOW[precision] < HIGH[precision]:  # several gather the matrices in bf16
            copies = 2 * sum(sizes[name] for name in fractions)
        fractions = trained = None
    state = state_bytes(sizes, precision, fractions, eight_bit) / gpus
    more = activation_bytes(config, tokens, precision, recompute, trained, copies)
    if precision == "bf16-true" and not eight_bit:  # activations are gone in FusedAdam's step
        more = max(more, 8 * max(sizes.values()) / gpus)
    if gpus > 1:
        more += gathered_bytes(config, sizes, precision, fractions)
    return state, state + more + ALLOWANCE
