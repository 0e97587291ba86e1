"""Damaged, mixed-up and hostile bundles are refused, and nothing in them is loaded."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest

from hybridiff_compiler.backends import onnx_file
from hybridiff_compiler.bundle import Bundle, Manifest, open_graphs, reading
from hybridiff_compiler.bundle.files import record_file
from hybridiff_compiler.bundle.graphs import Graphs
from hybridiff_compiler.ir import InputError, PlanMismatchError, lower
from hybridiff_compiler.runtime.branch_calls import capture_branch
from hybridiff_compiler.runtime.segments import SegmentRunner

from .small import PlainPipeline

HOSTILE_NAMES = ("../x", "..", ".", "/etc/passwd", "a/b", "a\\b", ".hidden", "x\n", "", "C:x", "x" * 200, "plan.json\0")


@pytest.fixture(autouse=True)
def _nothing_is_loaded(request, monkeypatch):
    """In these tests loading an artifact is an error by itself."""

    def refuse(*args):
        raise AssertionError("an artifact was loaded")

    monkeypatch.setattr(onnx_file.OnnxFiles, "load", refuse)


def flip(file, offset, bit=0):
    """Flip one bit of a file in place."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 1 << bit
    file.write_bytes(data)


def opened(folder):
    """The bundle, or None when it is refused."""
    try:
        return Bundle.open(folder)
    except InputError:
        return None


def build(bundle, plan, pipe, number):
    """Load the first graph of one pattern of the plan."""
    runner = SegmentRunner(
        pipe.denoiser, plan.model.signature, plan.patterns, plan.partitions, backend=bundle.backend
    )
    runner.prepare(lower(plan.patterns[number])[:1])


def test_flipped_bits(copy):
    """Anywhere in any file: refused, unless white space of the manifest turned into other white space."""
    original = Bundle.open(copy)
    chance = random.Random(0)
    for name in sorted(file.name for file in copy.iterdir()):
        manifest = name == "manifest.json"
        for _ in range(60 if manifest else 8):
            offset, bit = chance.randrange((copy / name).stat().st_size), chance.randrange(8)
            flip(copy / name, offset, bit)
            outcome = opened(copy)
            assert outcome is None or (manifest and outcome == original), (name, offset, bit)
            flip(copy / name, offset, bit)
    assert Bundle.open(copy) == original


