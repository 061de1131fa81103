"""AdaLoRA (Section 4.4, Table 8), by peft: `train.py --adalora` trains adapters and merges them at
the end.
"""

import importlib.util

import torch

from variants.distributed import fail


def check(args, error):
    """Call error(message) if the other arguments do not allow AdaLoRA."""
    if args.save_every or args.resume or args.compile or args.precision not in ("bf16", "fp32"):
        error(
            "--adalora takes no --save-every, --resume, --compile, fp16, bf16-true. Leave them out"
        )
    if not importlib.util.find_spec("peft"):
        error("--adalora needs peft: pip install peft==0.21.2")


def add_adapters(model, steps, seed):
    """Return the model with adapters on every nn.Linear but the LM head, with Table 8's values.

    The rank schedule, made for 12,208 steps, is scaled to `steps`. Embeddings and LM head are
    trained in full; all other weights of the source model are frozen.
    """
    from peft import AdaLoraConfig, get_peft_model

    scale = steps / 12208
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        init_r=12,
        target_r=8,
        lora_alpha=32,
        lora_dropout=0.05,
        tinit=int(1000 * scale),
        tfinal=int(8546 * scale),
        deltaT=max(1, int(20 * scale)),
        total_step=steps,
        beta1=0.85,
        beta2=0.85,
        orth_reg_weight=0.5,
    )
    torch.manual_seed(seed)
    model = get_peft_model(model, config)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.requires_grad_(True)
    return model


def penalty(model):
    """Return 0.5 times the mean of ||P P^T - I|| over the adapters' matrices (Table 8).

    peft adds this term only to a loss that it computes itself.
    """
    norms = []
    for name, p in model.named_parameters():
        if "lora_A" in name:
            gram = p @ p.T
        elif "lora_B" in name:
            gram = p.T @ p
        else:
            continue
        norms.append((gram - torch.eye(len(gram), device=gram.device)).norm())
    return 0.5 * torch.stack(norms).mean()


def merge(model, source):
    """Return (the model with adapters merged, masks of the parameters that are frozen as a whole).

    source: {parameter name: fp32 weights of the source model}. Exit with an error if a weight that
    is frozen during training moved.
    """
    masks = {}
    trained = {
        id(module.weight)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    for name, p in model.named_parameters():
        if ".lora_" in name or ".ranknum." in name or id(p) in trained:
            continue
        adapted = name.endswith(".base_layer.weight")
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if not adapted:
            masks[name] = torch.zeros(1)
        if not torch.equal(p.detach().cpu(), source[name].detach()):
            fail(f"{name} is frozen under AdaLoRA, but it changed. Please report this bug")
    return model.merge_and_unload(), masks
