"""The command line: exit codes, one-line errors, and no torch import where it is not needed."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffpress.cli.arguments import utf8_text
from diffpress.cli.main import VERBS, main
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "runtime" / "tiny_bundle"
Call = Callable[..., tuple[int, str, str]]
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
RECIPE = """
stages:
  - schedule: {solver: ddim, steps: 2}
  - prune: {method: magnitude, ratio: 0.5, round_to: 4}
export: {targets: [onnx]}
gates: {parity_sqnr_db: 190}
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = pytest.importorskip("torch")
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    model: Any = UNet2DModel(**UNET)
    model.save_pretrained(folder / "unet")
    scheduler: Any = DDPMScheduler()
    scheduler.save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run one command in this process; return its exit code, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def refused(call: Call) -> Callable[..., None]:
    """Assert that the command exits with code 2 and one line on stderr that contains each of `words`."""

    def check(command: tuple[object, ...], *words: str) -> None:
        code, _, error = call(*command)
        assert code == 2 and error.startswith("diffpress: ") and error.count("\n") == 1, error
        assert all(word in error for word in words), error

    return check


def in_fresh_process(
    *words: object, code: str = "", blocked: str = "", cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run `python -m diffpress ...` in a fresh interpreter in which the package `blocked` cannot be imported."""
    program = f"""
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
sys.path.insert(0, {str(ROOT)!r})
try:
    runpy.run_module("diffpress", run_name="__main__", alter_sys=True)
finally:
    {code or "pass"}
"""
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


LOADED = "print('LOADED', *sorted(sys.modules))"


def packages(done: subprocess.CompletedProcess[str]) -> set[str]:
    return set(next(line for line in done.stdout.splitlines() if line.startswith("LOADED")).split())


# --- what is imported ------------------------------------------------------------------------------------------


def test_importing_diffpress_loads_no_heavy_package() -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, diffpress; {LOADED}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "diffpress" in packages(done)
    assert not packages(done) & {"torch", "numpy", "onnx", "onnxruntime", "diffpress.compress", "diffpress.export"}


def test_help_names_every_verb_without_loading_torch() -> None:
    done = in_fresh_process("--help", code=LOADED)
    assert done.returncode == 0 and all(verb in done.stdout for verb in VERBS)
    assert not packages(done) & {"torch", "numpy"}


@pytest.mark.parametrize(
    "words",
    [
        ("sample", TINY, "-n", 2, "--engine", "onnxruntime", "--out", "grid.png"),
        ("bench", TINY, "--batch", 1, "--repeats", 1, "--engine", "onnxruntime", "--baseline", TINY),
        ("report", "."),
    ],
    ids=lambda words: words[0],
)
def test_verbs_that_need_no_torch_run_without_it(words: tuple[object, ...], tmp_path: Path) -> None:
    done = in_fresh_process(*words, blocked="torch", code=LOADED, cwd=tmp_path)
    assert done.returncode == (2 if words[0] == "report" else 0), done.stderr
    assert "torch" not in packages(done)


@pytest.mark.parametrize(
    "words",
    [
        ("compress", "--out", "out"),
        ("plan",),
        ("export", "checkpoint", "--out", "bundle"),
        ("evaluate", "checkpoint"),
        ("bench", TINY, "--baseline", "checkpoint"),
    ],
    ids=lambda words: words[0],
)
def test_a_missing_extra_is_named_with_its_install_command(words: tuple[object, ...], tmp_path: Path) -> None:
    done = in_fresh_process(*words, blocked="torch", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"diffpress: diffpress {words[0]} needs the package 'torch'")
    assert "pip install 'diffpress[compress]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["compress", "plan", "export", "init", "recipes", "schema", "sample", "info"])
def test_help_loads_no_heavy_package(verb: str) -> None:
    done = in_fresh_process(verb, "--help", code=LOADED)
    assert done.returncode == 0 and f"usage: diffpress {verb}" in done.stdout
    assert not packages(done) & {"torch", "diffusers", "transformers", "onnx", "pydantic"}


@pytest.mark.parametrize("words", [("recipes",), ("init", "--out", "r.yaml"), ("schema",)], ids=lambda words: words[0])
def test_verbs_about_recipes_do_not_load_torch(words: tuple[str, ...], tmp_path: Path) -> None:
    done = in_fresh_process(*words, code=LOADED, cwd=tmp_path)
    assert done.returncode == 0 and not packages(done) & {"torch", "diffusers", "transformers"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--recipe", "int9"), "unknown recipe 'int9': did you mean 'int8'?"),
        (
            ("--recipe", "misspelt.yaml"),
            "misspelt.yaml: unknown key 'stages[0].quantize.fromat'; did you mean",
        ),
        (("--set", "evaluate.samples=4"), "--set evaluate.samples=4: evaluate.samples: "),
        (("--set", "prune.ratio=much"), "--set prune.ratio=much: stages[1].prune.ratio: "),
        (("--set", "data=nowhere.npz"), "--set data=nowhere.npz: data: "),
    ],
)
@pytest.mark.parametrize("verb", ["compress", "plan"])
def test_a_mistake_in_a_recipe_is_reported_before_torch_is_imported(
    verb: str, words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / "misspelt.yaml").write_text("stages: [{quantize: {fromat: int8}}]")
    out = ("--out", "out") if verb == "compress" else ()
    done = in_fresh_process(verb, *words, *out, code=LOADED, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"diffpress: {message}") and done.stderr.count("\n") == 1
    assert not packages(done) & {"torch", "diffusers", "transformers"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--samples", "4"), "samples = 4: too few, give at least 8"),
        (("--precision", "fp8"), "unknown precision 'fp8': choose from fp32, bf16, fp16"),
        (("--threads", "0"), "0 threads: must be at least 1"),
    ],
)
def test_a_mistake_in_an_evaluation_is_reported_before_torch_is_imported(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = in_fresh_process("evaluate", "checkpoint", *words, code=LOADED, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"diffpress: {message}") and done.stderr.count("\n") == 1
    assert not packages(done) & {"torch", "diffusers", "transformers"}


# --- exit codes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        ((), "VERB"),
        (("compres",), "unknown command 'compres': did you mean 'compress'?"),
        (("compress",), "--out"),
        (("plan", "--recip", "--nonsense"), "--recip"),
        (("plan", "a", "b"), "b"),
        (("sample",), "BUNDLE"),
        (("sample", TINY, "-n", "many"), "many"),
        (("export", "x", "--out", "y", "--targets", "coreml"), "coreml"),
    ],
)
def test_invalid_command_lines_are_refused(words: tuple[object, ...], culprit: str, call: Call) -> None:
    code, _, error = call(*words)
    assert code == 2 and culprit in error and error.startswith("diffpress: ") and error.count("\n") == 1


def test_a_missing_checkpoint_is_refused_by_every_verb_that_reads_one(
    recipe: Path, refused: Callable[..., None], tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere"
    for words in (
        ("plan", nowhere),
        ("compress", nowhere, "--recipe", recipe, "--out", tmp_path / "out"),
        ("export", nowhere, "--out", tmp_path / "bundle"),
        ("evaluate", nowhere),
        ("bench", TINY, "--engine", "onnxruntime", "--baseline", nowhere),
    ):
        refused(words, str(nowhere), "no such checkpoint folder")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_missing_bundle_is_refused_by_every_verb_that_reads_one(refused: Callable[..., None], tmp_path: Path) -> None:
    for verb in ("sample", "bench"):
        refused((verb, tmp_path / "nowhere"), "nowhere")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("stages: [{prun: {}}]", "did you mean 'prune'?"),
        ("stages: [", "not valid YAML"),
        ("stages: [distill]", "prune"),
        ("stages: [{prune: {ratio: 1.0}}]", "stages[0].prune.ratio"),
    ],
)
def test_a_bad_recipe_is_refused_before_any_work(
    text: str, word: str, teacher: Path, recipe: Path, refused: Callable[..., None], tmp_path: Path
) -> None:
    recipe.write_text(text)
    refused(("plan", teacher, "--recipe", recipe), "recipe.yaml", word)
    refused(("compress", teacher, "--recipe", recipe, "--out", tmp_path / "out"), "recipe.yaml", word)
    assert not (tmp_path / "out").exists()


def test_a_bad_override_is_refused(teacher: Path, recipe: Path, refused: Callable[..., None]) -> None:
    refused(("plan", teacher, "--recipe", recipe, "--set", "stages.prune.ratoi=0.1"), "'ratio'")


def test_a_ratio_that_removes_nothing_is_refused(teacher: Path, recipe: Path, refused: Callable[..., None]) -> None:
    words = ("--set", "stages.prune.ratio=0.01", "--set", "stages.prune.round_to=16")
    refused(("plan", teacher, "--recipe", recipe, *words), "prune: ratio 0.01", "removes nothing")


def test_a_report_on_a_folder_that_is_not_a_run_is_refused(refused: Callable[..., None], tmp_path: Path) -> None:
    refused(("report", tmp_path), str(tmp_path), "not the folder of a compress run")
    refused(("report", tmp_path / "nowhere"), "nowhere")
    (tmp_path / "recipe.json").write_text("{}")  # as a run killed early leaves it
    refused(("report", tmp_path), str(tmp_path / "bundle"))


@pytest.mark.parametrize("flag", [("--samples", 4), ("--seeds", 0), ("--batch", 0)])
def test_too_few_samples_to_evaluate_are_refused(
    flag: tuple[str, int], teacher: Path, refused: Callable[..., None]
) -> None:
    refused(("evaluate", teacher, *flag), flag[0].removeprefix("--"), "too few")


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        (("--engine", "onnxruntime"), "engine"),
        (("--precision", "bf16"), "precision"),
        (("--providers", "cpu"), "providers"),
        (("--rebuild",), "engine and rebuild"),
    ],
)
def test_evaluating_a_checkpoint_takes_no_engine(
    flag: tuple[str, ...], named: str, teacher: Path, refused: Callable[..., None]
) -> None:
    refused(("evaluate", teacher, *flag), str(teacher), f"leave out {named}, or name a bundle")


def test_evaluate_hands_the_options_of_the_engine_on(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from diffpress.compress.evaluation import open_subject as module

    def opened(bundle: object, engine: str, *, options: EngineOptions) -> None:
        raise InvalidInputError(f"{engine} {options.non_default} {options.threads} {torch.get_num_threads()}")

    before = torch.get_num_threads()
    monkeypatch.setattr(module, "Pipeline", opened)
    words = ("--engine", "openvino", "--threads", before + 1, "--streams", 2, "--precision", "bf16")
    expected = f"diffpress: openvino ['threads', 'precision', 'streams'] {before + 1} {before + 1}\n"
    assert call("evaluate", TINY, *words) == (2, "", expected) and torch.get_num_threads() == before


def test_evaluating_a_student_with_other_steps_prints_a_warning(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffpress.compress.evaluation import evaluate as module

    def evaluate(subject: Any, *rest: object) -> None:
        raise InvalidInputError(f"{subject.spec.plan.steps} steps")

    monkeypatch.setattr(module, "evaluate", evaluate)
    student = ROOT / "calib_data" / "student"
    assert call("evaluate", student) == (2, "", "diffpress: 2 steps\n")
    code, _, error = call("evaluate", student, "--steps", 3)
    assert code == 2 and error.startswith("warning: this network was distilled for its own plan, 2 steps")
    assert error.endswith("diffpress: 3 steps\n")


def test_images_of_a_shape_the_feature_network_does_not_support_are_refused(
    teacher: Path, refused: Callable[..., None]
) -> None:
    refused(("evaluate", teacher), "features.onnx", "[1, 28, 28]", "[1, 8, 8]", "--features")


def test_an_evaluation_that_cannot_run_is_refused_before_any_work(
    teacher: Path, recipe: Path, refused: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffpress.export import run_bundles as module

    monkeypatch.setattr(module, "export_bundle", lambda *a, **k: pytest.fail("exported before the check"))
    words = ("compress", teacher, "--recipe", recipe, "--out", tmp_path / "out", "--set", "evaluate.samples=8")
    refused(words, "features.onnx", "[1, 28, 28]")


def test_an_interrupted_command_says_how_to_resume(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffpress.cli import plan

    def interrupt(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "run", interrupt)
    code, _, error = call("plan")
    assert code == 130 and error.count("\n") == 1 and "run the same command again to resume" in error


def test_a_verb_may_say_what_an_interruption_left(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffpress.cli import plan

    def interrupt(args: object) -> None:
        raise KeyboardInterrupt("4 of 7 images are kept")

    monkeypatch.setattr(plan, "run", interrupt)
    assert call("plan") == (130, "", "diffpress: interrupted; 4 of 7 images are kept\n")


@pytest.mark.parametrize("words", ["recipes", "schema", "--help", "schema --help"])
def test_a_reader_that_stops_reading_is_no_error(words: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m diffpress {words} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_prompts_and_paths_need_no_unicode_terminal(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("there is no C locale")
    folder = shutil.copytree(TINY, tmp_path / "bündel")
    for locale in ({"PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        command = [sys.executable, "-m", "diffpress", "sample", str(folder), "-n1", "--out", str(tmp_path / "é.png")]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C", **locale}
        )
        assert done.returncode == 0 and "1 image, 8 steps" in done.stdout, done.stderr
    assert (tmp_path / "é.png").is_file()


def test_an_argument_of_bytes_is_read_as_utf_8() -> None:
    assert utf8_text("café 漢") == utf8_text("café 漢".encode().decode("ascii", "surrogateescape")) == "café 漢"
    with pytest.raises(argparse.ArgumentTypeError, match="is not UTF-8"):
        utf8_text(b"\xff".decode("ascii", "surrogateescape"))


def test_an_unexpected_error_keeps_its_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffpress.cli import plan

    monkeypatch.setattr(plan, "run", lambda args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        call("plan")


# --- plan ------------------------------------------------------------------------------------------------------


def test_plan_as_json_has_the_documented_shape(teacher: Path, recipe: Path, call: Call, tmp_path: Path) -> None:
    code, text, _ = call("plan", teacher, "--recipe", recipe, "--set", "stages.prune.ratio=0.25", "--json")
    result = json.loads(text)
    assert code == 0 and list(result) == ["recipe", "order", "before", "stages"]
    assert result["order"] == ["schedule", "prune"] and result["recipe"]["gates"]["parity_sqnr_db"] == 190
    assert set(result["before"]) == {"parameters", "macs", "bytes"}
    assert result["before"]["bytes"] == 4 * result["before"]["parameters"]
    schedule, prune = result["stages"]
    assert schedule["after"] == result["before"] and prune["name"] == "prune" and prune["config"]["ratio"] == 0.25
    assert all(0 < prune["after"][key] < result["before"][key] for key in result["before"])
    code, output, _ = call("plan", teacher, "--recipe", recipe, "--json", tmp_path / "plan.json")
    assert code == 0 and "schedule" in output and json.loads((tmp_path / "plan.json").read_text())["order"]


def test_plan_estimates_that_quantization_reduces_only_the_bytes(teacher: Path, recipe: Path, call: Call) -> None:
    recipe.write_text("stages: [quantize]")
    result = json.loads(call("plan", teacher, "--recipe", recipe, "--json")[1])
    before, after = result["before"], result["stages"][0]["after"]
    assert after["parameters"] == before["parameters"]
    assert 0.25 * before["bytes"] < after["bytes"] < 0.35 * before["bytes"]


def test_plan_works_for_the_built_in_teacher_and_recipe_and_writes_nothing(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text, _ = call("plan")
    assert code == 0 and "quantize" in text and "before: " in text and list(tmp_path.iterdir()) == []


# --- compress --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """A complete run with a gate it cannot pass: its exit code and its folder."""
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(RECIPE)
    command = ["compress", teacher, "--recipe", folder / "recipe.yaml", "--out", folder / "out"]
    return main([str(word) for word in command]), folder


def test_a_failed_gate_gives_exit_code_1_and_keeps_the_output(run: tuple[int, Path]) -> None:
    code, folder = run
    assert code == 1
    kept = {path.name for path in (folder / "out").iterdir()}
    assert {"stages", "checkpoint", "float", "baseline", "bundle", "comparison.png", "report.json"} <= kept
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["gates"][0]["gate"] == "parity_sqnr_db" and report["gates"][0]["passed"] is False
    assert [record["stage"] for record in report["history"]] == ["schedule", "prune"]


@pytest.mark.parametrize("recipe_of_the_run", ["recipe.yaml", "out/recipe.json"])
def test_repeating_a_run_only_loads_existing_results(
    recipe_of_the_run: str, run: tuple[int, Path], teacher: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffpress.export import run_bundles as module

    _, folder = run
    monkeypatch.setattr(module, "export_bundle", lambda *a, **k: pytest.fail("exported again"))
    code, output, error = call("compress", teacher, "--recipe", folder / recipe_of_the_run, "--out", folder / "out")
    assert code == 1 and output.count("done before") >= 4
    last = error.splitlines()[-1]
    assert "gate failed: parity_sqnr_db is " in last and "the bound is 190" in last


def test_another_recipe_in_the_same_folder_is_refused(
    run: tuple[int, Path], teacher: Path, refused: Callable[..., None]
) -> None:
    _, folder = run
    words = ("compress", teacher, "--recipe", folder / "recipe.yaml", "--out", folder / "out", "--set", "seed=9")
    refused(words, "made by another recipe", "seed: 0 there, 9 here", "--update")


def test_a_passed_gate_gives_exit_code_0(run: tuple[int, Path], teacher: Path, call: Call, tmp_path: Path) -> None:
    _, folder = run
    out = shutil.copytree(folder / "out", tmp_path / "out")
    words = ("--update", "--set", "gates.parity_sqnr_db=30")
    assert call("compress", teacher, "--recipe", folder / "recipe.yaml", "--out", out, *words)[0] == 0


def test_a_report_is_rebuilt_from_the_output_of_a_run(run: tuple[int, Path], call: Call, tmp_path: Path) -> None:
    out = shutil.copytree(run[1] / "out", tmp_path / "out")
    before = json.loads((out / "report.json").read_text())
    for name in ("report.json", "report.html"):
        (out / name).unlink()
    code, output, _ = call("report", out)
    assert code == 0 and "denoiser.onnx, MiB" in output
    assert json.loads((out / "report.json").read_text()) == before
    assert "http" not in (out / "report.html").read_text().replace("http-equiv", "")


def test_the_run_ends_with_a_bundle_that_samples_without_torch(run: tuple[int, Path], tmp_path: Path) -> None:
    done = in_fresh_process(
        "sample", run[1] / "out" / "bundle", "-n", 2, "--out", tmp_path / "grid.png", blocked="torch"
    )
    assert done.returncode == 0 and (tmp_path / "grid.png").stat().st_size > 0, done.stderr


def test_every_folder_of_the_package_has_an_init_file() -> None:
    """A folder of code without `__init__.py` is not a package and would not be installed correctly."""
    folders = {path.parent for path in (ROOT / "diffpress").rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_no_module_is_imported_through_the_symlinks() -> None:
    """`compress`, `export` and `runtime` are symlinks; a module imported through them would be loaded twice."""
    bare = re.compile(r"^\s*(?:from|import) (?:compress|export|runtime)\b", re.M)
    trees = ("diffpress", "tests", "benchmarks", "examples")
    files = [path for tree in trees for path in (ROOT / tree).rglob("*.py")]
    assert len(files) > 200 and bare.search("from compress.recipe import x") and bare.search("    import runtime")
    assert [str(path) for path in files if bare.search(path.read_text())] == []
