"""LoRA adapters as files, in PEFT's format.

A stranger's adapter is data: what would run code or change the base model's own weights is refused.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdtrue.errors import RunError, SpecError
from holdtrue.models.files import PICKLES, read_header, read_json
from holdtrue.models.store import new_folder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_FREE = {  # what may differ from PEFT's defaults: it only says which modules get B @ A, and how large it is
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path", "revision"),
    *("peft_type", "task_type", "peft_version", "inference_mode", "init_lora_weights"),
}


class AdapterFile(NamedTuple):
    """An adapter read from disk.

    Attributes:
        tensors: by the file's names (``base_model.model.<module>.lora_A.weight``): A is (r, d_in), B is (d_out, r).
        scaling: base-model module name -> the factor on ``B @ A``.
        config: the contents of ``adapter_config.json``.
    """

    tensors: dict[str, Tensor]
    scaling: dict[str, float]
    config: dict[str, Any]

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Return (B, A) of a module, (d_out, r) and (r, d_in), without the scaling."""
        return self.tensors[tensor_name(module, "B")], self.tensors[tensor_name(module, "A")]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return the adapted weights' (d_out, d_in) by base-model module name."""
        return {module: (self.factors(module)[0].shape[0], self.factors(module)[1].shape[1]) for module in self.scaling}


def tensor_name(module: str, side: str) -> str:
    """Return the name in a PEFT file of a module's ``A`` or ``B``."""
    return f"base_model.model.{module}.lora_{side}.weight"


def module_of(tensor: str) -> tuple[str, str] | None:
    """Return (module, side) of a tensor's name in a PEFT file; ``None`` when it is no LoRA factor."""
    match = _TENSOR.fullmatch(tensor)
    return (match["module"], match["side"]) if match else None


def read_adapter(folder: str | Path) -> AdapterFile:
    """Read a LoRA adapter's tensors onto the CPU, in the file's own dtype.

    Raises:
        SpecError: not an adapter, not plain LoRA, or not in safetensors.
        RunError: a broken or incomplete file.
    """
    folder = Path(folder)
    config, shapes = check_adapter_folder(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder / WEIGHTS}: cannot be read: {error}") from error
    return AdapterFile(tensors, {module: scaling_of(config, module) for module in shapes}, config)


def write_adapter(folder: str | Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write an adapter that ``PeftModel.from_pretrained`` loads, whole or not at all; one that is there is replaced.

    Raises:
        SpecError: the config is not plain LoRA.
        RunError: tensors and config do not fit each other, or the folder cannot be written.
    """
    folder = Path(folder)
    try:
        with new_folder(folder) as temporary:
            # Two names over one storage are refused by safetensors, and a projection may return a view.
            ready = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
            save_file(ready, temporary / WEIGHTS, metadata={"format": "pt"})
            targets = config.get("target_modules")
            # PEFT writes a set in the order of the process's hashes; the same adapter must have the same bytes.
            named = {**config, "target_modules": sorted(targets)} if isinstance(targets, list) else config
            text = json.dumps(named, indent=2) + "\n"  # else not sorted: of two patterns the first one counts
            (temporary / CONFIG).write_text(text, encoding="utf-8")
            check_adapter_folder(temporary)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder}: the adapter cannot be written: {error}") from error


def check_adapter_folder(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """Return a safe adapter's config and its modules' (d_out, d_in), reading headers only.

    Raises:
        SpecError: not an adapter, not plain LoRA, or not in safetensors.
        RunError: a broken or incomplete file.
    """
    if not (folder / CONFIG).is_file():
        raise SpecError(f"{folder}: not an adapter: it has no {CONFIG}")
    config = read_json(folder / CONFIG)
    _check_config(folder / CONFIG, config)
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if pickles:
            raise SpecError(
                f"{folder}: only safetensors are read, and the adapter is {pickles[0]}: loading a pickle can run any "
                "code. Save it again with PEFT, which writes safetensors by default."
            )
        raise RunError(f"{folder}: {WEIGHTS} is missing")
    return config, _check_tensors(folder / WEIGHTS, config)


def scaling_of(config: dict[str, Any], module: str) -> float:
    """Return the factor on ``B @ A`` of a module: ``alpha / r``, or ``alpha / sqrt(r)`` under rsLoRA."""
    r, alpha = _rank(config, module), _matching(config, "alpha_pattern", "lora_alpha", module)
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def _rank(config: dict[str, Any], module: str) -> int:
    return _matching(config, "rank_pattern", "r", module)


def _matching(config: dict[str, Any], pattern: str, default: str, module: str) -> Any:
    # The rule of peft.utils.other.get_pattern_key: the first pattern that matches the end of the name.
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return config.get(default, 8)  # PEFT's default of both


def _check_config(path: Path, config: dict[str, Any]) -> None:
    from peft import LoraConfig

    kind = config.get("peft_type")
    if kind != "LORA":
        raise SpecError(f"{path}: peft_type is {kind!r}; only LORA is supported")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise SpecError(f"{path}: task_type is {config['task_type']!r}; only CAUSAL_LM is supported")
    if config.get("auto_mapping") is not None:
        raise SpecError(f"{path}: auto_mapping names a Python class to import; it is not followed. Remove the key.")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise SpecError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base model's weights. "
            "Convert the adapter to plain LoRA with PEFT's path_initial_model_for_weight_conversion."
        )
    defaults = LoraConfig().to_dict()
    for key, value in config.items():
        if key not in _FREE and value not in (None, False, [], {}) and value != defaults.get(key):
            shown = json.dumps(value)
            raise SpecError(f"{path}: {key} is {shown[:80]}; only plain LoRA on linear layers is supported")
    for key in ("r", "lora_alpha"):
        values = [config.get(key, 8), *_pattern(path, config, "rank_pattern" if key == "r" else "alpha_pattern")]
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
                raise RunError(f"{path}: {key} is {value!r}; it should be a number above zero")


def _pattern(path: Path, config: dict[str, Any], name: str) -> list[Any]:
    pattern = config.get(name) or {}
    try:
        for key in pattern:
            re.compile(key)
        return list(pattern.values())
    except (re.error, TypeError, AttributeError) as error:
        raise RunError(f"{path}: {name} is not a mapping from patterns to numbers: {error}") from error


def _check_tensors(path: Path, config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    sides: dict[str, dict[str, list[int]]] = {}
    for name, tensor in read_header(path).items():
        found = module_of(name)
        if found is None:
            raise SpecError(f"{path}: holds {name!r}, which is no LoRA factor of a linear layer")
        sides.setdefault(found[0], {})[found[1]] = tensor["shape"]
    if not sides:
        raise RunError(f"{path}: holds no tensors")
    shapes = {}
    for module, both in sides.items():
        r = _rank(config, module)
        a, b = both.get("A", []), both.get("B", [])
        if len(a) != 2 or len(b) != 2 or a[0] != r or b[1] != r:
            raise RunError(f"{path}: {module} should have A of ({r}, d_in) and B of (d_out, {r}); it has {a} and {b}")
        shapes[module] = (b[0], a[1])
    return shapes