def test_missing_truncated_and_grown_files(copy):
    for name in sorted(file.name for file in copy.iterdir()):
        data = (copy / name).read_bytes()
        for changed in (data[:-3], data[: len(data) // 2], b"", data + b"}"):
            (copy / name).write_bytes(changed)
            with pytest.raises(InputError):
                Bundle.open(copy)
        (copy / name).unlink()
        with pytest.raises(InputError, match=name):
            Bundle.open(copy)
        (copy / name).write_bytes(data)
    Bundle.open(copy)


def test_swapped_artifacts(copy):
    first, second = (copy / artifact.file for artifact in Bundle.open(copy).manifest.artifacts)
    aside = copy.parent / "aside"
    shutil.move(first, aside)
    shutil.move(second, first)
    shutil.move(aside, second)
    with pytest.raises(InputError, match="the manifest says"):
        Bundle.open(copy)


def test_artifacts_listed_for_each_other_s_graph(copy, reseal, plan, pipe):
    """Right hashes, wrong graphs: the recorded inputs and outputs are not the graph's."""
    first, second = Manifest.load(copy / "manifest.json").artifacts
    mixed = (first.model_copy(update={"graph": second.graph}), second.model_copy(update={"graph": first.graph}))
    bundle = reseal(copy, artifacts=mixed)
    for number in (0, 1):
        with pytest.raises(PlanMismatchError, match="other weights"):
            build(bundle, plan, pipe, number)


def test_artifacts_listed_for_each_other_s_launches(copy, reseal, plan, pipe):
    first, second = Manifest.load(copy / "manifest.json").artifacts
    mixed = (first.model_copy(update={"segments": second.segments}),
             second.model_copy(update={"segments": first.segments}))
    bundle = reseal(copy, artifacts=mixed)
    with pytest.raises(PlanMismatchError, match="other outputs"):
        build(bundle, plan, pipe, 0)


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_that_lead_out(copy, name):
    (copy.parent / "x").write_bytes(b"outside")
    text = (copy / "manifest.json").read_text()
    manifest = Manifest.parse(text)
    artifact = manifest.artifacts[0].model_copy(update={"file": name})
    hostile = manifest.model_copy(update={"artifacts": (artifact, *manifest.artifacts[1:]), "seal": ""})
    hostile.model_copy(update={"seal": hostile.digest()}).save(copy / "manifest.json")
    with pytest.raises(InputError, match="file"):
        Bundle.open(copy)


@pytest.mark.parametrize("name", ["manifest.json", "plan.json", "weights.bin"])
def test_links_pipes_and_folders(copy, name):
    """Even a link to the right content: it could be changed after the check. A pipe is not opened: that would hang."""
    file, outside = copy / name, copy.parent / "outside"
    shutil.move(file, outside)
    for make in (lambda: file.symlink_to(outside), lambda: os.mkfifo(file), file.mkdir):
        make()
        with pytest.raises(InputError, match="no plain file"):
            Bundle.open(copy)
        file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()


def test_a_manifest_without_its_seal(copy):
    manifest = Manifest.load(copy / "manifest.json")
    manifest.model_copy(update={"backend": "aotinductor"}).save(copy / "manifest.json")
    with pytest.raises(InputError, match="was changed after it was written"):
        Bundle.open(copy)


def test_a_bundle_of_an_older_version(copy):
    """As bundles were before they recorded what was captured."""
    payload = json.loads((copy / "manifest.json").read_text())
    del payload["graphs"]
    (copy / "manifest.json").write_text(json.dumps(payload | {"schema_version": 1}))
    with pytest.raises(InputError, match=r"schema_version.*another version of hybridiff: run `hybridiff compile`"):
        Bundle.open(copy)


def test_a_plan_for_another_denoiser(copy, reseal):
    with pytest.raises(InputError, match="for different denoisers"):
        reseal(copy, fingerprint="0" * 64)


@pytest.mark.parametrize(("change", "message"), [
    (lambda graphs, other: {"layers": other.layers}, "is of another denoiser than the plan"),
    (lambda graphs, other: {"graphs": graphs.graphs[:1]}, "is about other graphs than the artifacts"),
    (lambda graphs, other: {"graphs": (graphs.graphs[0].model_copy(update={"leaves": 99}), *graphs.graphs[1:])},
     "has fewer inputs than recorded"),
    (lambda graphs, other: {"graphs": graphs.graphs[:1] * 2}, "the same graph is recorded twice"),
    (lambda graphs, other: {"graphs": ()}, "not a valid graphs"),
])
def test_graphs_that_do_not_belong(copy, reseal, pipe, change, message):
    """Right hashes, but what is recorded of the capture is about something else."""
    graphs, other = Graphs.load(copy / "graphs.json"), PlainPipeline().denoiser
    del other.blocks[-1]
    captured = capture_branch(other, Bundle.open(copy).plan.model.signature)
    graphs.model_copy(update=change(graphs, captured)).save(copy / "graphs.json")
    with pytest.raises(InputError, match=message):
        reseal(copy, graphs=record_file(copy / "graphs.json"))


def test_graphs_of_a_denoiser_with_other_weights_names(copy, reseal, pipe, plan):
    """The names that graphs are bound by come from the file: one that the denoiser lacks is refused, not guessed."""
    graphs = Graphs.load(copy / "graphs.json")
    first, *others = graphs.graphs
    for name, shape in (("nowhere.weight", first.weights[0].shape), (first.weights[0].name, (1, 2, 3))):
        wrong = first.weights[0].model_copy(update={"name": name, "shape": shape})
        changed = first.model_copy(update={"weights": (wrong, *first.weights[1:])})
        graphs.model_copy(update={"graphs": (changed, *others)}).save(copy / "graphs.json")
        bundle = reseal(copy, graphs=record_file(copy / "graphs.json"))
        with pytest.raises(PlanMismatchError, match="the compiled denoiser reads"):
            build(bundle, plan, pipe, 0)


def test_launches_that_were_not_compiled(copy, reseal):
    first, second = Manifest.load(copy / "manifest.json").artifacts
    renamed = second.model_copy(update={"segments": ("elsewhere[0]",)})
    with pytest.raises(InputError, match="no artifact for the plan's nested"):
        reseal(copy, artifacts=(first, renamed))
    with pytest.raises(InputError, match="for the same launch"):
        reseal(copy, artifacts=(first, second.model_copy(update={"segments": first.segments})))


def test_an_identity_that_is_not_the_denoiser_s(copy, reseal, pipe):
    graphs = Graphs.load(copy / "graphs.json")
    identity = graphs.identity.model_copy(update={"settings_sha256": "0" * 64})
    graphs.model_copy(update={"identity": identity}).save(copy / "graphs.json")
    bundle = reseal(copy, graphs=record_file(copy / "graphs.json"))
    with pytest.raises(PlanMismatchError, match="not what they were when the bundle was compiled"):
        open_graphs(bundle.backend, pipe.denoiser)


def test_changes_after_opening(copy, reseal, pipe, plan):
    """Every rank checks what it loads itself, against the manifest that was opened."""
    bundle = Bundle.open(copy)
    graphs = open_graphs(bundle.backend, pipe.denoiser)
    runner = SegmentRunner(
        pipe.denoiser, plan.model.signature, plan.patterns, plan.partitions, backend=bundle.backend, captured=graphs
    )
    flip(copy / bundle.manifest.artifacts[0].file, 100)
    with pytest.raises(InputError, match="sha256"):
        runner.prepare(lower(plan.patterns[0]))
    reading._sealed_manifest.cache_clear()
    flip(copy / bundle.manifest.artifacts[0].file, 100)
    reseal(copy, target=bundle.manifest.target.model_copy(update={"dtype": "float16"}))
    with pytest.raises(InputError, match="replaced after it was opened"):
        open_graphs(bundle.backend, pipe.denoiser)


@pytest.mark.parametrize(("update", "message"), [
    ({"versions": {"torch": "1.0"}}, "compiled with torch 1.0, here is"),
    ({"versions": {"tensorrt": "9"}}, "compiled with tensorrt 9, here is none"),
    ({"arch": "riscv-rvv"}, "compiled for cpu riscv-rvv, this machine's is"),
])
def test_another_machine(copy, reseal, update, message):
    target = Manifest.load(copy / "manifest.json").target
    bundle = reseal(copy, target=target.model_copy(update=update))
    with pytest.raises(PlanMismatchError, match=message):
        bundle.check_machine()
    with pytest.raises(PlanMismatchError, match="hybridiff compile"):
        reading.resolve_plan(bundle)


def test_a_gpu_bundle_without_a_gpu(copy, reseal, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    target = Manifest.load(copy / "manifest.json").target
    bundle = reseal(copy, target=target.model_copy(update={"device": "cuda", "arch": "sm_89"}))
    with pytest.raises(PlanMismatchError, match="this machine has none"):
        bundle.check_machine()


def test_no_pickles(compiled):
    """Nothing in a bundle is a pickle, and no module that reads bundles knows how to load one."""
    import zipfile

    import hybridiff_compiler.bundle as package

    for file in compiled("aotinductor").folder.glob("*.pt2"):
        with zipfile.ZipFile(file) as archive:
            assert not [name for name in archive.namelist() if name.endswith((".pkl", ".pt", ".pth"))]
    source = "".join(file.read_text() for file in __import__("pathlib").Path(package.__file__).parent.glob("*.py"))
    assert "pickle" not in source
    assert "torch.load" not in source
