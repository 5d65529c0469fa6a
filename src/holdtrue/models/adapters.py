"""LoRA adapters on a base model: make, load, save, and look past."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from holdtrue.errors import NeedError, RunError, SpecError
from holdtrue.models.adapter_files import CONFIG, check_adapter_folder, read_adapter
from holdtrue.models.adapter_spec import AdapterSpec
from holdtrue.models.layers import adapted_weights, causal_lm, peft_model
from holdtrue.models.store import new_folder

logger = logging.getLogger("holdtrue.models")


def new_adapter(model: PreTrainedModel, spec: AdapterSpec, *, seed: int) -> PeftModel:
    """Put an adapter on ``model``, in place: that of ``spec.start``, or A random and B zero, which changes no output.

    The numbers depend on ``seed`` alone, and torch's own generators are left as they were.

    Raises:
        SpecError: no module has a name that ``target_modules`` asks for, the model has an adapter already, or the
            adapter to go on from is of another shape.
        RunError: the files of the adapter to go on from are broken.
    """
    _refuse_adapted(model)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        use_rslora=spec.rslora,
        lora_dropout=spec.dropout,
        target_modules=spec.target_modules,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )
    with torch.random.fork_rng(devices=_gpus(model)):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config, revision=getattr(model.config, "_commit_hash", None))
        except ValueError as error:
            raise SpecError(f"adapter.target_modules {spec.target_modules!r}: {error}") from error
    assert isinstance(adapted, PeftModel)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and not isinstance(layer.get_base_layer(), nn.Linear):
            kind = type(layer.get_base_layer()).__name__
            raise SpecError(f"adapter.target_modules: {name} is a {kind}; only linear layers can be adapted")
    if spec.start is not None:
        _fill(adapted, Path(spec.start))
    return adapted


def _fill(adapted: PeftModel, folder: Path) -> None:
    saved = read_adapter(folder)
    layers = causal_lm(adapted).named_modules()
    here = {name: layer.scaling["default"] for name, layer in layers if isinstance(layer, LoraLayer)}
    mine = get_peft_model_state_dict(adapted)
    shapes = ({n: tuple(t.shape) for n, t in tensors.items()} for tensors in (mine, saved.tensors))
    if here != saved.scaling or next(shapes) != next(shapes):
        raise SpecError(
            f"adapter.start {folder}: its rank, factor or modules are not those of the spec; give adapter.r, alpha, "
            f"rslora and target_modules as {CONFIG} there has them"
        )
    set_peft_model_state_dict(adapted, saved.tensors)


def load_adapter(model: PreTrainedModel, folder: str | Path, *, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on ``model``, in place. Only safetensors and plain LoRA are read.

    Raises:
        SpecError: not an adapter, not LoRA, or one that asks for code or for a changed base.
        RunError: broken files, or an adapter that was trained on a model of another shape.
    """
    _refuse_adapted(model)
    folder = Path(folder)
    adapter = read_adapter(folder)
    _check_fit(model, folder, adapter.shapes())
    base = adapter.config.get("base_model_name_or_path")
    if base and base != model.name_or_path:
        logger.warning("%s was trained on %s and is put on %s", folder, base, model.name_or_path)
    try:
        adapted = PeftModel.from_pretrained(
            model, str(folder), is_trainable=trainable, torch_device=str(model.device), local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise RunError(f"{folder}: the adapter cannot be put on {model.name_or_path}: {error}") from error
    left = sorted(set(adapted_weights(adapted)) ^ set(adapter.scaling))
    if left:
        raise RunError(
            f"{folder}: config and tensors disagree on what is adapted, {left[0]} first. Write the adapter again."
        )
    adapted.eval()
    return adapted


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter in PEFT's format, whole or not at all; an adapter that is there is replaced.

    Raises:
        NeedError: the model has no adapter.
        RunError: the folder cannot be written.
    """
    adapted = _require(model)
    folder = Path(folder)
    try:
        with new_folder(folder) as temporary:
            adapted.save_pretrained(str(temporary), save_embedding_layers=False)
            check_adapter_folder(temporary)
    except OSError as error:
        raise RunError(f"{folder}: the adapter cannot be written: {error}") from error


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The frozen reference: adapter off, eval mode, no gradient; afterwards everything is as it was.

    Each module's training flag comes back, and no parameter's ``requires_grad`` is touched.

    Raises:
        NeedError: the model has no adapter, so there is no reference in it.
    """
    adapted = _require(model)
    training: list[nn.Module] = []
    enabled: list[BaseTunerLayer | AuxiliaryTrainingWrapper] = []
    try:
        # PEFT's own switch, disable_adapter(), makes frozen adapter parameters trainable on the way back, and takes
        # a tenth of a second for 210 layers, at each step; this is the flag that it sets.
        for module in adapted.modules():
            if module.training:
                training.append(module)
                module.training = False
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not module.disable_adapters:
                enabled.append(module)
                module._disable_adapters = True
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for layer in enabled:
            layer._disable_adapters = False


def _require(model: nn.Module) -> PeftModel:
    adapted = peft_model(model)
    # A PEFT model by prompts has no layers to switch off: its "reference" would be the policy itself.
    if adapted is None or not any(isinstance(module, BaseTunerLayer) for module in adapted.modules()):
        raise NeedError(
            f"{type(model).__name__} has no adapter that can be switched off: the reference is the model with its "
            "adapter off. Put one on with new_adapter; full fine-tuning is not supported yet."
        )
    return adapted


def _refuse_adapted(model: nn.Module) -> None:
    if peft_model(model) is not None or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise SpecError("the model has an adapter already; load it afresh")


def _check_fit(model: PreTrainedModel, folder: Path, shapes: dict[str, tuple[int, int]]) -> None:
    modules, base = dict(model.named_modules()), model.name_or_path or type(model).__name__
    for name, shape in shapes.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, torch.Tensor):
            raise RunError(f"{folder}: adapts {name}, which {base} does not have: another base model")
        if tuple(weight.shape) != shape:
            raise RunError(
                f"{folder}: adapts {name} of shape {shape}, but in {base} it has {tuple(weight.shape)}: "
                "another base model"
            )


def _gpus(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
