import copy
import inspect
import json
import re
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from patch_based_ddpm import checkpoint, command_line, evaluate, study
from patch_based_ddpm.data import pictures
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.evaluation import image_sets, metrics, sliced_wasserstein
from patch_based_ddpm.generation.image_folder import ImageFolder
from patch_based_ddpm.planning import planner
from patch_based_ddpm.planning.live_memory import MIB
from patch_based_ddpm.studies.config import StudyConfig
from patch_based_ddpm.studies.controls import DEFECTS, control_name, spoil
from patch_based_ddpm.studies.plot import save_plot
from patch_based_ddpm.studies.report import SWD, fastest, markdown
from patch_based_ddpm.studies.tasks import Tasks
from patch_based_ddpm.training.step import TrainingStep
from support import patches
from support.face_images import crowd, images

STEPS, SAMPLES, REAL = 2, 4, 6
MODELS = ("N1", "N2", "N2-halo1", "N2-two", "N2-no-position", "N2-no-content", "N2-neither", "N2+1", "N2+1-two")
CONTROLS = [control_name(defect) for defect in DEFECTS]
TASKS = ["real", *(f"{model}-seed0" for model in MODELS), "N2-seed0-ddpm-3", "N2-seed0-ddim-2", *CONTROLS]


def write_study(folder, **sections):
    """A study file of tiny models whose folder is `folder`/study."""
    content = {
        "trainer": {
            "train_dataset_dir": "builtin:faces",
            "log_dir": str(folder / "study"),
            "train_batch_size": 2,
            "train_num_steps": STEPS,
            "save_and_sample_every": 1,
            "num_workers": 0,
            "preview_count": 0,
            "mixed_precision": "bf16",
        },
        "model": {"dim": 8, "dim_mults": [1, 2], "image_size": 16, "patch_divider": 2},
        "diffusion": {"timesteps": 10},
        "study": {
            "patch_dividers": [1, 2],
            "halos": [1],
            "variants": {"two": {"grids": 2}},
            "continued_steps": 1,
            "seeds": [0],
            "samples": SAMPLES,
            "real_images": REAL,
            "sampler": "ddim",
            "steps": 2,
            "ddpm_steps": [3],
            "ddim_steps": [2],
        },
    }
    content = {name: {**section, **sections.get(name, {})} for name, section in content.items()}
    path = folder / "study_config.json"
    path.write_text(json.dumps(content))
    return path


def run(path):
    study.main(["--config", str(path)])
    folder = StudyConfig.load(path).folder
    return json.loads((folder / "study.json").read_text())


def tasks_of(path):
    """A study's tasks, which neither train nor draw."""
    return Tasks(StudyConfig.load(path), "no", train=None, sample=None)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Fewer patches are compared, and memory is not planned: each set of arguments gets figures of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sliced_wasserstein, "MOST_PATCHES", 400)
        for name in ("training_peak", "sampling_peak"):
            patch.setattr(planner, name, stand_in(getattr(planner, name)))
        yield


def stand_in(plan):
    def planned(config, **options):
        inspect.signature(plan).bind(config, **options)
        key = repr((plan.__name__, config.model, sorted(options.items())))
        return SimpleNamespace(activations=zlib.crc32(key.encode()) >> 4, total=zlib.adler32(key.encode()) >> 4)

    return planned


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the report of a study that ran without a break."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(write_study(folder))


@pytest.fixture
def work(monkeypatch):
    """Counts what is done: `work[kind]` lists it; `work["cut"] = (kind, n)` interrupts instead of the n-th."""
    done = {"steps": [], "images": [], "sets": [], "cut": (None, 0)}

    def counted(kind, owner, method, name):
        original = getattr(owner, method)

        def replacement(self, *args, **options):
            if done["cut"] == (kind, len(done[kind])):
                raise KeyboardInterrupt
            done[kind].append(name(self, *args))
            return original(self, *args, **options)

        monkeypatch.setattr(owner, method, replacement)

    counted("steps", TrainingStep, "__call__", lambda self, step, batches: (self.diffusion.config, step))
    counted("images", ImageFolder, "write", lambda self, seed, image: self.path(seed))
    counted("sets", metrics, "collect", lambda batches, share, count: count)
    return done


