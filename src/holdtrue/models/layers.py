"""Find a model's parts, whatever it is wrapped in."""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from holdtrue.errors import SpecError


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model (``…ForCausalLM``) inside DistributedDataParallel, torch.compile and PEFT.

    Raises:
        SpecError: there is none.
    """
    inner = peft_model(model)
    inner = _unwrap(model) if inner is None else inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise SpecError(f"expected a transformers model, got {type(inner).__name__}")
    return inner


def peft_model(model: nn.Module) -> PeftModel | None:
    """Return the PEFT model inside DistributedDataParallel and torch.compile, if there is one."""
    inner = _unwrap(model)
    return inner if isinstance(inner, PeftModel) else None


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the decoder's blocks, in order: the module list of ``num_hidden_layers`` entries.

    Raises:
        SpecError: the architecture has no such list.
    """
    inner = causal_lm(model)
    count = inner.config.get_text_config(decoder=True).num_hidden_layers
    lists = [
        (name.count("."), module)
        for name, module in inner.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise SpecError(
            f"{type(inner).__name__}: no list of {count} decoder blocks found; this architecture is not known"
        )
    return min(lists, key=lambda found: found[0])[1]


def adapted_weights(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the adapted modules' names in the base model, with the shape (d_out, d_in) of their weights."""
    shapes = {}
    for name, layer in causal_lm(model).named_modules():
        if isinstance(layer, LoraLayer):
            assert layer.out_features is not None
            assert layer.in_features is not None
            shapes[name] = (layer.out_features, layer.in_features)
    return shapes


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # the wrapper of torch.compile has no public type
            model = model._modules["_orig_mod"]  # pyright: ignore[reportAssignmentType]
        else:
            return model
