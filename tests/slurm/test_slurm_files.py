"""The shell scripts have valid syntax, and the container definition agrees with the repository."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import ROOT

DEFINITION = ROOT / "slurm/distill.def"
SECTIONS = {"files", "post", "environment", "test", "runscript"}  # those of Apptainer's that we use


def sections() -> dict[str, str]:
    """The definition's sections, with "" for its header."""
    parts = re.split(r"^%(\w+)$", DEFINITION.read_text(), flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_container_definition_has_a_header_and_exactly_the_known_sections():
    header, *names = sections()
    keys = re.findall(r"^(\w+): \S+$", sections()[header], flags=re.MULTILINE)
    assert keys == ["Bootstrap", "From"] and set(names) == SECTIONS
    for line in sections()[header].splitlines()[2:]:
        assert not line or line.startswith("#"), line


def test_every_file_that_it_copies_is_here():
    pairs = [line.split() for line in sections()["files"].splitlines() if line.strip()]
    assert len(pairs) >= 5
    for source, target in pairs:
        assert (ROOT / source).exists() and target == f"/opt/distill/{source}"


@pytest.mark.parametrize("name", sorted(SECTIONS - {"files"}))
def test_every_section_that_is_run_is_a_script(name):
    read = subprocess.run(["sh", "-n"], input=sections()[name], capture_output=True, text=True)
    assert read.returncode == 0 and sections()[name].strip(), read.stderr


def test_the_container_installs_with_install_sh_and_puts_its_venv_on_the_path():
    installs = re.search(r"source (\S+) && install (\S+) ", sections()["post"])
    assert installs and (ROOT / Path(installs[1]).relative_to(installs[2])).exists()
    assert f"PATH={installs[2]}/.venv/bin:" in sections()["environment"]


@pytest.mark.parametrize("path", sorted([*ROOT.glob("slurm/*.sh"), *ROOT.glob("launcher/*.sh")]), ids=lambda path: path.name)
def test_a_shell_can_read_it(path):
    read = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert read.returncode == 0, read.stderr


def test_a_container_takes_the_place_of_the_virtual_environment():
    script = 'set -euo pipefail; source launcher/environment.sh; printf \'%s|\' "${python[@]}"; echo "$DISTILL_PYTHON"'
    variables = {
        "PATH": "/usr/bin:/bin",
        "DISTILL_CONTAINER": "/images/distill.sif",
        "DISTILL_CONTAINER_OPTIONS": "--nv --cleanenv",
    }
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, env=variables, check=True)
    *words, exported = done.stdout.strip().split("|")
    assert words[:4] == ["apptainer", "exec", "--nv", "--cleanenv"] and words[-2:] == ["/images/distill.sif", "python"]
    assert shlex.split(exported) == words


def test_the_words_of_a_container_stay_whole_in_a_clone_whose_path_has_a_space(tmp_path):
    clone = tmp_path / "a clone"
    clone.mkdir()
    script = f'source {ROOT}/launcher/environment.sh; echo "$DISTILL_PYTHON"'
    variables = {"PATH": "/usr/bin:/bin", "DISTILL_CONTAINER": "/images/distill.sif"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=clone, env=variables, check=True)
    assert str(clone) in shlex.split(done.stdout) and f"PYTHONPATH={clone}" in shlex.split(done.stdout)


def test_a_half_made_virtual_environment_is_made_again(tmp_path):
    """One whose installation was killed has a Python without pip; every later `pip install` is recorded here, not run."""
    root = tmp_path / "clone"
    (root / "launcher").mkdir(parents=True)
    for name in ("pyproject.toml", "launcher/constraints.txt", "launcher/install.sh"):
        shutil.copy(ROOT / name, root / name)
    (root / ".venv/bin").mkdir(parents=True)
    (root / ".venv/bin/python").write_text("#!/bin/sh\nexit 1\n")
    (root / ".venv/bin/python").chmod(0o755)
    python = tmp_path / "python3"
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        'for folder; do :; done; case "$*" in "-m venv"*) printf "#!/bin/sh\\nexit 0\\n" > "$folder/bin/python";; esac\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(root / "launcher/install.sh")],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)},
    )
    assert done.returncode == 0 and "is incomplete: it is made again" in done.stderr, done.stderr
    assert f"-m venv --clear {root}/.venv" in (tmp_path / "calls").read_text()


def test_without_a_container_or_a_virtual_environment_the_error_says_what_to_do(tmp_path):
    done = subprocess.run(
        ["bash", "-c", f"source {ROOT}/launcher/environment.sh"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and "run `bash launcher/install.sh` once" in done.stderr