@pytest.mark.slow
def test_a_study_from_training_to_tables(finished):
    folder, report = finished
    assert [row["name"] for row in report["models"]] == list(MODELS)
    conditioning = [(row["position_conditioning"], row["global_content_conditioning"]) for row in report["models"]]
    assert conditioning == [(True, True)] * 4 + [(False, True), (True, False), (False, False)] + [(True, True)] * 2
    assert [row["halo"] for row in report["models"]] == [0, 0, 1, *[0] * 6]
    assert [row["grids"] for row in report["models"]] == [1, 1, 1, 2, 1, 1, 1, 1, 2]
    assert [row["steps"] for row in report["models"]] == [STEPS] * 7 + [STEPS + 1] * 2
    assert [(row["sampler"], row["steps"]) for row in report["samplers"]["rows"]] == [("ddpm", 3), ("ddim", 2)]
    assert report["samplers"]["model"] == "N2"
    # the last of these is what the runs are compared by, too
    ddpm, ddim = ([run["figures"] for run in row["runs"]] for row in report["samplers"]["rows"])
    assert ddpm != ddim == [run["figures"] for run in report["models"][1]["runs"]]
    root = folder / "study"
    assert {path.name for path in root.iterdir() if path.is_file()} == {
        "study.json",
        "tables.md",
        "study.png",
        "models.png",
        "samplers.png",
        "controls.png",
    }
    assert sorted(path.stem for path in (root / "results").glob("*.json")) == sorted(TASKS)
    for name in MODELS:
        trained = json.loads((root / f"{name}-seed0" / "config.json").read_text())
        model = trained["model"]
        assert (trained["trainer"]["seed"], model["patch_divider"]) == (0, int(name[1]))
        assert model["halo"] == (1 if name == "N2-halo1" else 0)
        given = (model["position_conditioning"], model["global_content_conditioning"])
        assert given == conditioning[MODELS.index(name)]


@pytest.mark.parametrize(("row", "N"), [(0, 1), (2, 2), (4, 2)])
def test_a_run_is_judged_as_by_evaluate(finished, tmp_path, monkeypatch, row, N):
    folder, report = finished
    monkeypatch.chdir(tmp_path)
    samples = folder / "study" / f"{MODELS[row]}-seed0" / "samples" / "ddim-2"
    data = ["--data", "builtin:faces", "--data-count", str(REAL), "--patch-divider", str(N)]
    evaluate.main(["--samples", str(samples), *data, "--out", "out.json"])
    judged = json.loads((tmp_path / "out.json").read_text())
    (only,) = report["models"][row]["runs"]
    assert only["figures"] == judged["figures"]
    config = StudyConfig.load(folder / "study_config.json").models()[MODELS[row]]
    one = {"batch_size": 1, "patch_batch_size": 1}
    planned = {
        "training": planner.training_peak(config, **one, precision="bf16"),
        "sampling": planner.sampling_peak(config, **one),
    }
    for kind, peak in planned.items():
        assert only["memory"][kind] == {"activations": peak.activations, "total": peak.total}


def test_the_floor_is_made_of_other_faces(finished, tmp_path, monkeypatch):
    _, report = finished
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").mkdir()
    people = crowd(REAL + SAMPLES, seed=image_sets.FACES_SEED)[REAL:]
    order = image_sets.shuffled(SAMPLES, SAMPLES)  # in which evaluate looks at files
    for position, face in zip(order, images(people, 16, 16), strict=True):
        pictures.save_png(tmp_path / "faces" / f"{position:06d}.png", pictures.pixels(face))
    data = ["--data", "builtin:faces", "--data-count", str(REAL), "--patch-divider", "2"]
    evaluate.main(["--samples", "faces", *data, "--out", "out.json"])
    assert report["real"]["figures"]["2"] == json.loads((tmp_path / "out.json").read_text())["figures"]
    assert list(report["real"]["figures"]) == ["1", "2"]


