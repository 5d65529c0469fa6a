from __future__ import annotations

import subprocess
import sys

import pytest

import holdtrue.models


def test_importing_models_and_resolving_a_name_loads_no_torch() -> None:
    code = (
        "import sys, holdtrue.models as m, holdtrue.errors\n"
        "m.AdapterSpec(), m.ModelSource\n"
        "try: m.resolve('smolm2')\n"
        "except holdtrue.errors.SpecError: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists() -> None:
    for name in holdtrue.models.__all__:
        assert getattr(holdtrue.models, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        holdtrue.models.nothing  # noqa: B018
