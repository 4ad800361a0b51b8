"""--help of every launcher describes all its options, and shows a command to type."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from commands import LAUNCHER, ROOT, call, environment
from reference_times import hang_limit

SCRIPTS = sorted(path.name for path in LAUNCHER.glob("*.py") if '__name__ == "__main__"' in path.read_text())
APPENDED = {"--local_rank", "--as-rank"}  # by what starts ranks; nobody types them


def test_these_are_launchers():
    assert {"pipeline.py", "train.py", "precompute.py", "evaluate.py", "export.py", "search.py", "doctor.py", "study.py"} <= {
        *SCRIPTS
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option_and_gives_an_example(script):
    done = call(script, "--help")
    assert done.returncode == 0, done.stdout
    assert re.search(rf"^    .*launcher/{script} \S", done.stdout, re.MULTILINE), "no example"
    source = (LAUNCHER / script).read_text()
    if "command.parser(" in source:
        source += (LAUNCHER / "command.py").read_text()
    for option in set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', source)) - APPENDED:
        described = rf"^  {option}\b[^\n]*(  \S|\n {{10,}}\S)"
        assert re.search(described, done.stdout, re.MULTILINE), f"{option} is not described"


def imported_by(modules: list[str], names: set[str]) -> list[str]:
    """Which of `names` a new process has imported once it has imported `modules`."""
    program = f"import sys, {', '.join(modules)}; print(*sorted({names} & sys.modules.keys()))"
    printed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return printed.stdout.split()


def test_launchers_import_no_large_library_at_their_top():
    """They restart their process with another allocator first (distill/run/allocator.py), and would import it twice."""
    modules = [f"launcher.{path.stem}" for path in LAUNCHER.glob("*.py")]
    assert imported_by(modules, {"torch", "numpy", "transformers"}) == []


def test_a_config_is_read_without_the_libraries_that_only_some_stages_need():
    """Every process of every stage imports distill.config."""
    names = {
        "sentence_transformers",
        "deepspeed",
        "scipy.stats",
        "sklearn",
        "pandas",
        "datasets",
        "matplotlib",
        "onnx",
        "faiss",
    }
    assert imported_by(["distill.config"], names) == []


@pytest.mark.parametrize("script", ["quickstart.sh", "install.sh"])
def test_help_of_a_shell_script_starts_nothing(script, tmp_path):
    done = subprocess.run(
        ["bash", str(LAUNCHER / script), "--help"], capture_output=True, text=True, cwd=tmp_path, timeout=hang_limit()
    )
    assert done.returncode == 0 and f"bash launcher/{script}" in done.stdout and "set -e" not in done.stdout


def test_without_the_environment_the_error_names_install_sh():
    variables = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        ["/usr/bin/env", "python3", "-S", "-E", str(LAUNCHER / "pipeline.py"), "--help"],
        capture_output=True, text=True, env=variables, cwd=ROOT.parent, timeout=hang_limit(),
    )  # fmt: skip
    assert done.returncode == 2 and "run `bash launcher/install.sh` once" in done.stderr, done.stderr