@pytest.mark.slow
def test_what_was_cut_off_goes_on_and_nothing_is_done_twice(finished, tmp_path, work, capsys):
    path = write_study(tmp_path)
    # In the first run's training, in the second run's samples, in its measurement, in the last sampler.
    for cut in (("steps", 1), ("images", SAMPLES + 2), ("sets", 4), ("images", len(MODELS) * SAMPLES + 2)):
        work["cut"] = cut
        with pytest.raises(KeyboardInterrupt):
            run(path)
        assert not (tmp_path / "study" / "study.json").exists()
    work["cut"] = (None, 0)
    capsys.readouterr()
    report = run(path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert lines[0] == f"[1/{len(TASKS)}] real: done before"
    assert lines[-1] == f"[{len(TASKS)}/{len(TASKS)}] {TASKS[-1]}"
    _, whole = finished
    report["config"]["trainer"]["log_dir"] = whole["config"]["trainer"]["log_dir"]
    assert report == whole
    assert len(work["steps"]) == len(set(work["steps"])) == 7 * STEPS + 2
    assert len(work["images"]) == len(set(work["images"])) == (len(MODELS) + 1) * SAMPLES
    text = (tmp_path / "study" / "tables.md").read_bytes()

    work["cut"] = ("sets", len(work["sets"]))
    steps, drawn = len(work["steps"]), len(work["images"])
    run(path)
    assert (len(work["steps"]), len(work["images"])) == (steps, drawn)
    assert (tmp_path / "study" / "tables.md").read_bytes() == text


@pytest.mark.slow
def test_a_changed_config_is_noticed(finished, tmp_path, work):
    whole, report = finished
    shutil.copytree(whole / "study", tmp_path / "study")
    with pytest.raises(InputError) as refused:
        run(write_study(tmp_path, trainer={"train_lr": 0.5}))
    assert str(refused.value) == (
        f"{tmp_path / 'study' / 'N1-seed0'} was trained with trainer.train_lr 0.0001, but the study says 0.5; choose "
        "another trainer.log_dir, or remove that folder."
    )
    run(write_study(tmp_path, trainer={"preview_eta": 1.0, "preview_sampler": "ddim", "num_workers": 1}))
    assert work["images"] == []  # that changes nothing
    more = run(write_study(tmp_path, study={"samples": SAMPLES + 1, "dpm_solver_pp_steps": [2]}))
    assert work["steps"] == []
    # one more image of each, and all of the new sampler's
    drawn = len(MODELS) + 1 + SAMPLES + 1
    assert len(work["images"]) == drawn
    assert len(more["samplers"]["rows"]) == 3
    again = run(write_study(tmp_path))  # fewer than lie there
    assert len(work["images"]) == drawn
    assert more["models"] != again["models"] == report["models"]
    assert again["samplers"] == report["samplers"]


def cells(text):
    """The tables of a Markdown text: for each its rows, as dicts by column."""
    tables = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()]
        tables.append([dict(zip(head, row, strict=True)) for row in rows])
    return tables


def test_the_tables_hold_what_the_json_holds(finished):
    folder, report = finished
    text = (folder / "study" / "tables.md").read_text()
    assert text == markdown(report)
    models, samplers, controls = cells(text)
    assert [row["model"] for row in models] == [*MODELS, "real against real"]
    for row, found in zip(report["models"], models):
        (only,) = row["runs"]
        figures, N = only["figures"], row["patch_divider"]
        assert found["SWD x 10^3"] == f"{figures['SWD x 10^3, mean']['samples']:.1f}"
        assert float(found["work"]) == pytest.approx(row["work"], abs=0.006)
        assert found["MS-SSIM"] == f"{figures['MS-SSIM']['samples']:.3f}"
        assert found["training activations"] == f"{only['memory']['training']['activations'] / MIB:.2f}"
        assert found["sampling in all"] == f"{only['memory']['sampling']['total'] / MIB:.2f}"
        seam = "" if N == 1 else f"{figures[f'seam ratio, {N} x {N}']['samples']:.3f}"
        assert found["seam ratio"] == seam
        assert found["disagreement"] == ""  # so small a face cannot be read
    work = {row["name"]: row["work"] for row in report["models"]}
    assert work["N2"] == work["N2+1"] == 1
    # The second of two steps predicts with both grids.
    assert work["N2-two"] == work["N2+1-two"] == pytest.approx(1.5, rel=1e-3)
    assert 1.45 < work["N2-halo1"] < (10 / 8) ** 2  # the conditioning is the same work for any patch
    floor = report["real"]["figures"]["2"]
    for table in (models, samplers, controls):
        assert table[-1]["SWD x 10^3"] == f"{floor['SWD x 10^3, mean']['samples']:.1f}"
        assert table[-1]["seam ratio"] == f"{floor['seam ratio, 2 x 2']['samples']:.3f}"
    for row, found in zip(report["samplers"]["rows"], samplers):
        ((only,), name) = row["runs"], "seam ratio, 2 x 2, worst phase"
        assert (found["sampler"], found["steps"]) == (row["sampler"], str(row["steps"]))
        assert found["worst phase"] == f"{only['figures'][name]['samples']:.3f}"
    for defect, found, row in zip(DEFECTS, controls, report["controls"]):
        assert found["real faces"] == row["name"] == defect
        assert found["SWD x 10^3"] == f"{row['figures']['SWD x 10^3, mean']['samples']:.1f}"
    assert f"Rows from the top: real faces; {'; '.join(MODELS)}; seed 0." in text
    assert "Rows from the top: real faces; ddpm, 3 steps; ddim, 2 steps; seed 0." in text


