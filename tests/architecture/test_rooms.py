"""The rules of the house that a tool can check."""

import ast
import subprocess
import sys
from pathlib import Path

from trainer.methodconfig import METHOD_CONFIGS
from trainer.methods import METHODS

ROOT = Path(__file__).parents[2]
ROOMS = ("trainer", "jobs", "api", "worker", "cli", "migrations", "benchmarks", "tests")


def test_the_api_the_worker_and_the_command_line_load_no_torch() -> None:
    for module in ("api.main", "worker.tasks", "cli.main", "jobs.reaper", "migrations.__main__", "trainer.preflight"):
        code = f"import sys, {module}\nheavy = {{'torch', 'deepspeed', 'transformers', 'numpy'}} & set(sys.modules)\n"
        done = subprocess.run(
            [sys.executable, "-c", code + "sys.exit(str(heavy) if heavy else 0)"], capture_output=True
        )
        assert done.returncode == 0, f"{module}: {done.stderr.decode()}"


def test_the_api_starts_where_torch_is_not_installed(tmp_path: Path) -> None:
    for name in ("torch", "deepspeed", "transformers", "datasets"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not installed here')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom api.main import create_app\ncreate_app().openapi()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_every_method_has_settings_and_every_settings_a_method() -> None:
    assert METHODS.keys() == METHOD_CONFIGS.keys()
    table = (ROOT / "docs" / "methods.md").read_text()
    for name, config in METHOD_CONFIGS.items():
        assert config.model_fields["name"].default == name
        assert f"| `{name}` |" in table, f"docs/methods.md has no row for {name}"


def test_no_file_is_a_house_of_its_own() -> None:
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 400, f"{file.relative_to(ROOT)}: do two ideas live there?"


def test_every_module_says_what_it_is() -> None:
    for room in ROOMS[:-1]:
        for file in (ROOT / room).rglob("*.py"):
            text = file.read_text()
            assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{file.relative_to(ROOT)} has no docstring"
