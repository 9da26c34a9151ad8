"""The house stays the house: who may import whom, no Ray in the library, and importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the ground up.  A module imports from lower floors and from its own room, not from another room of its floor.
FLOORS: list[list[tuple[str, ...]]] = [
    [("tinyvlm",)],
    [("errors",)],
    [("config",), ("schema",), ("storage", "object_store"), ("endpoint",)],
    [
        (
            *("stage", "stage_run", "contract", "folders", "upkeep", "journal", "lease", "report", "charts"),
            *("takedown", "removal"),
        ),
        *(("images",), ("chat",), ("labels",), ("architecture",), ("toy.paths", "toy.scenes")),
    ],
    [("model",)],
    [("generation",), ("data",), ("eval.captions",)],
    [("train",), ("eval",), ("serve",)],
    [("toy",)],
    [("recipes",), ("labels.command",)],
    [("bench",), ("data.commands", "data.show_command")],
    [("cli",)],
]

WITH_RAY = ("ray_jobs._deployments", "ray_jobs._train_callbacks")
"""Made of Ray's own classes; imported by what uses them, when it runs."""

LIGHT = (
    *("tinyvlm", "tinyvlm.errors", "tinyvlm.config", "tinyvlm.schema", "tinyvlm.chat", "tinyvlm.cli", "tinyvlm.report"),
    *("tinyvlm.stage", "tinyvlm.images", "tinyvlm.data.download", "tinyvlm.data.preprocess", "tinyvlm.data.prepare"),
    *("tinyvlm.data.encode", "tinyvlm.data.explore", "tinyvlm.eval.answers", "tinyvlm.serve.app"),
    *("tinyvlm.recipes", "ray_jobs._cli", "ray_jobs._cluster", "ray_jobs._progress", "ray_jobs._run_stage"),
)
"""What must start quickly: a worker that downloads does not carry torch."""


def modules(package: str) -> dict[str, Path]:
    """Dotted name → file of every module of a package."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, *, only_at_import: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; not those that only the type checker sees."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if only_at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{name.name}" for name in node.names)
        waiting += ast.iter_child_nodes(node)


def place(module: str) -> tuple[int, tuple[str, ...]]:
    """Floor and room of a module of the library."""
    name = module.removeprefix("tinyvlm").lstrip(".") or "tinyvlm"
    known = [(floor, room, entry) for floor, rooms in enumerate(FLOORS) for room in rooms for entry in room]
    fitting = [item for item in known if name == item[2] or name.startswith(f"{item[2]}.")]
    assert fitting, f"{module} has no floor: put it on one in tests/test_imports.py"
    floor, room, _ = max(fitting, key=lambda item: len(item[2]))
    return floor, room


def test_imports_go_down_the_floors() -> None:
    library, wrong = modules("tinyvlm"), []
    for module, path in library.items():
        floor, room = place(module)
        for target in imports(path):
            if target.split(".")[0] != "tinyvlm":
                continue
            while target not in library:  # a name inside a module
                target = target.rpartition(".")[0]
            to_floor, to_room = place(target)
            same_package = target.split(".")[1:2] == module.split(".")[1:2]
            if not (to_floor < floor or to_room == room or same_package):
                wrong.append(f"{module} imports {target}")
    assert wrong == []


def test_the_library_knows_no_ray() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, path in modules("tinyvlm").items()
        for target in imports(path)
        if target.split(".")[0] in ("ray", "ray_jobs")
    ]
    assert wrong == []


def test_nothing_imports_torchvision() -> None:
    everything = {**modules("tinyvlm"), **modules("ray_jobs")}
    assert [name for name, path in everything.items() if any(t.startswith("torchvision") for t in imports(path))] == []


def test_the_jobs_import_ray_only_when_they_run() -> None:
    """So that a wrong setting is told, and a finished stage confirmed, without waiting for Ray."""
    wrong = [
        module
        for module, path in modules("ray_jobs").items()
        if module not in WITH_RAY
        and any(target.split(".")[0] == "ray" for target in imports(path, only_at_import=True))
    ]
    assert wrong == []


def test_files_stay_short() -> None:
    everything = {**modules("tinyvlm"), **modules("ray_jobs")}
    lengths = {name: len(path.read_text().splitlines()) for name, path in everything.items()}
    assert {name: length for name, length in lengths.items() if length > 450} == {}


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_light_modules_import_neither_torch_nor_ray() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = [found for found in ('torch', 'transformers', 'ray', 'matplotlib') if found in sys.modules]\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    assert run(code).stderr == ""


def test_importing_does_nothing() -> None:
    """No file is written, no socket or process opened, no thread started, nothing said, no logging set up."""
    code = f"""
import importlib, logging, os, sys, threading
sys.dont_write_bytecode = True
# What other people's packages do when they are imported is theirs.
for name in ("torch", "transformers", "aiohttp", "pyarrow.parquet", "pyarrow.csv", "pyarrow.json", "PIL.Image",
             "PIL.ImageDraw", "PIL.ImageFont", "psutil", "starlette.applications", "rich.console", "uvicorn",
             "torch.distributed", "transformers.models.llama.modeling_llama", "transformers.models.clip.modeling_clip"):
    importlib.import_module(name)
threads, handlers = threading.active_count(), list(logging.getLogger().handlers)

def watch(event, arguments):
    forbidden = ("socket.connect", "socket.bind", "subprocess.Popen", "os.mkdir", "os.rename", "os.remove", "os.system")
    if event in forbidden or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
        sys.stderr.write(f"{{event}} {{arguments}}\\n")

sys.addaudithook(watch)
for name in {sorted({*modules("tinyvlm"), *modules("ray_jobs")} - {*WITH_RAY})!r}:
    importlib.import_module(name)
assert threading.active_count() == threads
assert logging.getLogger().handlers == handlers
assert "ray" not in sys.modules
"""
    answer = run(code)
    assert (answer.stdout, answer.stderr) == ("", "")


@pytest.mark.parametrize("stage", ["download", "preprocess", "explore", "encode", "prepare", "evaluate"])
def test_each_stage_has_a_short_entry_point(stage: str) -> None:
    text = (ROOT / "ray_jobs" / f"{stage}.py").read_text()
    assert f'_cli.main("{stage}", run' in text
    assert len(text.splitlines()) < 40