def test_several_seeds_are_a_mean_and_a_range(finished, tmp_path):
    report = copy.deepcopy(finished[1])
    report["config"]["study"]["seeds"] = [0, 7]
    for row in report["models"]:
        (only,) = row["runs"]
        only["figures"] |= {"SWD x 10^3, mean": {"samples": 10.0}, "disagreement": {"samples": 0.02}}
        other = copy.deepcopy(only)
        other["figures"] |= {"SWD x 10^3, mean": {"samples": 13.0}, "MS-SSIM": {"samples": None}}
        row["runs"] = [only, other]
    text = markdown(report)
    row = cells(text)[0][0]
    assert row["SWD x 10^3"] == "11.5 (10.0-13.0)"
    assert row["disagreement"] == "0.0200"
    assert re.fullmatch(r"0\.\d{3} \[1 of 2\]", row["MS-SSIM"])
    assert "Over 2 seed(s) of training, mean (least-most)." in text
    report["samplers"]["rows"] = []
    assert len(cells(markdown(report))) == 2
    assert "samplers.png" not in markdown(report)
    save_plot(report, tmp_path / "plot.png")
    assert (np.array(Image.open(tmp_path / "plot.png")) < 128).any()


def compared(distances):
    """A report in which samplers have these SWD, run by run."""
    rows = [
        {"sampler": sampler, "steps": steps, "runs": [{"figures": {SWD: {"samples": value}}} for value in values]}
        for (sampler, steps), values in distances.items()
    ]
    return {"samplers": {"model": "N2", "rows": rows}}


@pytest.mark.parametrize(
    ("distances", "named"),
    [
        # a step is an evaluation of the network, whichever the sampler
        ({("ddpm", 1000): [40], ("ddim", 50): [41], ("dpm-solver++", 20): [42]}, ("dpm-solver++", 20)),
        ({("ddpm", 1000): [40], ("ddim", 50): [41], ("dpm-solver++", 20): [42.1]}, ("ddim", 50)),
        ({("ddpm", 1000): [40], ("ddim", 50): [42.1], ("dpm-solver++", 20): [99]}, ("ddpm", 1000)),
        # of as many steps, the closer one
        ({("ddpm", 1000): [40], ("ddim", 20): [41], ("dpm-solver++", 20): [40.5]}, ("dpm-solver++", 20)),
        # a run is compared with itself: 1.1 and 0.9, and 1.2 and 0.95
        ({("ddpm", 9): [10, 100], ("ddim", 5): [11, 90], ("ddim", 4): [12, 95]}, ("ddim", 5)),
        # the yardstick has the most steps of ddpm's
        ({("ddpm", 250): [80], ("ddpm", 1000): [40], ("ddim", 50): [80]}, ("ddpm", 1000)),
    ],
)
def test_the_fastest_sampler_that_is_as_good(distances, named):
    row = fastest(compared(distances))
    assert (row["sampler"], row["steps"]) == named


def test_without_ddpm_no_sampler_is_named(finished):
    assert fastest(compared({("ddim", 5): [11]})) is None
    report = copy.deepcopy(finished[1])
    del report["samplers"]["rows"][0]
    text = markdown(report)
    assert "fewest steps" not in text
    assert "over that of ddpm" not in text


def test_samplers_are_compared_over_all_seeds(finished):
    report = copy.deepcopy(finished[1])
    for row, distances in zip(report["samplers"]["rows"], ([10.0, 20.0], [10.2, 20.8])):
        row["runs"] = [{**row["runs"][0], "figures": {SWD: {"samples": distance}}} for distance in distances]
    text = markdown(report)
    ddpm, ddim, _ = cells(text)[1]
    assert ddim["SWD x 10^3"] == "15.5 (10.2-20.8)"
    assert ddim["SWD over that of ddpm in 3"] == "1.03 (1.02-1.04)"
    assert ddpm["SWD over that of ddpm in 3"] == "1.00"
    floor = report["real"]["figures"]["2"]["SWD x 10^3, mean"]["samples"]
    assert (
        "The fewest steps with an SWD of at most 1.05 times that of ddpm in 3 (both include the floor of "
        f"{floor:.1f}): ddim in 2."
    ) in text


