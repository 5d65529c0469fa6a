from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from holdtrue.cli.main import main
from holdtrue.cli.output import stdout_kept
from holdtrue.cli.progress import ProgressView, duration
from holdtrue.evaluation import SUITES

Capture = pytest.CaptureFixture[str]
HEAVY = ("torch", "transformers", "peft", "datasets", "numpy", "scipy", "matplotlib", "pyarrow")


def imported(statement: str) -> set[str]:
    """Run a statement in a fresh interpreter and return which heavy libraries it imported."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(m for m in {HEAVY} if m in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split()) & set(HEAVY)


@pytest.mark.parametrize(
    "statement",
    [
        "import holdtrue",
        "import holdtrue; holdtrue.RunSpec, holdtrue.train, holdtrue.Run",
        "from holdtrue.cli.main import main; main(['--help'])",
        "from holdtrue.cli.main import main; main(['defenses', 'kl'])",
        "from holdtrue.cli.main import main; main(['models', '--json'])",
    ],
)
def test_light_commands_import_nothing_heavy(statement: str) -> None:
    assert imported(statement) - {"numpy"} == set()


def test_help_takes_less_than_a_second() -> None:
    best = 10.0
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "holdtrue.cli.main", "--help"], check=True, capture_output=True)
        best = min(best, time.perf_counter() - started)
    assert best < 1.0


def test_help_names_every_command(capfd: Capture) -> None:
    assert main(["--help"]) == 0
    text = capfd.readouterr().out
    for command in (
        "train",
        "resume",
        "eval",
        "compare",
        "defenses",
        "models",
        "scorers",
        "persona",
        "bench",
        "demo",
        "screen",
        "chat",
        "export",
    ):
        assert command in text
        assert main([command, "--help"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["train"],
        ["train", "no-such.yaml"],
        ["train", "no-such.yaml", "--wrong"],
        ["resume", "no-such-run"],
        ["compare"],
        ["compare", "no-such-run"],
        ["defenses", "nothing"],
        ["demo", "--quick", "--full"],
        ["scorers", "build"],
        ["scorers", "list", "no-such-folder"],
        ["eval"],
        ["chat", "no-such-model"],
        ["chat", "smollm2-135m-instruct", "--message", "Hi", "--temperature", "3"],
        ["export", "no-such-run", "--out", "x"],
        ["eval", "smollm2-135m-instruct", "--data", "x.jsonl"],
        ["eval", "smollm2-135m-instruct", "--suite", "nothing"],
    ],
)
def test_bad_usage_exits_with_2(arguments: list[str], capfd: Capture) -> None:
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err
    assert main([*arguments, "--json"]) == 2
    out, err = capfd.readouterr()
    error = json.loads(out)["error"]
    assert set(error) == {"type", "message", "exit_code"}
    assert error["exit_code"] == 2
    assert "Traceback" not in err


def test_defenses_are_listed_and_described(capfd: Capture) -> None:
    assert main(["defenses", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)["defenses"]
    assert {"kl", "ldifs", "safelora", "interleave"} <= {entry["name"] for entry in listed}
    assert main(["defenses", "kl", "--json"]) == 0
    described = json.loads(capfd.readouterr().out)
    weight = next(p for p in described["parameters"] if p["name"] == "weight")
    assert weight["default"] == 0.1
    assert all(p["meaning"] for p in described["parameters"])
    assert main(["defenses"]) == 0
    assert "safelora" in capfd.readouterr().out
    assert main(["defenses", "safelora"]) == 0
    assert "threshold" in capfd.readouterr().out
    assert main(["defenses", "kll"]) == 2
    assert "did you mean 'kl'?" in capfd.readouterr().err


def test_models_and_suites_are_listed(capfd: Capture) -> None:
    assert main(["models"]) == 0
    assert "smollm2-135m-instruct" in capfd.readouterr().out
    assert main(["eval", "--list", "--json"]) == 0
    assert [s["name"] for s in json.loads(capfd.readouterr().out)["suites"]] == list(SUITES)


def test_version(capfd: Capture) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out.startswith("holdtrue ")


def test_whatever_else_is_printed_goes_to_stderr(capfd: Capture) -> None:
    with stdout_kept(True) as write:
        print("a library")
        subprocess.run(["echo", "a child"], check=True)
        write({"a": "é"})
    out, err = capfd.readouterr()
    assert json.loads(out) == {"a": "é"}
    assert "a library" in err
    assert "a child" in err
    print("afterwards")
    assert capfd.readouterr().out == "afterwards\n"


def test_an_unexpected_error_is_one_json_document_too(
    tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import holdtrue.defenses

    def broken() -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(holdtrue.defenses, "available", broken)
    assert main(["defenses", "--json"]) == 1
    out, err = capfd.readouterr()
    assert json.loads(out)["error"]["type"] == "ZeroDivisionError"
    assert "Traceback" in err


def test_progress_without_a_terminal_is_a_line_now_and_then(capfd: Capture) -> None:
    with ProgressView() as view:
        for step in range(1, 101):
            view(
                {
                    "stage": "train",
                    "step": step,
                    "steps": 100,
                    "loss": 2.0,
                    "tokens_per_second": 70.0,
                    "seconds_left": 61,
                }
            )
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0] == "training 1/100  loss 2.000  70 tokens/s  1 min 01 s left"
    assert lines[1].startswith("training 100/100")


def test_durations_read_well() -> None:
    assert [duration(s) for s in (0.2, 12, 61, 3725)] == ["0 s", "12 s", "1 min 01 s", "1 h 02 min"]
