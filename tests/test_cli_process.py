"""The command line as a process: what it imports, interrupts, and readers that stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cli_cases import keep_verbosity, run, write_checkpoint

import moe_offload
from moe_offload import cli


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "model")


_verbosity = pytest.fixture(autouse=True)(keep_verbosity)


def start(*args: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "moe_offload", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(moe_offload.__file__).parent.parent)},
        **options,
    )


def test_help_and_version_import_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys; from moe_offload import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.rstrip().endswith("set()")
    with pytest.raises(SystemExit) as stop:
        run("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"moe-offload {moe_offload.__version__}\n"
    assert run() == 0
    assert "commands:" in capsys.readouterr().out


@pytest.mark.slow
def test_a_real_process_is_quiet_and_its_interrupt_is_130(checkpoint: Path, tmp_path: Path) -> None:
    """Without a terminal there is no bar, no warning, no traceback; Ctrl-C ends at a token."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "long"))
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 100_000
    (folder / "config.json").write_text(json.dumps(config))

    args = ["generate", folder, "--prompt", "a b", "--max-new-tokens", 90_000, "--temperature", 2]
    # A shell has what it runs in the background ignore this signal, and children inherit that.
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = start(*args, "--device-budget", "100%", preexec_fn=default)
    assert process.stdout is not None
    assert process.stdout.read(1) != ""  # it writes
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "\nmoe-offload: interrupted\n"


def test_a_reader_that_stops_is_no_error() -> None:
    process = start()  # the help text
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.wait(60)
    assert (process.returncode, err) == (cli.BROKEN_PIPE, "")


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "doctor", interrupt)
    assert run("doctor") == 130
    assert capsys.readouterr().err == "\nmoe-offload: interrupted\n"