HOLDER = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_processes_share_the_work(finished, tmp_path, monkeypatch):
    """While another process is at a run, its other tasks are done; once that process is killed, the rest is."""
    path = write_study(tmp_path)
    results = tmp_path / "study" / "results"
    command = [sys.executable, "-c", HOLDER, str(results / "locks" / "N2-seed0")]
    left = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:

        def look(seconds):
            left.append(sorted(path.stem for path in results.glob("*.json")))
            if len(left) == 2:
                other.kill()
                other.wait()

        try:
            assert other.stdout.readline() == "held\n"
            monkeypatch.setattr(time, "sleep", look)
            report = run(path)
        finally:
            other.kill()
    assert left == [sorted(name for name in TASKS if not name.startswith(("N2-seed0", "N2+1")))] * 2
    _, whole = finished
    report["config"]["trainer"]["log_dir"] = whole["config"]["trainer"]["log_dir"]
    assert report == whole


def test_a_lock_is_released_after_a_failure(tmp_path):
    tasks = tasks_of(write_study(tmp_path))

    def fail():
        with tasks.lock("one", wait=False):
            assert tasks.lock("one", wait=False) is None
            with tasks.lock("two", wait=False):
                raise KeyError

    with pytest.raises(KeyError):
        fail()
    with tasks.lock("one", wait=True), tasks.lock("two", wait=False):
        pass


def test_no_module_needs_a_unix():
    """`import fcntl` and its like fail on Windows."""
    for path in Path(study.__file__).parent.rglob("*.py"):
        imported = re.findall(r"^(?:from|import) (\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert not {"fcntl", "grp", "pwd", "resource", "termios"} & set(imported), path


def test_the_grid_shows_the_first_samples_of_every_run(finished):
    folder, _ = finished
    grid = np.array(Image.open(folder / "study" / "models.png"))
    assert (grid == pictures.enlarge(grid[::3, ::3], 3)).all()
    grid = grid[::3, ::3]
    gap = pictures.GAP
    assert grid.shape == ((len(MODELS) + 1) * (16 + gap) + gap, SAMPLES * 16 + 2 * gap, 3)
    for row, name in enumerate(MODELS, 1):
        top = row * (16 + gap) + gap
        for seed in range(SAMPLES):
            sample = np.array(Image.open(folder / "study" / f"{name}-seed0" / "samples" / "ddim-2" / f"{seed:06d}.png"))
            left = gap + 16 * seed
            assert (grid[top : top + 16, left : left + 16] == sample).all()
    first = pictures.pixels(images(crowd(REAL + 1, seed=image_sets.FACES_SEED)[REAL:], 16, 16)[0])
    assert (grid[gap : 16 + gap, gap : 16 + gap] == first).all()

    samplers = np.array(Image.open(folder / "study" / "samplers.png"))[::3, ::3]
    assert samplers.shape == (3 * (16 + gap) + gap, SAMPLES * 16 + 2 * gap, 3)
    assert (samplers[: 16 + gap] == grid[: 16 + gap]).all()
    for row, name in enumerate(("ddpm-3", "ddim-2"), 1):
        sample = np.array(Image.open(folder / "study" / "N2-seed0" / "samples" / name / "000000.png"))
        top = row * (16 + gap) + gap
        assert (samplers[top : top + 16, gap : gap + 16] == sample).all()


def test_large_enough_faces_are_read(tmp_path, monkeypatch):
    """From 32 px on their attributes must agree; here on real ones alone, which do."""
    path = write_study(tmp_path, model={"image_size": 32})
    tasks = tasks_of(path)
    result = tasks.do(tasks.real())
    assert result["figures"]["2"]["disagreement"]["samples"] < 0.01
    assert tasks.kept(tasks.real()) == result
    tasks.strip("real").unlink()
    assert tasks.kept(tasks.real()) is None


def test_without_matplotlib_the_figures_are_kept(finished, monkeypatch, capsys):
    folder, report = finished
    (folder / "study" / "study.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(folder / "study_config.json") == report
    assert "study.png needs matplotlib, which `pipenv install" in capsys.readouterr().out
    assert not (folder / "study" / "study.png").exists()


def test_what_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "study").touch()
    with pytest.raises(InputError, match=r"study/results cannot be written to: "):
        run(write_study(tmp_path))


def test_a_study_is_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(study.train, "start_accelerator", lambda trainer: SimpleNamespace(num_processes=2))
    with pytest.raises(InputError, match="a study runs in one process, not in 2; start it with python -m"):
        run(write_study(tmp_path))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"study": {"patch_dividers": [1, 3]}}, "model.patch_divider is 2; it must be more than 1 and one of study"),
        (
            {"study": {"patch_dividers": [1, 2, 3]}},
            "model.patch_divider is 3; it must be one of 1, 2, 4, 8, because",
        ),
        ({"model": {"patch_divider": 1}}, "model.patch_divider is 1; it must be more than 1"),
        ({"study": {"halos": [1, 0]}}, r"study.halos is \[1, 0\]; .+ each a whole number of at least 1"),
        ({"study": {"seeds": [1, 2, 1]}}, r"study.seeds is \[1, 2, 1\]; it must name each value once"),
        ({"study": {"steps": 11}}, r"the number of sampling steps is 11; it must lie in \[1, 10\]"),
        ({"study": {"ddim_steps": [5, 12]}}, "the number of sampling steps is 12"),
        ({"study": {"samples": 1}}, "study.samples is 1; it must be a whole number from 2 to 1000000"),
        ({"study": {"sampler": "unknown"}}, 'section study: the sampler is "unknown"; it must be one of'),
        ({"study": {"smaples": 1}}, 'unknown key "smaples"; did you mean "samples"'),
        ({"trainer": {"train_dataset_dir": "pictures"}}, 'a study needs "builtin:faces"'),
        ({"model": {"image_size": 8}}, "8 x 8 pixels; each side must be 16 or more"),
    ],
)
def test_a_wrong_config_is_one_sentence(tmp_path, capsys, sections, words):
    path = write_study(tmp_path, **sections)
    with pytest.raises(SystemExit) as ended:
        command_line.run(lambda: study.main(["--config", str(path)]))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {path}: ")
    assert re.search(words, message)
    assert message.count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_definitions_are_there(finished):
    _, report = finished
    assert report["definitions"].items() >= metrics.DEFINITIONS.items()


@pytest.mark.slow
def test_a_model_that_continues_another_starts_from_its_weights(finished):
    folder = finished[0] / "study"
    states = {
        name: checkpoint.read(folder / f"{name}-seed0" / "checkpoints" / "model-last.pt")
        for name in ("N2", "N2+1", "N2+1-two")
    }
    assert [state["step"] for state in states.values()] == [STEPS, STEPS + 1, STEPS + 1]
    before, after, grids = (state["model"]["conv_in.weight"] for state in states.values())
    for changed in (after, grids):
        assert 0 < (changed - before).abs().max() < 1e-3
    assert states["N2+1-two"]["model"]["condition.position.weight"].shape == (8, 8)


def test_defects_of_real_faces():
    """Each does what its name says, and only patches that change places leave the pixels as they are."""
    faces = images(crowd(6), 32, 32)
    for defect in DEFECTS:
        spoiled = spoil(faces, defect, 4)
        assert spoiled.shape == faces.shape
        assert spoiled.abs().max() <= 1
        assert not torch.equal(spoiled, faces)
        assert torch.equal(spoiled, spoil(faces, defect, 4))
    halves = spoil(faces, "halves of two people", 4)
    assert torch.equal(halves[1], torch.cat([faces[1, ..., :16], faces[0, ..., 16:]], dim=2))
    cut = patches.split(spoil(faces, "each patch of another person", 4), 4).unflatten(0, (16, 6))
    assert torch.equal(cut[3, 5], patches.split(faces, 4).unflatten(0, (16, 6))[3, 2])
    moved = spoil(faces, "patches shuffled", 4)
    assert torch.equal(moved.flatten().sort().values, faces.flatten().sort().values)
    tones = patches.split(spoil(faces, "patches lighter or darker by 0.1", 4) - faces, 4)
    assert 0.05 < tones.mean((1, 2, 3)).std() < 0.15
